import json

import pytest

from stepcredit.data.jsonl import load_corpus, load_jsonl
from stepcredit.retrieval import Passage

PASSAGES = [{"id": f"p{i}", "title": f"Title {i}", "text": f"Text {i}.", "src": "ignored"} for i in range(3)]
QUESTION = {
    "id": "q0",
    "dataset": "hotpotqa",
    "type": "bridge",
    "split": "train",
    "question": "Which?",
    "answers": ["This", "That"],
    "supporting": ["p2", "p0"],
}


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def load(tmp_path):
    def load(questions, passages=PASSAGES, **kwargs):
        return load_jsonl(
            write(tmp_path / "questions.jsonl", questions), write(tmp_path / "corpus.jsonl", passages), **kwargs
        )

    return load


def test_reads_questions_and_passages(load):
    data = load([QUESTION, "", QUESTION | {"id": "q1", "split": "test", "dataset": "2wiki"}])
    assert data.passages[0] == Passage(id="p0", title="Title 0", text="Text 0.")
    (question,) = data.train
    assert question.id == "q0"
    assert question.text == "Which?"
    assert question.answers == ("This", "That")
    assert question.supporting == ("p2", "p0")
    assert question.plan == ("Title 2", "Title 0")
    assert question.kind == "hotpotqa/bridge"
    assert [q.id for q in data.test] == ["q1"]
    assert data.name == "questions"
    assert data.attribution == "2WikiMultiHopQA Apache-2.0; HotpotQA CC BY-SA 4.0"


def test_labels_and_supporting_passages_are_optional(load):
    (question,) = load([{k: QUESTION[k] for k in ("id", "split", "question", "answers")}]).train
    assert question.supporting == question.plan == ()
    assert question.kind == ""


def test_plan_repeats_no_title(load):
    passages = [*PASSAGES, {"id": "p3", "title": "Title 0", "text": "More."}, {"id": "p4", "title": "", "text": "x"}]
    (question,) = load([QUESTION | {"supporting": ["p0", "p3", "p4", "p1"]}], passages).train
    assert question.plan == ("Title 0", "Title 1")
    assert len(question.supporting) == 4


def test_half_of_dev_becomes_test_when_there_is_no_test_split(load):
    held_out = [QUESTION | {"id": f"d{i}", "split": "dev"} for i in range(200)]
    data = load([QUESTION, *held_out])
    assert sorted(q.id for q in data.dev + data.test) == sorted(q["id"] for q in held_out)
    assert data.counts["dev_moved_to_test"] == len(data.test)
    assert 70 <= len(data.test) <= 130
    # Neither the order of the file nor what else is in it moves a question.
    again = load([*held_out[100::-1], QUESTION])
    assert {q.id for q in again.test} <= {q.id for q in data.test}
    assert [q.id for q in again.dev] == [q.id for q in data.dev if int(q.id[1:]) <= 100]


def test_data_set_filter_counts_what_it_leaves_out(load):
    questions = [QUESTION | {"id": str(i), "dataset": name} for i, name in enumerate(("squad", "2wiki", "2wiki"))]
    data = load(questions, datasets=("2wiki",))
    assert sorted(q.id for q in data.train) == ["1", "2"]
    assert data.counts["other_dataset"] == 1
    with pytest.raises(ValueError, match="no questions of 'hotpot'; it has 2wiki, squad"):
        load(questions, datasets=("hotpot",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, "question 'q1' has no gold answers: field 'answers' is empty"),
        ({"answers": ["x", " "]}, "question 'q1': field 'answers' holds an empty string"),
        ({"answers": "Paris"}, "question 'q1': field 'answers' must be a list of strings, got 'Paris'"),
        ({"answers": None}, "question 'q1': field 'answers' must be a list of strings, got None"),
        ({"question": 7}, "question 'q1': field 'question' must be a string, got 7"),
        ({"question": ""}, "question 'q1': field 'question' is empty"),
        ({"split": "validation"}, "field 'split' is 'validation', expected one of train, dev, test"),
        ({"supporting": ["p0", "p9"]}, "question 'q1': supporting passage 'p9' is not in the corpus"),
        ({"id": "q0"}, "field 'id' repeats 'q0' of line 1"),
        ({"id": 5}, "field 'id' must be a string, got 5"),
    ],
)
def test_bad_questions_are_named(load, tmp_path, change, message):
    with pytest.raises(ValueError) as error:
        load([QUESTION, QUESTION | {"id": "q1"} | change])
    assert str(error.value).startswith(f"{tmp_path / 'questions.jsonl'}:2: ")
    assert message in str(error.value)


@pytest.mark.parametrize("field", ["id", "question", "answers", "split"])
def test_missing_question_field_is_named(load, field):
    record = {name: value for name, value in QUESTION.items() if name != field}
    with pytest.raises(ValueError, match=rf"questions\.jsonl:1: .*field '{field}' is missing"):
        load([record])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "p9", "title": "T"}, "field 'text' is missing; the line has id, title"),
        ({"id": "p9", "text": "x"}, "field 'title' is missing"),
        ({"title": "T", "text": "x"}, "field 'id' is missing"),
        ({"id": "p9", "title": None, "text": "x"}, "field 'title' must be a string, got None"),
        ({"id": "p9", "title": "T", "text": " "}, "field 'text' is empty"),
        ({"id": "p1", "title": "T", "text": "x"}, "field 'id' repeats 'p1' of line 2"),
        ('{"id": "p9",', "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
    ],
)
def test_bad_corpus_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "corpus.jsonl", [*PASSAGES, "", line])
    with pytest.raises(ValueError) as error:
        load_corpus(path)
    assert str(error.value).startswith(f"{path}:5: ")
    assert message in str(error.value)


def test_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json.dumps(PASSAGES[0]).encode() + b'\n{"id": "p\xff"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl:2: not JSON"):
        load_corpus(path)


def test_empty_files_are_named(load, tmp_path):
    with pytest.raises(ValueError, match=r"questions\.jsonl: the file has no questions"):
        load([])
    with pytest.raises(ValueError, match=r"corpus\.jsonl: the corpus has no passages"):
        load([QUESTION], [])
    with pytest.raises(FileNotFoundError, match="absent"):
        load_corpus(tmp_path / "absent.jsonl")
