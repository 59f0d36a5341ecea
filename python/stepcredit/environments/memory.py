"""A memory pipeline of three agents over a long conversation: what each is shown, how each writes, what answers it.

* The *extraction* agent reads the conversation and writes between `<memory>` tags which messages are worth keeping, one
  a line: the message's number in brackets and a short text. This is the fine memory.
* The *profile* agent reads the fine memory and writes what it tells of the user between `<profile>` tags: the coarse
  memory.
* The *retrieval* agent reads the question and the profile, searches the fine memory, and answers, all in one rollout in
  the grammar `search_r1`.

The roles are those of CoMAM (arXiv 2603.12631); tags, wording and the line format are ours. What one agent wrote stands
in the prompt of the next, where no token of it has a gradient. Messages and what agents write are untrusted: tags in
them are escaped, and each is one line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from stepcredit._validate import one_length, require
from stepcredit.data.conversations import Conversation, MemoryQuestion
from stepcredit.environments.base import Response
from stepcredit.environments.search import SearchEnvironment
from stepcredit.protocol import Protocol, escape_tags, tag_patterns
from stepcredit.retrieval import Hits, Passage, ragged_hits
from stepcredit.rollout import Episode, Question, Search, SpanKind
from stepcredit.turn import Piece, Turn

#: The agents in the order in which they act.
AGENTS = ("extraction", "profile", "retrieval")


@dataclass(frozen=True, slots=True)
class AgentTask(Question):
    """What one agent of the pipeline has to do for a question.

    Attributes:
        shown: the text of its prompt.
        memory: what it can search: entries of the fine memory.
    """

    shown: str = ""
    memory: tuple[Passage, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading(Protocol):
    """The grammar of the retrieval agent: `search_r1` with a prompt of its own."""

    name: str = "memory_retrieval"
    documents_tag: str = "information"
    refine_tag: str | None = None
    instruction: str = field(default="", repr=False)

    def shown_question(self, question: Question) -> str:
        """The prompt's text; ValueError for a question that is no `AgentTask`."""
        return _shown(question)


@dataclass(frozen=True, slots=True)
class Writing(Reading):
    """The grammar of an agent that writes one text between tags and is done. The text is its answer: ANSWER tokens,
    `Rollout.answer`.

    Attributes:
        tag: the tag around the text.
    """

    tag: str = "memory"

    @property
    def answer_tag(self) -> str:
        """The agent's tag."""
        return self.tag

    def parse_turn(self, text: str, forced_answer: bool = False) -> Turn:
        """The text strictly between the first closing tag that has an opener before it, be it the forced one, and the
        opener nearest before it; without such a pair the turn is invalid. What stands around it is THINK."""
        opener: int | None = 0 if forced_answer else None
        pieces: list[Piece] = []
        at, found = 0, None
        for tag in self._tags(text):
            if at < tag.start():
                pieces.append(Piece(SpanKind.THINK, at, tag.start()))
            if tag[1] and opener is not None and found is None:
                found = (opener, tag.start())
            elif not tag[1] and found is None:
                opener = tag.end()
            pieces.append(Piece(SpanKind.TAG, tag.start(), tag.end()))
            at = tag.end()
        if at < len(text):
            pieces.append(Piece(SpanKind.THINK, at, len(text)))
        forged = len(tag_patterns(self)[0].findall(text))
        if found is None:
            return Turn("invalid", "", tuple(pieces), forged)
        start, stop = found
        content = text[start:stop].strip()
        inside = SpanKind.ANSWER if content else SpanKind.THINK
        pieces = [Piece(inside, p.start, p.stop) if (p.start, p.stop) == (start, stop) else p for p in pieces]
        return Turn("answer", content, tuple(pieces), forged)

    def closes(self, text: str, forced_answer: bool = False) -> bool:
        """Whether the text holds the closing tag."""
        return any(tag[1] for tag in self._tags(text))

    def _tags(self, text: str) -> list[re.Match[str]]:
        return list(re.finditer(rf"<\s*(?:(/)\s*)?{self.tag}\s*>", text))


_EXTRACTION = """\
Below is a conversation of a user with an assistant, each message with its number. Choose the messages that tell \
something lasting about the user, such as what the user likes or has changed. Write them between <memory> and \
</memory>, one a line: the number of the message in brackets and what it says in a few words, for example \
[12] pet: a parrot. Leave out small talk and what concerns other people."""

_PROFILE = """\
Below are notes from conversations with a user, oldest first, each with a number. Write what holds of the user now \
between <profile> and </profile>, one fact a line, for example pet: a parrot. Where notes disagree, the later one \
holds."""

_RETRIEVAL = """\
Answer the question about a user from the profile below and from notes about the user, which you can search: write \
<search> a few words </search>, and the notes that fit best come back between <information> and </information>, each \
with its number; a higher number is later. Then write the answer, and only it, between <answer> and </answer>: a few \
words, or where there are options one of them."""

#: The agents' grammars by name.
GRAMMARS: dict[str, Protocol] = {
    "extraction": Writing("memory_extraction", instruction=_EXTRACTION, tag="memory"),
    "profile": Writing("memory_profile", instruction=_PROFILE, tag="profile"),
    "retrieval": Reading(instruction=_RETRIEVAL),
}


def extraction_task(question: MemoryQuestion) -> AgentTask:
    """The conversation, each message with its number from 1. The question itself is not shown."""
    return _task(question, conversation_text(question.conversation))


