"""A turn, which is the policy's text since the environment last spoke, and how its tags cut it into pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stepcredit._queries import Queries, cut_queries
from stepcredit.rollout import SpanKind

Action = Literal["search", "ask", "answer", "invalid"]

#: What stands inside an action's tags.
_INSIDE = {"search": SpanKind.QUERY, "ask": SpanKind.ASK, "answer": SpanKind.ANSWER}


@dataclass(frozen=True, slots=True)
class Piece:
    """Characters `[start, stop)` of a turn's text and the kind of span they are."""

    kind: SpanKind
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One parsed turn.

    Attributes:
        action: "search" ("ask" in a grammar that asks) or "answer" when the turn holds a well-formed one, else
            "invalid".
        content: the query, question or answer, stripped; "" for an invalid turn, and where that is empty.
        pieces: consecutive non-empty pieces that tile the turn's text.
        forged_tags: number of environment tags that the policy wrote.
        queries: of a search in a grammar with several queries a search, those to execute, in order, no two the same;
            () everywhere else.
        repeated_queries: queries left out of `queries` as they repeat an earlier one (but for case and white space).
        dropped_queries: queries left out of `queries` as they are beyond the grammar's `max_queries`.
    """

    action: Action
    content: str
    pieces: tuple[Piece, ...]
    forged_tags: int = 0
    queries: tuple[str, ...] = ()
    repeated_queries: int = 0
    dropped_queries: int = 0

    @property
    def query(self) -> str:
        """What a search asks for: its queries one a line, or its content in a grammar with one query a search."""
        return "\n".join(self.queries) or self.content


class Tag(NamedTuple):
    """Characters `[start, stop)` of a turn's text that are a tag of the policy: whether it closes, and its name."""

    start: int
    stop: int
    closing: bool
    name: str


def cut_turn(
    text: str,
    tags: Sequence[Tag],
    *,
    inquiry: Literal["search", "ask"],
    restating: Mapping[str, SpanKind],
    max_queries: int | None,
    forged_tags: int,
    forced_answer: bool,
) -> Turn:
    """The turn of a text in which a grammar found its tags, by the rules of `Protocol.parse_turn`.

    Args:
        text: the decoded turn.
        tags: the policy's, in order.
        inquiry, restating: as in `Protocol`.
        max_queries: queries executed per search; None where a search is one query.
        forged_tags: number of environment tags in the text.
        forced_answer: the environment opened the answer.
    """
    if forced_answer:
        tags = [tag for tag in tags if tag.name == "answer"]
    action, content, start, stop = _first_action(text, tags, inquiry, forced_answer)
    several = Queries(end=stop)
    if action == "search" and max_queries is not None:
        several = cut_queries(text, start, stop, max_queries)
        content = content if several.queries else ""
    inside = SpanKind.THINK if not content else _INSIDE.get(action, SpanKind.THINK)

    outside = SpanKind.ANSWER if forced_answer and action == "invalid" else SpanKind.THINK
    kind = outside
    pieces: list[Piece] = []
    at = 0
    for tag in tags:
        if start <= tag.start < stop:
            continue
        if at < tag.start:
            if at == start:
                pieces.append(Piece(inside, at, min(tag.start, several.end)))
                at = min(tag.start, several.end)
            if at < tag.start:
                pieces.append(Piece(kind, at, tag.start))
        pieces.append(Piece(SpanKind.TAG, tag.start, tag.stop))
        at = tag.stop
        if tag.name != "think":
            kind = outside if tag.closing else restating.get(tag.name, outside)
    if at < len(text):
        pieces.append(Piece(kind, at, len(text)))
    return Turn(action, content, tuple(pieces), forged_tags, several.queries, several.repeated, several.dropped)


def _first_action(
    text: str, tags: Sequence[Tag], inquiry: Literal["search", "ask"], forced_answer: bool
) -> tuple[Action, str, int, int]:
    """The first well-formed action, its stripped text, and where that begins and ends; -1 and -1 of an invalid turn."""
    opener: Tag | None = Tag(0, 0, False, "answer") if forced_answer else None
    for tag in tags:
        if tag.name not in (inquiry, "answer"):
            continue
        if not tag.closing:
            opener = tag
        elif opener is None or opener.name != tag.name:
            opener = None
        else:
            content = text[opener.stop : tag.start].strip()
            return "answer" if tag.name == "answer" else inquiry, content, opener.stop, tag.start
    return "invalid", "", -1, -1
