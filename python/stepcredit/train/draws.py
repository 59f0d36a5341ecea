"""What is drawn for a step: functions of the run's seed and the step's number alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

from stepcredit.rollout import Question


def questions_of_step(questions: Sequence[Question], count: int, seed: int, step: int) -> list[Question]:
    """The `count` questions of one step: consecutive ones of a shuffled order that is new in every epoch."""
    chosen: list[Question] = []
    for position in range(step * count, (step + 1) * count):
        epoch, at = divmod(position, len(questions))
        if not chosen or at == 0:
            order = random.Random(f"{seed}/questions/{epoch}").sample(range(len(questions)), len(questions))
        chosen.append(questions[order[at]])
    return chosen


def derive_seed(seed: int, *purpose: str | int) -> int:
    """An independent seed for one purpose: a function of the arguments alone, in [0, 2**31)."""
    return random.Random("/".join(map(str, (seed, *purpose)))).getrandbits(31)
