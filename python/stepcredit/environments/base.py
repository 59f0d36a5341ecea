"""What engines, the warm start and the trainer ask of an environment, and what it replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stepcredit.protocol import Protocol as Grammar
from stepcredit.rollout import Episode, Question, Search, SpanKind
from stepcredit.turn import Turn


@dataclass(frozen=True, slots=True)
class Response:
    """The environment's reply to one turn.

    Attributes:
        text: the message, "" when there is none.
        kind: DOCUMENTS (passages, wrapper tags included), REPLY (a user's, likewise) or NOTICE.
        search: the executed search, None when none was.
        forced_answer: an answer opener follows the message, and the next turn is answer text.
        answer: of an answer that ended an episode and not the rollout: its text; another episode begins with the
            message.
        done: the rollout ends here; nothing is appended.
        fault: the turn was a fault (see `SearchEnvironment`).
        counts: what happened, by name: "invalid_turns", "empty_queries", "failed_retrievals", "empty_results",
            "empty_answers", "excess_searches", "forced_answers", "cut_passages" (passages that lost words),
            "skipped_passages" (left out for having been shown before), and of searches with several queries
            "repeated_queries" and "dropped_queries" (see `Turn`), "duplicate_passages" (found by several queries).
        rewards: parts of the reward that the environment measures itself, as they stand after this turn.
    """

    text: str = ""
    kind: SpanKind = SpanKind.NOTICE
    search: Search | None = None
    forced_answer: bool = False
    answer: str | None = None
    done: bool = False
    fault: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """Answers the policy's turns. What it must know of a rollout is in what it is called with: an environment serves
    any number of rollouts at once.

    Attributes:
        protocol: the tag grammar of the turns.
    """

    protocol: Grammar

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
        """Reply to one turn of each active rollout.

        Args:
            turns: N parsed turns.
            searches: N lists of the searches, or questions to a user, executed so far.
            faults: N numbers of faults so far, in the episode under way.
            forced: N flags, whether this turn followed a forced answer opener.
            episodes: N lists of the episodes that are over; None: there are none.
            questions: the N questions that the rollouts are about; an environment that does not look at them needs
                none.

        Returns:
            N responses, in order.
        """
        ...


class Limits(Protocol):
    """How an environment treats faults: `max_invalid` are answered with a notice, then the answer is forced, or the
    rollout ends where it may not be."""

    max_invalid: int
    force_answer: bool


def fault(limits: Limits, name: str, notice: str, faults: int, forced: bool) -> Response:
    """What an environment replies to a fault, counted under `name`, of a rollout that has had some: the notice, or when
    it has had enough of them a forced answer or the end. One after a forced opener is the end."""
    if not forced and faults < limits.max_invalid:
        return Response(notice, fault=True, counts={name: 1})
    if not forced and limits.force_answer:
        return Response("\n", forced_answer=True, fault=True, counts={name: 1, "forced_answers": 1})
    return Response(done=True, fault=True, counts={name: 1})
