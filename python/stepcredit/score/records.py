"""The lines of a log: read, checked against `schemas/rollout.schema.json`, and named in every error.

Beyond what the schema can say: lines are UTF-8 and hold no field twice, ids are unique, a mask is as long as its
response, and spans tile it (`stepcredit.score.spans`).
"""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from stepcredit._names import nearest
from stepcredit.rollout import Span
from stepcredit.score.spans import is_integer, read_spans
from stepcredit.train.progress import Reporter

TEXT = ("prompt", "response")
TOKENS = ("prompt_ids", "response_ids")
#: How a rollout in tokens tells who wrote them.
AUTHORS = ("policy_mask", "spans")
#: Fields that the output repeats.
PASSED = ("group", "meta")


@dataclass(frozen=True, slots=True)
class Record:
    """One rollout of a log, as its line holds it.

    Attributes:
        where: "FILE:LINE: rollout ID", for errors.
        line: number in the file, from 1.
        id, question_id: of the rollout and of its question, None where the line has none.
        golds: gold answers, at least one.
        prompt, response: texts, or token ids.
        policy_mask: of a rollout in tokens, which of `response` the policy wrote; or
        spans: what they are, tiling `response`.
        passed: the fields that the output repeats.
    """

    where: str
    line: int
    id: str
    question_id: str | None
    golds: tuple[str, ...]
    prompt: str | list[int]
    response: str | list[int]
    policy_mask: list[bool] | None
    spans: list[Span] | None
    passed: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Log:
    """A log whose every line was checked: how many rollouts and blank lines it has, and the hash of its bytes."""

    path: Path
    rollouts: int
    blank_lines: int
    sha256: str


def check_log(path: Path, reporter: Reporter) -> Log:
    """Read a log once, before anything is scored.

    Raises:
        ValueError: a line is no rollout, or there is none; names file, line, rollout and field.
        OSError: the file cannot be read, or is a pipe, which could not be read again.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not path.is_file():
        raise OSError(f"{path} is no regular file; a log is read twice, before scoring and for it")
    first_line: dict[str, int] = {}
    digest, blank, waiting = sha256(), 0, 0
    with reporter.task("checking bytes", path.stat().st_size) as advance:
        for number, line in numbered_lines(path):
            digest.update(line)
            waiting += len(line)
            if waiting > 1 << 20:  # a bar takes longer to move than a short line to check
                advance(waiting)
                waiting = 0
            if is_blank(line, number):
                blank += 1
                continue
            record = read_line(line, path, number)
            if first_line.setdefault(record.id, number) != number:
                raise ValueError(f"{record.where}: field 'id' repeats that of line {first_line[record.id]}")
        advance(waiting)
    if not first_line:
        raise ValueError(f"{path}: the file has no rollouts")
    return Log(path, len(first_line), blank, digest.hexdigest())


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of every line, its end included. Only a newline ends a line: JSON may hold other
    separators of Unicode."""
    with open(path, "rb") as lines:
        yield from enumerate(lines, start=1)


def is_blank(line: bytes, number: int) -> bool:
    """Whether a line holds nothing but white space, and, as a file may begin, a byte order mark."""
    return not (line.removeprefix(BOM_UTF8) if number == 1 else line).strip()


def read_line(line: bytes, path: Path, number: int) -> Record:
    """The rollout of a line that is not blank. ValueError names file, line, rollout and field."""
    where = f"{path}:{number}"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    fields = _parse(text, where)
    if "id" in fields:
        _check("id", fields["id"], where)
        where = f"{where}: rollout {fields['id']!r}"
    for name, value in fields.items():
        if name not in RULES and name not in ITEMS:
            hint = nearest(name, [*RULES, *ITEMS]) or "; what is to be passed through goes into meta"
            raise ValueError(f"{where}: unknown field {name!r}{hint}")
        _check(name, value, where)
    _check_form(fields, where)
    tokens = TOKENS[0] in fields
    prompt, response = (list(map(int, fields[n])) if tokens else fields[n] for n in (TOKENS if tokens else TEXT))
    mask = fields.get("policy_mask")
    if mask is not None and len(mask) != len(response):
        raise ValueError(f"{where}: field 'policy_mask' has {len(mask)} entries for {len(response)} response_ids")
    return Record(
        where=where,
        line=number,
        id=fields["id"],
        question_id=fields.get("question_id"),
        golds=tuple(fields["golds"]) if "golds" in fields else (fields["gold"],),
        prompt=prompt,
        response=response,
        policy_mask=None if mask is None else list(map(bool, mask)),
        spans=read_spans(fields["spans"], len(response), where) if "spans" in fields else None,
        passed={name: fields[name] for name in PASSED if name in fields},
    )


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    if "\\ud" in text.lower():  # may be half of a pair, which no UTF-8 can hold
        for name, value in fields.items():
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: field {name!r} holds a lone surrogate: {error.reason}") from error
    return fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return fields


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_token(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


_Rule = tuple[str, Callable[[Any], bool]]
_TEXT: _Rule = ("a string that is not blank", _is_text)
_TOKEN: _Rule = ("a token id (an integer from 0)", _is_token)

#: What the value of a field must be.
RULES: dict[str, _Rule] = {
    "id": _TEXT,
    "question_id": _TEXT,
    "gold": _TEXT,
    "prompt": _TEXT,
    "response": ("a string", lambda value: isinstance(value, str)),
    "group": ("an integer", is_integer),
    "meta": ("an object", lambda value: isinstance(value, dict)),
}
#: Of fields that are lists: the least number of items, and what each must be.
ITEMS: dict[str, tuple[int, _Rule]] = {
    "golds": (1, _TEXT),
    "prompt_ids": (1, _TOKEN),
    "response_ids": (0, _TOKEN),
    "policy_mask": (0, ("0 or 1, or a boolean", _is_flag)),
    "spans": (0, ("an object", lambda value: isinstance(value, dict))),
}


def _check(name: str, value: Any, where: str) -> None:
    least, (rule, good) = ITEMS[name] if name in ITEMS else (0, RULES[name])
    if name in RULES:
        if not good(value):
            raise ValueError(f"{where}: field {name!r} must be {rule}, got {value!r:.200}")
        return
    if not isinstance(value, list) or len(value) < least:
        many = " that is not empty" if least else ""
        raise ValueError(f"{where}: field {name!r} must be a list{many}, got {value!r:.200}")
    for i, item in enumerate(value):
        if not good(item):
            raise ValueError(f"{where}: field '{name}[{i}]' must be {rule}, got {item!r:.200}")


def _check_form(fields: dict[str, Any], where: str) -> None:
    """Which fields must be there, and which exclude each other."""
    text = [name for name in TEXT if name in fields]
    tokens = [name for name in (*TOKENS, *AUTHORS) if name in fields]
    for pair in (("gold", "golds"), AUTHORS, (*text[:1], *tokens[:1])):
        if len(pair) == 2 and all(name in fields for name in pair):
            raise ValueError(f"{where}: fields {pair[0]!r} and {pair[1]!r} exclude each other")
    needed = ["id", "golds" if "gold" not in fields else "gold", *(TOKENS if tokens else TEXT)]
    if tokens:
        needed.append("spans" if "spans" in fields else "policy_mask")
    for name in needed:
        if name not in fields:
            other = {"golds": " (or 'gold')", "policy_mask": " (or 'spans')"}.get(name, "")
            if name == "prompt" and not text:
                other = " (or 'prompt_ids', of a rollout in tokens)"
            raise ValueError(f"{where}: field {name!r}{other} is missing; the line has {', '.join(fields) or 'none'}")