def profile_task(question: MemoryQuestion, memory: Sequence[Passage]) -> AgentTask:
    """The fine memory, in the order of the messages."""
    lines = "\n".join(f"[{entry.title}] {_line(entry.text)}" for entry in memory)
    return _task(question, f"Notes:\n{lines or '(none)'}\n")


def retrieval_task(question: MemoryQuestion, memory: Sequence[Passage], profile: str) -> AgentTask:
    """The profile and the question, with its options; the fine memory can be searched."""
    lines = "\n".join(line for line in map(_line, profile.splitlines()) if line)
    shown = f"Profile:\n{lines or '(none)'}\nQuestion: {_line(question.text)}\n"
    if question.options:
        options = (f"({chr(ord('a') + i)}) {_line(option)}" for i, option in enumerate(question.options))
        shown += f"Options: {' '.join(options)}\n"
    return _task(question, shown, tuple(memory))


def conversation_text(conversation: Conversation) -> str:
    """The messages, one a line, each with its number from 1 and its speaker."""
    lines = (f"[{i}] {_line(m.speaker)}: {_line(m.text)}" for i, m in enumerate(conversation.messages, start=1))
    return "Conversation:\n" + "\n".join(lines) + "\n"


_ENTRY = re.compile(r"\[\s*([0-9]{1,9})\s*\]\s*:?\s*(.*)")


def read_memory(text: str | None, conversation: Conversation) -> tuple[list[Passage], dict[str, int]]:
    """The fine memory that an extraction agent wrote, in the order of the messages.

    A line is `[number] text`; one without a text keeps the message's own words (ours). Empty lines are nothing.

    Returns:
        Entries, each a passage whose id is the message's and whose title its number; and what was left out:
        "malformed_entries" (lines of another form), "unknown_messages" (numbers that no message has) and
        "repeated_messages" (a message that an earlier line kept).
    """
    counts: Counter[str] = Counter()
    kept: dict[int, str] = {}
    for line in filter(None, map(str.strip, (text or "").splitlines())):
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            counts["malformed_entries"] += 1
        elif not 1 <= (number := int(entry[1])) <= len(conversation.messages):
            counts["unknown_messages"] += 1
        elif number in kept:
            counts["repeated_messages"] += 1
        else:
            kept[number] = entry[2].strip()
    entries = []
    for number in sorted(kept):
        message = conversation.messages[number - 1]
        entries.append(Passage(message.id, str(number), kept[number] or _line(message.text)))
    return entries, dict(counts)


class MemoryEnvironment(SearchEnvironment):
    """A `SearchEnvironment` in which every rollout searches the memory of its own `AgentTask`, by BM25.

    A memory that is empty, or without a word that can be indexed, has no passages for any query.

    Args:
        protocol: the tag grammar.
        options: `top_k`, `max_searches`, ... of `SearchEnvironment`; `episodes` may be 1 only.
    """

    def __init__(self, protocol: Protocol, **options: Any) -> None:
        super().__init__(MemoryRetriever(()), protocol, **options)
        require(self.episodes == 1, "episodes", "1 in a memory pipeline", self.episodes)

    def respond(
        self,
        turns: Sequence[Turn],
        searches: Sequence[Sequence[Search]],
        faults: Sequence[int],
        forced: Sequence[bool],
        *,
        episodes: Sequence[Sequence[Episode]] | None = None,
        questions: Sequence[Question] = (),
    ) -> list[Response]:
        """As in `SearchEnvironment`, in rollouts of a single episode; `questions` are the tasks whose memories are
        searched."""
        one_length(turns=turns, searches=searches, faults=faults, forced=forced, questions=questions)
        responses = []
        for turn, searched, fault, opened, task in zip(turns, searches, faults, forced, questions, strict=True):
            if not isinstance(task, AgentTask):
                raise ValueError(f"question {task.id!r} is no task of a memory pipeline: it has no memory to search")
            desk = copy(self)  # nothing of one rollout stays behind for another
            desk.retriever = MemoryRetriever(task.memory)
            responses += SearchEnvironment.respond(desk, [turn], [searched], [fault], [opened])
        return responses


class MemoryRetriever:
    """BM25 over a memory's entries; one that it cannot index finds nothing."""

    def __init__(self, memory: Sequence[Passage]) -> None:
        self.memory = memory

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The `k` best entries of every query."""
        from stepcredit.retrieval.bm25 import BM25Retriever, NoIndexableWord

        try:
            return BM25Retriever(self.memory).search(queries, k) if self.memory else ragged_hits([[]] * len(queries), k)
        except NoIndexableWord:
            return ragged_hits([[]] * len(queries), k)


def writing_environment(protocol: Protocol) -> SearchEnvironment:
    """What answers an agent that writes one text: nothing. A turn without a text in its tags ends the rollout too."""
    return SearchEnvironment(MemoryRetriever(()), protocol, max_searches=0, force_answer=False, max_invalid=0)


def _task(question: MemoryQuestion, shown: str, memory: tuple[Passage, ...] = ()) -> AgentTask:
    return AgentTask(
        id=question.id,
        text=question.text,
        answers=question.answers,
        supporting=question.supporting,
        kind=question.kind,
        shown=shown,
        memory=memory,
    )


def _shown(question: Question) -> str:
    if not isinstance(question, AgentTask):
        raise ValueError(f"question {question.id!r} is no task of a memory pipeline")
    return question.shown


def _line(text: str) -> str:
    return escape_tags(" ".join(text.split()))
