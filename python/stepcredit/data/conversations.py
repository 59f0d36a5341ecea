"""Long conversations and questions about what was said in them, from a JSON Lines file.

One conversation a line:

* `id` (string, unique in the file), `split` ("train", "dev" or "test");
* `messages`, in the order in which they were said, each with `id` (unique in the conversation), `speaker`, `text`
  (strings, not empty);
* `questions`, each with `id` (unique in the file), `question`, `answers` (gold answer and its aliases: a list of
  strings, at least one, none empty), `evidence` (ids of the messages that hold the answer, at least one), and
  optionally `options` (the answers to choose from: two to 26 different ones, exactly one of them a gold answer) and
  `type` (a label);
* optionally `facts`, what holds of the user at the end: each with `topic`, `value`, and optionally `outdated` (values
  that it had before) and `evidence`. The default judge of profiles needs them. A profile states a fact by naming its
  value and none of its outdated ones, so that facts that no profile could state together are refused: a value without a
  word, as texts are compared ("the"), and an outdated value that stands in its own or in another fact's value ("tea" in
  "green tea").

Other fields are ignored. Every error names the file, the line, the conversation and the field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepcredit.data import Dataset
from stepcredit.data.jsonl import SPLITS, _check_new, _field, _hash, _records, _split, _text, _texts
from stepcredit.retrieval import Passage
from stepcredit.rewards import normalize_answer, states
from stepcredit.rollout import Question

MAX_OPTIONS = 26  # they are lettered


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody said. `id` is unique in a data set: that of the conversation, a slash, that of the message."""

    id: str
    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class Fact:
    """What holds of the user at the end of a conversation.

    Attributes:
        topic: what it is about, e.g. "drink".
        value: what holds now.
        outdated: values that it had before, the first one first.
        evidence: ids of the messages about it, those of outdated values included.
    """

    topic: str
    value: str
    outdated: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the order in which they were said, and what they tell of the user (may be unknown: ())."""

    id: str
    messages: tuple[Message, ...]
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryQuestion(Question):
    """A question about a conversation; `supporting` are the ids of the messages that hold the answer.

    Attributes:
        conversation: what it is about.
        options: the answers to choose from; () where the answer is free.
    """

    conversation: Conversation = field(default=Conversation("", ()), repr=False, compare=False)
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Question.__post_init__(self)
        known = {message.id for message in self.conversation.messages}
        missing = [name for name in self.supporting if name not in known]
        if missing or not self.supporting:
            raise ValueError(
                f"question {self.id!r}: evidence must name messages of conversation {self.conversation.id!r}, got "
                f"{missing[0] if missing else 'none'!r}"
            )
        if self.options:
            self._check_options()

    def _check_options(self) -> None:
        names = [normalize_answer(option) for option in self.options]
        gold = {normalize_answer(answer) for answer in self.answers}
        if not 2 <= len(names) <= MAX_OPTIONS or len(set(names)) < len(names) or not all(names):
            raise ValueError(
                f"question {self.id!r}: options must be 2 to {MAX_OPTIONS} different answers, got {self.options!r}"
            )
        if sum(name in gold for name in names) != 1:
            raise ValueError(
                f"question {self.id!r}: options must hold exactly one gold answer of {self.answers!r}, got "
                f"{self.options!r}"
            )


def load_conversations(path: str | Path) -> Dataset:
    """Read conversations and the questions about them: a data set of `MemoryQuestion`s whose passages are all messages.

    Each split is in an order that a hash of the ids fixes, so that a prefix of it is a fair sample.

    Raises:
        ValueError: a bad line; file, line, conversation and field are named.
        FileNotFoundError: no such file.
    """
    first_line: dict[str, int] = {}
    asked: dict[str, int] = {}
    conversations: list[Conversation] = []
    splits: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for line, record in _records(path):
        where = f"{path}:{line}"
        identity = _text(record, "id", where)
        _check_new(identity, line, first_line, where)
        where = f"{where}: conversation {identity!r}"
        split = _split(record, where)
        ids, messages = _messages(record, identity, where)
        facts = _facts(record, ids, where)
        conversations.append(Conversation(identity, messages, facts))
        for place, entry in _objects(record, "questions", where):
            question = _question(entry, conversations[-1], ids, place)
            _check_new(question.id, line, asked, place)
            splits[split].append(question)
    if not asked:
        raise ValueError(f"{path}: the file has no questions")
    for questions in splits.values():
        questions.sort(key=lambda question: (_hash(question.id), question.id))
    return as_dataset(Path(path).stem, conversations, splits)


def as_dataset(
    name: str, conversations: Sequence[Conversation], splits: Mapping[str, list[Question]], attribution: str = ""
) -> Dataset:
    """A data set of conversations; every message is a passage, under its speaker's name."""
    passages = [Passage(m.id, m.speaker, m.text) for c in conversations for m in c.messages]
    return Dataset(
        name=name,
        passages=passages,
        train=splits["train"],
        dev=splits["dev"],
        test=splits["test"],
        attribution=attribution,
        counts={"conversations": len(conversations)},
    )


