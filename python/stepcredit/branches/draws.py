"""Which passages stand in for a step's own: seeded draws that do not depend on the order of the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Literal

import numpy as np

from stepcredit.rollout import Rollout

Pool = Literal["other_questions", "batch"]

#: A search step of a batch: (index of the rollout, number of the step in it).
StepId = tuple[int, int]


def draw_passages(
    rollouts: Sequence[Rollout],
    contexts: Mapping[StepId, tuple[int, ...]],
    passages: Mapping[StepId, tuple[int, ...]],
    *,
    num_random: int,
    pool: Pool,
    seed: int,
    step: int,
) -> tuple[dict[StepId, tuple[StepId, ...]], Counter[str]]:
    """For every step in `passages`, the steps whose passages are put in place of its own.

    Steps with exactly the same passages are never drawn. Draws are from the distinct passages of the pool, each as
    likely however many rollouts found them, without replacement; from a pool of fewer than `num_random` they are
    with replacement, and a step for which `pool="other_questions"` holds nothing draws from the whole batch. Each
    draw is a hash of (seed, step, question id, context, search, draw), so that neither the order of the batch nor
    other draws change it, and steps of a question with the same context are held against the same passages.

    Args:
        rollouts: of the batch.
        contexts: tokens before the passages by step.
        passages: tokens of the passages by step; all of them together are the pool.
        num_random: draws per step.
        pool: "other_questions" leaves out passages of the same question, "batch" does not.
        seed: of the run.
        step: of training, so that every step draws afresh.

    Returns:
        (draws by step, fewer than `num_random` only when empty; counts "pool_fallback": steps that drew from the whole
        batch, "pool_repeated": steps that drew with replacement).
    """
    keys = {(b, t): (rollouts[b].question.id, contexts[b, t], t) for b, t in passages}
    order = sorted(passages, key=lambda s: (keys[s], passages[s], rollouts[s[0]].tokens))
    numbers: dict[object, int] = {}
    content = np.array([numbers.setdefault(passages[s], len(numbers)) for s in order], np.int64)
    question = np.array([numbers.setdefault(keys[s][0], len(numbers)) for s in order], np.int64)

    counts: Counter[str] = Counter(pool_fallback=0, pool_repeated=0)
    draws: dict[StepId, tuple[StepId, ...]] = {}
    for i, own in enumerate(order):
        differs = content != content[i]
        candidates = np.flatnonzero(differs & (question != question[i]) if pool == "other_questions" else differs)
        if not len(candidates) and differs.any():
            candidates = np.flatnonzero(differs)
            counts["pool_fallback"] += 1
        candidates = candidates[np.unique(content[candidates], return_index=True)[1]]
        repeat = len(candidates) < num_random
        counts["pool_repeated"] += repeat and len(candidates) > 0
        remaining = candidates.tolist()
        drawn = []
        for j in range(num_random if remaining else 0):
            at = hash_key(seed, step, *keys[own], j) % len(remaining)
            drawn.append(order[remaining[at]])
            if not repeat:
                del remaining[at]
        draws[own] = tuple(drawn)
    return draws, counts


def hash_key(*key: object) -> int:
    """A number in [0, 2**64) that depends on the key alone."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
