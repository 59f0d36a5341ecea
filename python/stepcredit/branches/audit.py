"""Checking counterfactual scores against what they claim to equal: a separate forward pass for each context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from stepcredit.branches.contexts import Branches, Trunk
from stepcredit.branches.draws import StepId, hash_key
from stepcredit.branches.forest import Forest
from stepcredit.rollout import Rollout
from stepcredit.scorer import PolicyScorer

#: Steps that an audit scores again.
SAMPLE = 4


def tolerance(dtype: torch.dtype, score: float) -> float:
    """How far two ways to compute a mean log-prob may lie apart: rounding through all layers, far below what a wrong
    mask or position does. Ours."""
    return (1e-4 if dtype in (torch.float32, torch.float64) else 32 * torch.finfo(dtype).eps) * max(1.0, abs(score))


def audit(
    policy: PolicyScorer,
    rollouts: Sequence[Rollout],
    trunks: Sequence[Trunk],
    branches: Mapping[StepId, Branches],
    forest: Forest,
    logprobs: torch.Tensor,
    seed: int,
) -> float:
    """The largest difference, nats per answer token, between packed and separate scores of a sample of steps.

    Raises:
        RuntimeError: a score differs by more than rounding; names the step.
    """
    sample = sorted(branches, key=lambda key: hash_key(seed, "audit", *key))[:SAMPLE]
    policy.even_out(sum(len(context) for key in sample for context in forest.steps[key]))
    worst = 0.0
    for b, t in sample:
        one = branches[b, t]
        for context, (fork, places) in enumerate(zip((one.real, *one.others), forest.steps[b, t], strict=True)):
            tokens = [*one.trunk(trunks[b].tokens)[: fork.at], *fork.tokens]
            for answer, (start, stop) in zip(one.answers, places, strict=True):
                packed = float(logprobs[start:stop].mean())
                separate = float(policy.separate_logprobs(tokens, answer).mean())
                difference = abs(packed - separate)
                worst = max(worst, difference)
                if not difference <= tolerance(policy.model.dtype, separate):
                    which = "its own passages" if context == 0 else f"counterfactual {context - 1}"
                    raise RuntimeError(
                        f"step {t} of rollout {b} (question {rollouts[b].question.id!r}), {which}: the packed pass"
                        f" scores {packed:.6f} nats a token, a separate forward {separate:.6f}; tree attention does not"
                        f" fit {type(policy.model).__name__}"
                    )
    return worst