def _messages(record: Mapping[str, Any], conversation: str, where: str) -> tuple[dict[str, str], tuple[Message, ...]]:
    """The messages, and the ids of the data set by those of the file."""
    ids: dict[str, str] = {}
    messages = []
    for place, entry in _objects(record, "messages", where):
        name = _text(entry, "id", place)
        if name in ids:
            raise ValueError(f"{place}: field 'id' repeats {name!r}")
        ids[name] = f"{conversation}/{name}"
        messages.append(Message(ids[name], _text(entry, "speaker", place), _text(entry, "text", place)))
    if not messages:
        raise ValueError(f"{where}: field 'messages' is empty")
    return ids, tuple(messages)


def _facts(record: Mapping[str, Any], ids: Mapping[str, str], where: str) -> tuple[Fact, ...]:
    """The facts, which a profile can state all together."""
    facts: dict[str, Fact] = {}
    for place, entry in _objects(record, "facts", where) if "facts" in record else ():
        facts[place] = Fact(
            topic=_text(entry, "topic", place),
            value=_text(entry, "value", place),
            outdated=_texts(entry, "outdated", place) if "outdated" in entry else (),
            evidence=_evidence(entry, ids, place) if "evidence" in entry else (),
        )
        if not normalize_answer(value := facts[place].value):
            raise ValueError(f"{place}: field 'value' has no word that is compared, got {value!r}")
    for place, fact in facts.items():
        for old in fact.outdated:
            for other in facts.values():
                if states(other.value, old):
                    raise ValueError(
                        f"{place}: field 'outdated': {old!r} stands in the value {other.value!r} of topic "
                        f"{other.topic!r}, so that no profile can state both facts"
                    )
    return tuple(facts.values())


def _question(entry: Mapping[str, Any], conversation: Conversation, ids: Mapping[str, str], place: str) -> Question:
    name = _text(entry, "id", place)
    where = f"{place}: question {name!r}"
    answers = _texts(entry, "answers", where)
    if not answers:
        raise ValueError(f"{where} has no gold answers: field 'answers' is empty")
    evidence = _evidence(entry, ids, where)
    if not evidence:
        raise ValueError(f"{where}: field 'evidence' is empty")
    text = _text(entry, "question", where)
    kind = _text(entry, "type", where, may_be_empty=True) if "type" in entry else ""
    options = _texts(entry, "options", where) if "options" in entry else ()
    try:
        return MemoryQuestion(name, text, answers, evidence, kind=kind, conversation=conversation, options=options)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None  # which names the question, and what is wrong with it


def _evidence(entry: Mapping[str, Any], ids: Mapping[str, str], where: str) -> tuple[str, ...]:
    names = _texts(entry, "evidence", where)
    missing = [name for name in names if name not in ids]
    if missing:
        raise ValueError(f"{where}: field 'evidence': {missing[0]!r} is no message of the conversation")
    return tuple(ids[name] for name in names)


def _objects(record: Mapping[str, Any], name: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of each entry of a list of objects."""
    entries = _field(record, name, where)
    if not isinstance(entries, list):
        raise ValueError(f"{where}: field {name!r} must be a list of objects, got {entries!r}")
    for number, entry in enumerate(entries):
        place = f"{where}: {name}[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(entry).__name__}")
        yield place, entry
