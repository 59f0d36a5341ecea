"""Conversations with evidence: the synthetic ones, the JSON Lines format, and the scripts that answer them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from stepcredit.data.conversations import Conversation, MemoryQuestion, Message, load_conversations
from stepcredit.data.memory_scripts import memory_scripts
from stepcredit.data.personas import TOPICS, PersonaSettings, build_conversations
from stepcredit.environments.memory import read_memory
from stepcredit.rewards import chosen_option, coverage, facts_stated, normalize_answer, states

SMALL = PersonaSettings(train=60, dev=5, test=10)
DATA = build_conversations(SMALL)


def texts(question):
    by_id = {m.id: m for m in question.conversation.messages}
    return [by_id[name].text for name in question.supporting]


# Synthetic


def test_a_seed_fixes_everything_and_another_changes_it():
    again, other = build_conversations(SMALL), build_conversations(PersonaSettings(train=60, dev=5, test=10, seed=1))
    assert again == DATA
    assert [q.conversation for q in again.train] == [q.conversation for q in DATA.train]
    assert [q.text for q in other.train] != [q.text for q in DATA.train]
    # More personas leave those there are as they were.
    more = build_conversations(PersonaSettings(train=70, dev=5, test=10))
    assert {q.id for q in DATA.train} < {q.id for q in more.train}


def test_every_kind_is_asked_and_half_have_options():
    kinds = Counter(q.kind for q in DATA.train)
    assert set(kinds) == {"stated", "changed", "before"}
    assert kinds["changed"] == kinds["before"] > 50
    assert 0.4 < sum(bool(q.options) for q in DATA.train) / len(DATA.train) < 0.6
    assert len({q.conversation.id for q in DATA.train}) == 60
    assert not {q.conversation.id for q in DATA.train} & {q.conversation.id for q in [*DATA.dev, *DATA.test]}
    assert DATA.counts == {"conversations": 75}
    assert len({p.id for p in DATA.passages}) == len(DATA.passages)


@pytest.mark.parametrize("question", DATA.train[:60], ids=lambda q: q.id)
def test_the_evidence_holds_the_answer(question):
    said = texts(question)
    (answer,) = question.answers
    topic = question.plan[0]
    assert 1 <= len(said) <= 2
    assert all(topic in text for text in said)
    stated = [states(text, answer) for text in said]
    # What was liked before is in the first message; the second, which ended it, names what came after.
    assert stated == ([True, False] if question.kind == "before" else [True] * len(said))
    elsewhere = [m for m in question.conversation.messages if m.id not in question.supporting]
    fact = next(f for f in question.conversation.facts if f.topic == topic)
    assert answer in (fact.value, *fact.outdated)
    others = [m.text for m in elsewhere if m.speaker == "user" and m.id not in fact.evidence]
    assert not any(states(text, answer) for text in others)
    if question.options:
        assert [o for o in question.options if normalize_answer(o) == normalize_answer(answer)] == [answer]
        assert len(question.options) == 4


def test_facts_change_in_the_order_of_messages():
    for question in DATA.train:
        for fact in question.conversation.facts:
            messages = [m for m in question.conversation.messages if m.id in fact.evidence]
            assert [m.id for m in messages] == list(fact.evidence)
            order = [*fact.outdated, fact.value, fact.value][: len(messages)]
            assert all(states(m.text, value) for m, value in zip(messages, order, strict=True))
            assert len(messages) <= 3


def test_a_topics_word_is_in_no_other_topics_values():
    for topic in TOPICS:
        assert not [v for other, values in TOPICS.items() if other != topic for v in values if topic in v.lower()]
    everything = [normalize_answer(v) for values in TOPICS.values() for v in values]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("topics", 11, r"memory.personas.topics must be at most 10"), ("sessions", 0, r"memory.personas.sessions")],
)
def test_bad_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        PersonaSettings(**{field: value})


def test_one_session_and_one_topic_are_enough():
    data = build_conversations(PersonaSettings(train=3, dev=1, test=1, sessions=1, topics=1, chatter=0))
    assert {q.kind for q in data.train} == {"stated"}


# Scripts


def test_good_scripts_keep_every_fact_and_bad_ones_forget():
    questions = DATA.train[:100]
    good, bad = memory_scripts(questions, 1.0), memory_scripts(questions, 0.0)
    recalls = []
    for question, script in zip(questions, good, strict=True):
        entries, counts = read_memory(script.notes, question.conversation)
        assert not counts
        assert coverage([e.id for e in entries], question.supporting, 1.0) == 1.0
        assert {e.id for e in entries} == {name for f in question.conversation.facts for name in f.evidence}
        assert facts_stated(script.profile, question.conversation.facts) == 1.0
        assert script.query == question.plan[0]
        assert script.answer == question.answers[0]
    for question, script in zip(questions, bad, strict=True):
        entries, _ = read_memory(script.notes, question.conversation)
        recalls.append(coverage([e.id for e in entries], question.supporting, 1.0))
        assert script.query in question.text
        outdated = [f for f in question.conversation.facts if f.outdated]
        assert not any(states(script.profile, f.value) for f in outdated)
    assert 0.35 < sum(recalls) / len(recalls) < 0.65
    mixed = memory_scripts(questions, 0.3)
    assert sum(s.query == q.plan[0] for s, q in zip(mixed, questions, strict=True)) == 30
    assert memory_scripts(questions, 0.3) == mixed


def test_scripts_without_facts_keep_the_evidence():
    messages = (Message("c/1", "user", "hello"), Message("c/2", "user", "I row."))
    question = MemoryQuestion("q", "Sport?", ("rowing",), ("c/2",), conversation=Conversation("c", messages))
    (script,) = memory_scripts([question], 1.0)
    assert (script.notes, script.profile, script.query) == ("[2]", "", "Sport?")
    entries, _ = read_memory(script.notes, question.conversation)
    assert [(e.id, e.title, e.text) for e in entries] == [("c/2", "2", "I row.")]


# Rewards


def test_coverage_by_hand():
    assert coverage(["a", "b", "x", "y", "z"], ["a", "b", "c"], 0.8) == pytest.approx(0.8 * 2 / 3 + 0.2 * 2 / 6)
    assert coverage(["a", "a"], ["a"], 0.2) == 1.0
    assert coverage([], ["a"], 0.8) == 0.0
    assert coverage(["b"], ["a"], 0.0) == 0.0
    assert coverage(["a", "b"], ["a"], 0.0) == 0.5
    with pytest.raises(ValueError, match="evidence is empty"):
        coverage(["a"], [], 0.8)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        coverage(["a"], ["a"], 1.5)


def test_facts_stated():
    facts = next(q for q in DATA.train if q.kind == "changed").conversation.facts
    fact = next(f for f in facts if f.outdated)
    assert facts_stated(f"It is {fact.value}.", [fact]) == 1.0
    assert facts_stated(f"{fact.value}, not {fact.outdated[0]}", [fact]) == 0.0  # it reads no sentence
    assert facts_stated(f"{fact.value}s", [fact]) == 0.0
    assert facts_stated("", facts) == 0.0
    assert facts_stated("anything", []) == 0.0
    assert states("Steam, and green tea.", "tea")
    assert not states("steam", "tea")
    assert not states("anything", "the")


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("green tea", 0),
        ("The Green Tea!", 0),
        ("(b)", 1),
        ("B.", 1),
        ("c", 2),
        ("(a) green tea", 0),
        ("a) green tea", 0),
        ("a", 0),
        ("(a) coffee", None),
        ("d", None),
        ("tea", None),
        ("", None),
        (None, None),
        ("a coffee", 1),  # an article
    ],
)
def test_chosen_option(answer, chosen):
    assert chosen_option(answer, ("green tea", "coffee", "cider")) == chosen


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [("C. elegans", 0), ("c. Elegans.", 0), ("(c) fly", 2), ("C.", 2), ("(a) C. elegans", 0), ("b. elegans", None)],
)
def test_an_option_may_begin_like_a_letter(answer, chosen):
    assert chosen_option(answer, ("C. elegans", "yeast", "fly")) == chosen


# JSON Lines

GOOD = {
    "id": "c1",
    "split": "train",
    "messages": [
        {"id": "1", "speaker": "user", "text": "I drink tea."},
        {"id": "2", "speaker": "assistant", "text": "Good."},
    ],
    "facts": [{"topic": "drink", "value": "tea", "outdated": ["cider"], "evidence": ["1"]}],
    "questions": [
        {
            "id": "q1",
            "question": "Drink?",
            "answers": ["tea"],
            "evidence": ["1"],
            "options": ["tea", "milk"],
            "type": "t",
        }
    ],
}


def written(tmp_path, *records):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_of_conversations(tmp_path):
    other = {**GOOD, "id": "c2", "split": "test", "questions": [{**GOOD["questions"][0], "id": "q2"}]}
    bare = {k: v for k, v in GOOD.items() if k != "facts"} | {"id": "c3", "split": "dev", "questions": []}
    data = load_conversations(written(tmp_path, GOOD, other, bare))
    (question,) = data.train
    assert (question.id, question.supporting, question.options) == ("q1", ("c1/1",), ("tea", "milk"))
    assert (question.kind, question.answers) == ("t", ("tea",))
    assert question.conversation.messages[0] == Message("c1/1", "user", "I drink tea.")
    assert question.conversation.facts[0].outdated == ("cider",)
    assert question.conversation.facts[0].evidence == ("c1/1",)
    assert [q.id for q in data.test] == ["q2"]
    assert data.dev == []
    assert data.name == "talks"
    assert [p.id for p in data.passages] == ["c1/1", "c1/2", "c2/1", "c2/2", "c3/1", "c3/2"]


def changed(path, value):
    """GOOD with one field changed, or left out where the value is None."""
    record = json.loads(json.dumps(GOOD))
    at = record
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["split"], "trian", r":1: conversation 'c1': field 'split' is 'trian'"),
        (["id"], "", r":1: field 'id' is empty"),
        (["messages"], [], r"conversation 'c1': field 'messages' is empty"),
        (["messages"], {}, r"field 'messages' must be a list of objects"),
        (["messages", 1, "text"], None, r"conversation 'c1': messages\[1\]: field 'text' is missing"),
        (["messages", 1, "text"], 3, r"messages\[1\]: field 'text' must be a string, got 3"),
        (["messages", 1, "id"], "1", r"messages\[1\]: field 'id' repeats '1'"),
        (["messages", 1], "hello", r"messages\[1\]: expected a JSON object, got str"),
        (["facts", 0, "value"], " ", r"facts\[0\]: field 'value' is empty"),
        (["facts", 0, "value"], "the", r"facts\[0\]: field 'value' has no word that is compared, got 'the'"),
        (
            ["facts", 0, "value"],
            "dry cider",
            r"facts\[0\]: field 'outdated': 'cider' stands in the value 'dry cider' of",
        ),
        (["facts", 0, "evidence"], ["9"], r"facts\[0\]: field 'evidence': '9' is no message"),
        (["questions"], None, r"conversation 'c1': field 'questions' is missing"),
        (["questions", 0, "answers"], [], r"question 'q1' has no gold answers"),
        (["questions", 0, "evidence"], [], r"question 'q1': field 'evidence' is empty"),
        (["questions", 0, "evidence"], ["3"], r"question 'q1': field 'evidence': '3' is no message"),
        (["questions", 0, "options"], ["tea"], r"question 'q1': options must be 2 to 26 different .*'tea'"),
        (["questions", 0, "options"], ["cola", "milk"], r"question 'q1': options must hold exactly one gold answer"),
        (["questions", 0, "options"], ["tea", "Tea"], r"question 'q1': options must be .* different answers"),
        (["questions", 0, "question"], " ", r"question 'q1': field 'question' is empty"),
    ],
)
def test_a_bad_line_names_file_line_and_field(tmp_path, path, value, message):
    with pytest.raises(ValueError, match=r"talks\.jsonl" + ("" if message.startswith(":") else ":1.*") + message):
        load_conversations(written(tmp_path, changed(path, value)))


def test_facts_that_no_profile_states_together_are_refused(tmp_path):
    facts = [*GOOD["facts"], {"topic": "guest's drink", "value": "cloudy cider"}]
    message = r"facts\[0\]: field 'outdated': 'cider' stands in the value 'cloudy cider' of topic \"guest's drink\""
    with pytest.raises(ValueError, match=message):
        load_conversations(written(tmp_path, changed(["facts"], facts)))
    facts[1]["value"] = "ciders"  # another word
    assert len(load_conversations(written(tmp_path, changed(["facts"], facts))).train) == 1


def test_ids_are_unique_and_questions_are_there(tmp_path):
    with pytest.raises(ValueError, match=r":2: field 'id' repeats 'c1' of line 1"):
        load_conversations(written(tmp_path, GOOD, GOOD))
    with pytest.raises(ValueError, match=r":2: conversation 'c2': questions\[0\]: field 'id' repeats 'q1' of line 1"):
        load_conversations(written(tmp_path, GOOD, {**GOOD, "id": "c2"}))
    with pytest.raises(ValueError, match=r"the file has no questions"):
        load_conversations(written(tmp_path, {**GOOD, "questions": []}))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: not JSON"):
        load_conversations(tmp_path / "bad.jsonl")


def test_a_question_checks_its_evidence():
    with pytest.raises(ValueError, match=r"question 'q': evidence must name messages of conversation 'c', got 'm'"):
        MemoryQuestion("q", "?", ("a",), ("m",), conversation=Conversation("c", ()))
    with pytest.raises(ValueError, match=r"question 'q': evidence must name messages .* got 'none'"):
        MemoryQuestion("q", "?", ("a",), conversation=Conversation("c", ()))
