"""Questions and passages from JSON Lines files, or from Hub data sets with the same fields (`data.hub`).

A line of the corpus: `id`, `title`, `text` (strings; id and text not empty).

A line of the questions: `id`, `question` (strings, not empty), `answers` (gold answer and its aliases: a list of
strings, at least one, none empty), `split` ("train", "dev" or "test"); optional: `supporting` (ids of the passages that
together support the answer, in reading order), `dataset` and `type` (labels). Other fields are ignored. Ids are unique
per file, and every supporting id must be in the corpus: otherwise recall could not be measured. Every error names the
file, the line and the field.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepcredit.data import Dataset
from stepcredit.data.hub import PREFIX, hub_records
from stepcredit.retrieval import Passage
from stepcredit.retrieval.store import PassageStore
from stepcredit.rollout import Question

SPLITS = ("train", "dev", "test")
_LICENCES = {
    "hotpotqa": "HotpotQA CC BY-SA 4.0",
    "2wiki": "2WikiMultiHopQA Apache-2.0",
    "musique": "MuSiQue CC BY 4.0",
    "squad": "SQuAD CC BY-SA 4.0",
}


def load_jsonl(questions: str | Path, corpus: str | Path, *, datasets: Collection[str] = ()) -> Dataset:
    """Read a corpus and the questions asked over it.

    Each split is in an order that a hash of the ids fixes, so a prefix of it is a fair sample whatever the order of the
    file. When the file has no "test" questions, half of its "dev" questions, chosen by that hash, become the test
    split: settings are tuned on one half and reported on the other.

    Args:
        questions, corpus: files in the format above, or "hub:OWNER/NAME". The corpus may also be an index directory:
            its passages stay on disk, and are read once if questions have supporting passages.
        datasets: keep only questions whose `dataset` is one of these; empty keeps all. What it leaves out is counted
            in `counts["other_dataset"]`.

    Raises:
        ValueError: a bad line (file and line named), or nothing left to ask.
        FileNotFoundError: no such file, or a directory that holds no index.
    """
    passages: Sequence[Passage]
    if Path(corpus).is_dir():
        passages = PassageStore(corpus)
        wanted = {name for _, record in _records(questions) for name in _supporting_ids(record)}
        titles = {p.id: p.title for p in passages if p.id in wanted} if wanted else {}
    else:
        passages = load_corpus(corpus)
        titles = {p.id: p.title for p in passages}
    splits, others = load_questions(questions, titles, datasets=datasets)
    moved = 0
    if not splits["test"]:
        held_out = splits["dev"]
        splits["dev"] = [question for question in held_out if _hash(question.id) % 2 == 0]
        splits["test"] = [question for question in held_out if _hash(question.id) % 2 == 1]
        moved = len(splits["test"])
    names = sorted({question.kind.split("/")[0] for split in splits.values() for question in split} & _LICENCES.keys())
    return Dataset(
        name=Path(questions).stem,
        passages=passages,
        train=splits["train"],
        dev=splits["dev"],
        test=splits["test"],
        attribution="; ".join(_LICENCES[name] for name in names),
        counts={"other_dataset": others, "dev_moved_to_test": moved},
    )


def load_corpus(path: str | Path) -> list[Passage]:
    """The passages of a corpus file, in file order. ValueError names file, line and field of a bad line."""
    first_line: dict[str, int] = {}
    passages = []
    for line, record in _records(path):
        where = f"{path}:{line}"
        passage = Passage(
            id=_text(record, "id", where),
            title=_text(record, "title", where, may_be_empty=True),
            text=_text(record, "text", where),
        )
        _check_new(passage.id, line, first_line, where)
        passages.append(passage)
    if not passages:
        raise ValueError(f"{path}: the corpus has no passages")
    return passages


def load_questions(
    path: str | Path, titles: Mapping[str, str], *, datasets: Collection[str] = ()
) -> tuple[dict[str, list[Question]], int]:
    """The questions of a file by split, each split ordered by a hash of the ids; and how many `datasets` left out.

    Args:
        path: file in the format above.
        titles: title of every passage of the corpus that a question may be supported by, by id. The titles of the
            supporting passages, in order and without repetition, become a question's `plan`.
        datasets: as for `load_jsonl`.

    A question's `kind` is "dataset/type", or whichever of the two is there.
    """
    first_line: dict[str, int] = {}
    splits: dict[str, list[Question]] = {split: [] for split in SPLITS}
    seen: Counter[str] = Counter()
    for line, record in _records(path):
        where = f"{path}:{line}"
        identity = _text(record, "id", where)
        _check_new(identity, line, first_line, where)
        where = f"{where}: question {identity!r}"
        split = _split(record, where)
        answers = _texts(record, "answers", where)
        if not answers:
            raise ValueError(f"{where} has no gold answers: field 'answers' is empty")
        supporting = _texts(record, "supporting", where) if "supporting" in record else ()
        missing = [passage for passage in supporting if passage not in titles]
        if missing:
            raise ValueError(f"{where}: supporting passage {missing[0]!r} is not in the corpus")
        dataset, kind = (
            _text(record, label, where, may_be_empty=True) if label in record else "" for label in ("dataset", "type")
        )
        question = Question(
            id=identity,
            text=_text(record, "question", where),
            answers=answers,
            supporting=supporting,
            plan=tuple(dict.fromkeys(title for p in supporting if (title := titles[p].strip()))),
            kind="/".join(filter(None, (dataset, kind))),
        )
        seen[dataset] += 1
        if not datasets or dataset in datasets:
            splits[split].append(question)
    if not seen:
        raise ValueError(f"{path}: the file has no questions")
    unknown = [name for name in datasets if name not in seen]
    if unknown:
        raise ValueError(f"datasets: {path} has no questions of {unknown[0]!r}; it has {', '.join(sorted(seen))}")
    for questions in splits.values():
        questions.sort(key=lambda question: (_hash(question.id), question.id))
    return splits, seen.total() - sum(map(len, splits.values()))


def _records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank, or of every row of a Hub data set."""
    if str(path).startswith(PREFIX):
        yield from hub_records(str(path))
        return
    with open(path, "rb") as lines:  # so that a line that is not UTF-8 is named like any other bad line
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
            yield number, record


def _supporting_ids(record: Mapping[str, Any]) -> list[str]:
    """What a question that is not checked yet says of its supporting passages."""
    named = record.get("supporting")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _field(record: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing; the line has {', '.join(record) or 'no fields'}")
    return record[name]


def _text(record: Mapping[str, Any], name: str, where: str, *, may_be_empty: bool = False) -> str:
    value = _field(record, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} must be a string, got {value!r}")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{where}: field {name!r} is empty")
    return value


def _texts(record: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = _field(record, name, where)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where}: field {name!r} must be a list of strings, got {value!r}")
    if not all(item.strip() for item in value):
        raise ValueError(f"{where}: field {name!r} holds an empty string: {value!r}")
    return tuple(value)


def _split(record: dict[str, Any], where: str) -> str:
    split = _text(record, "split", where)
    if split not in SPLITS:
        raise ValueError(f"{where}: field 'split' is {split!r}, expected one of {', '.join(SPLITS)}")
    return split


def _check_new(identity: str, line: int, first_line: dict[str, int], where: str) -> None:
    if identity in first_line:
        raise ValueError(f"{where}: field 'id' repeats {identity!r} of line {first_line[identity]}")
    first_line[identity] = line


def _hash(identity: str) -> int:
    return zlib.crc32(identity.encode())
