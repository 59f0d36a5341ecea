"""The configuration of self-play, as in `config.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepcredit._validate import at_least, choices, require
from stepcredit.rewards import Difficulty


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfPlayConfig:
    """Self-play: an examiner, which is the policy in another role, writes the questions. No training question is read.

    An iteration is `examiner_steps` and then `student_steps`, all of them GRPO steps of the run; `steps` of these are
    made. All numbers are ours but that the paper makes three iterations.

    Attributes:
        examiner_steps: steps of the examiner per iteration; 0: no self-play, questions are the data set's.
        student_steps: steps of the student per iteration, on the questions that were accepted in it.
        seeds: passages per examiner step from which walks begin.
        walks: walks per seed passage, a group.
        max_searches: executed searches per walk; then the question is opened.
        attempts: rollouts of the student per accepted question, to see how hard it is.
        difficulty: what an accepted question earns when k of n attempts are right: "medium" is 4 k (n - k) / n^2 and
            "hard" (n - k) / (n - 1), both 0 for k = 0 and k = n. The paper pays medium difficulty most, by a formula
            that is not known.
        format: what an accepted question earns beside that. One that is rejected earns 0.
    """

    examiner_steps: int = 0
    student_steps: int = 4
    seeds: int = 4
    walks: int = 4
    max_searches: int = 2
    attempts: int = 4
    difficulty: Difficulty = "medium"
    format: float = 0.1

    def __post_init__(self) -> None:
        choices(self, "self_play.")
        at_least(self, "self_play.", examiner_steps=0, student_steps=1, seeds=1, walks=1, max_searches=1, attempts=2)
        require(math.isfinite(self.format), "self_play.format", "finite", self.format)

    @property
    def enabled(self) -> bool:
        """Whether there is self-play."""
        return self.examiner_steps > 0

    def place(self, step: int) -> tuple[int, int]:
        """The iteration of a GRPO step, and its number inside: below `examiner_steps` it is the examiner's."""
        return divmod(step, self.examiner_steps + self.student_steps)
