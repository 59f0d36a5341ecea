"""The formats of `python -m stepcredit.score`: schemas and code say the same, and every error names line and field."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import jsonschema
import pytest

from score_lines import FORMS, four, quiet
from stepcredit.branches.contexts import REASONS
from stepcredit.rollout import Span, SpanKind
from stepcredit.score.__main__ import schema_text
from stepcredit.score.records import ITEMS, RULES, check_log, numbered_lines, read_line
from stepcredit.score.spans import KINDS

SCHEMA = json.loads(schema_text("rollout"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
TEXT = {"id": "r", "gold": "Paris", "prompt": "Who?", "response": "<answer>Paris</answer>"}
MASK = {"id": "r", "gold": "Paris", "prompt_ids": [1], "response_ids": [4, 5, 6, 7], "policy_mask": [1, 0, 0, 1]}
SPANS = {
    **{name: MASK[name] for name in ("id", "gold", "prompt_ids", "response_ids")},
    "spans": [
        {"kind": "query", "start": 0, "stop": 1, "step": 0},
        {"kind": "documents", "start": 1, "stop": 3, "step": 0},
        {"kind": "answer", "start": 3, "stop": 4},
    ],
}
ABSENT = object()


def changed(record, changes):
    return {name: value for name, value in (record | changes).items() if value is not ABSENT}


def span(i, **changes):
    """SPANS with the fields of its span `i` changed."""
    spans = deepcopy(SPANS["spans"])
    spans[i] = changed(spans[i], changes)
    return {"spans": spans}


def parse(text):
    return read_line(text if isinstance(text, bytes) else text.encode(), Path("log"), 2)


@pytest.mark.parametrize(
    ("record", "changes"),
    [
        (TEXT, {}),
        (TEXT, {"response": ""}),
        (TEXT, {"question_id": "q", "group": -3, "meta": {"any": [1, {"thing": None}]}}),
        (TEXT, {"gold": ABSENT, "golds": ["Paris", "Lutetia"]}),
        (TEXT, {"group": 3.0}),
        (TEXT, {"id": "日本 \u2028 😀"}),
        (MASK, {}),
        (MASK, {"policy_mask": [True, False, 0, 1.0]}),
        (MASK, {"response_ids": [], "policy_mask": []}),
        (MASK, {"prompt_ids": [1.0, 0]}),
        (SPANS, {}),
        (SPANS, {"response_ids": [], "spans": []}),
        (SPANS, span(2, step=-1)),
        (SPANS, span(0, start=0.0)),
        *((line, {}) for form in FORMS for line in four(form)),
    ],
)
def test_what_the_schema_accepts_is_read(record, changes):
    line = changed(record, changes)
    VALIDATOR.validate(line)
    read = parse(json.dumps(line))
    assert (read.id, read.line, read.where) == (line["id"], 2, f"log:2: rollout {line['id']!r}")
    assert read.golds == tuple(line.get("golds", [line.get("gold")]))
    assert read.prompt == line.get("prompt", line.get("prompt_ids"))
    assert read.response == line.get("response", line.get("response_ids"))
    assert read.policy_mask == line.get("policy_mask")
    assert (read.spans is None) == ("spans" not in line)
    assert read.passed == {name: line[name] for name in ("group", "meta") if name in line}


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        (TEXT, {"id": ABSENT}, "field 'id' is missing; the line has gold, prompt, response"),
        (TEXT, {"id": 5}, "field 'id' must be a string that is not blank, got 5"),
        (TEXT, {"id": " "}, "field 'id' must be a string that is not blank, got ' '"),
        (TEXT, {"gold": ABSENT}, "field 'golds' (or 'gold') is missing"),
        (TEXT, {"golds": ["Paris"]}, "fields 'gold' and 'golds' exclude each other"),
        (TEXT, {"gold": ABSENT, "golds": []}, "field 'golds' must be a list that is not empty, got []"),
        (TEXT, {"gold": ABSENT, "golds": ["a", ""]}, "field 'golds[1]' must be a string that is not blank, got ''"),
        (TEXT, {"gold": ["Paris"]}, "field 'gold' must be a string that is not blank, got ['Paris']"),
        (TEXT, {"prompt": ABSENT}, "field 'prompt' is missing; the line has id, gold, response"),
        (TEXT, {"prompt": ABSENT, "response": ABSENT}, "'prompt' (or 'prompt_ids', of a rollout in tokens) is missing"),
        (TEXT, {"prompt": "\n"}, "field 'prompt' must be a string that is not blank"),
        (TEXT, {"response": None}, "field 'response' must be a string, got None"),
        (TEXT, {"response": ABSENT}, "field 'response' is missing"),
        (TEXT, {"respones": "x"}, "unknown field 'respones'; did you mean 'response'?"),
        (TEXT, {"advantage_xyz": 1}, "unknown field 'advantage_xyz'; what is to be passed through goes into meta"),
        (TEXT, {"meta": []}, "field 'meta' must be an object, got []"),
        (TEXT, {"group": 1.5}, "field 'group' must be an integer, got 1.5"),
        (TEXT, {"group": True}, "field 'group' must be an integer, got True"),
        (TEXT, {"question_id": None}, "field 'question_id' must be a string that is not blank, got None"),
        (TEXT, {"prompt_ids": [1]}, "fields 'prompt' and 'prompt_ids' exclude each other"),
        (MASK, {"response": "x"}, "fields 'response' and 'prompt_ids' exclude each other"),
        (MASK, {"prompt_ids": []}, "field 'prompt_ids' must be a list that is not empty, got []"),
        (MASK, {"prompt_ids": ABSENT}, "field 'prompt_ids' is missing"),
        (MASK, {"response_ids": [4, -1, 6, 7]}, "'response_ids[1]' must be a token id (an integer from 0), got -1"),
        (MASK, {"response_ids": [4, 5, "6", 7]}, "'response_ids[2]' must be a token id (an integer from 0), got '6'"),
        (MASK, {"response_ids": [4, 5, True, 7]}, "field 'response_ids[2]' must be a token id"),
        (MASK, {"response_ids": "4567"}, "field 'response_ids' must be a list, got '4567'"),
        (MASK, {"policy_mask": ABSENT}, "field 'policy_mask' (or 'spans') is missing"),
        (MASK, {"policy_mask": [1, 0, 2, 1]}, "field 'policy_mask[2]' must be 0 or 1, or a boolean, got 2"),
        (MASK, {"spans": []}, "fields 'policy_mask' and 'spans' exclude each other"),
        (SPANS, {"spans": [[0, 4]]}, "field 'spans[0]' must be an object, got [0, 4]"),
        (SPANS, span(1, kind="document"), "field 'spans[1]' has kind 'document', known: think, query, "),
        (SPANS, span(1, kind="prompt"), "field 'spans[1]' has kind 'prompt'"),
        (SPANS, span(1, kind=ABSENT), "field 'spans[1]' has no 'kind'; it has start, stop, step"),
        (SPANS, span(1, stop="3"), "field 'spans[1]' has stop='3', expected an integer from 0"),
        (SPANS, span(1, step=-2), "field 'spans[1]' has step=-2, expected an integer from -1"),
        (SPANS, span(1, end=3), "field 'spans[1]' has an unknown field 'end'"),
    ],
)  # fmt: skip
def test_what_the_schema_rejects_is_named(record, changes, message):
    line = changed(record, changes)
    assert not VALIDATOR.is_valid(line)
    with pytest.raises(ValueError) as error:
        parse(json.dumps(line))
    assert str(error.value).startswith("log:2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        (MASK, {"policy_mask": [1, 0, 1]}, "field 'policy_mask' has 3 entries for 4 response_ids"),
        (SPANS, {"response_ids": [4, 5, 6]}, "field 'spans' ends at 4, but response_ids has 3 entries"),
        (SPANS, {"spans": []}, "field 'spans' ends at 0, but response_ids has 4 entries"),
        (SPANS, span(1, start=2), "'spans[1]' is [2, 3), but spans tile the response, so that it must start at 1"),
        (SPANS, span(1, stop=1), "field 'spans[1]' is [1, 1), but spans tile the response"),
        (SPANS, span(0, step=1), "field 'spans[1]' (documents) is of step 0, but a span before it is of step 1"),
        (SPANS, span(0, step=ABSENT), "(documents) is of step 0, but there is no query of that step before it"),
        (SPANS, span(0, kind="documents"), "there is no query of that step before it"),
        (SPANS, span(2, kind="query", step=0), "(query) is of step 0, but the documents of that step came before"),
    ],
)  # fmt: skip
def test_what_no_schema_can_say_is_named(record, changes, message):
    line = changed(record, changes)
    VALIDATOR.validate(line)
    with pytest.raises(ValueError) as error:
        parse(json.dumps(line))
    assert str(error.value).startswith("log:2: rollout 'r': ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "r", "gold": "\xff"}', "log:2: not UTF-8: invalid start byte at byte 21"),
        (b"\xef\xbb\xbf{}", "log:2: not JSON: "),  # a byte order mark opens a file, not a line
        ("\u00a0", "log:2: not JSON: "),
        ('{"id": "r",', "log:2: not JSON: "),
        ("[1]", "log:2: expected a JSON object, got list"),
        ("[" * 100_000, "log:2: not JSON: "),
        ('{"id": "r", "gold": "a", "id": "s"}', "log:2: not JSON: field 'id' is there twice"),
        ('{"id": "r", "meta": {"a": 1, "a": 2}}', "log:2: not JSON: field 'a' is there twice"),
        ('{"id": "r", "meta": {"a": NaN}}', "log:2: not JSON: NaN is no JSON number"),
        ('{"id": "r", "meta": {"a": -Infinity}}', "log:2: not JSON: -Infinity is no JSON number"),
        ('{"id": "r", "meta": {"a": 1e999}}', "log:2: not JSON: 1e999 is too large"),
        ('{"id": "r", "prompt": "\\uD83d", "gold": "a"}', "log:2: field 'prompt' holds a lone surrogate"),
    ],
)
def test_lines_that_are_no_json(line, message):
    with pytest.raises(ValueError) as error:
        parse(line)
    assert str(error.value).startswith(message)


def test_a_surrogate_pair_is_a_character():
    assert parse(json.dumps(TEXT | {"id": "😀"})).id == "😀"


def test_neighbours_of_one_kind_and_step_are_one_span():
    spans = [
        {"kind": "query", "start": 0, "stop": 1, "step": 0},
        {"kind": "documents", "start": 1, "stop": 2, "step": 0},
        {"kind": "documents", "start": 2, "stop": 3, "step": 0},
        {"kind": "documents", "start": 3, "stop": 4},
    ]
    assert parse(json.dumps(SPANS | {"spans": spans})).spans == [
        Span(SpanKind.QUERY, 0, 1, 0), Span(SpanKind.DOCUMENTS, 1, 3, 0), Span(SpanKind.DOCUMENTS, 3, 4)
    ]  # fmt: skip


def test_lines_end_with_a_newline_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    odd = TEXT | {"id": "a\u2028b\x85", "meta": {"text": "\u2029\x0c"}}
    lines = ["\ufeff", json.dumps(odd, ensure_ascii=False), " \t", json.dumps(TEXT, ensure_ascii=False)]
    path.write_bytes("\r\n".join(lines).encode())
    log = check_log(path, quiet())
    assert (log.rollouts, log.blank_lines) == (2, 2)
    read = [read_line(line, path, number) for number, line in numbered_lines(path) if number % 2 == 0]
    assert [(one.id, one.line) for one in read] == [("a\u2028b\x85", 2), ("r", 4)]


def test_repeated_ids_and_empty_logs_are_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(TEXT)}\n\n{json.dumps(MASK)}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:3: rollout 'r': field 'id' repeats that of line 1$"):
        check_log(path, quiet())
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"log\.jsonl: the file has no rollouts"):
        check_log(path, quiet())


def test_the_schemas_name_what_the_code_knows():
    assert {*RULES, *ITEMS} == SCHEMA["properties"].keys()
    assert tuple(SCHEMA["$defs"]["span"]["properties"]["kind"]["enum"]) == KINDS
    steps = json.loads(schema_text("gains"))["properties"]["steps"]["items"]
    assert steps["properties"]["unscored"]["enum"] == [None, *REASONS]


def test_the_examples_of_the_documentation_are_read():
    text = (Path(__file__).parents[1] / "docs" / "score.md").read_text(encoding="utf-8")
    examples = [line for line in text.splitlines() if line.startswith('{"id": "r') and '"line"' not in line]
    assert len(examples) == 3
    for line in examples:
        VALIDATOR.validate(json.loads(line))
        parse(line)
