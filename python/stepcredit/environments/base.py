"""What engines, the warm start and the trainer ask of an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from stepcredit.protocol import Protocol as Grammar
from stepcredit.protocol import Turn
from stepcredit.rollout import Question, Search

if TYPE_CHECKING:
    from stepcredit.environments.search import Response


class Limits(Protocol):
    """How an environment treats faults: `max_invalid` are answered with a notice, then the answer is forced, or the
    rollout ends where it may not be."""

    max_invalid: int
    force_answer: bool


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
        questions: Sequence[Question],
    ) -> list[Response]:
        """Reply to one turn of each active rollout.

        Args:
            turns: N parsed turns.
            searches: N lists of the searches, or questions to a user, executed so far.
            faults: N numbers of faults so far.
            forced: N flags, whether this turn followed a forced answer opener.
            questions: the N questions that the rollouts are about.

        Returns:
            N responses, in order.
        """
        ...
