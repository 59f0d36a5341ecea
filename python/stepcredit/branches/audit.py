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


def tolerance(policy: PolicyScorer) -> float:
    """How far two ways to compute a mean log-prob may lie apart by rounding, per nat of it and at least for one nat.
    Ours: with SmolLM2-135M in bfloat16 the two differ by up to 0.14 nats, and a wrong window of 100 tokens by 3.4."""
    dtype, device = policy.compute_dtype, policy.model.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype in (torch.float32, torch.float64):
        exact = device != "cuda" or torch.get_float32_matmul_precision() == "highest"
        return 1e-4 if exact else 8 * 2.0**-10  # TF32
    return 8 * torch.finfo(dtype).eps


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
    places, contexts = [], []
    for b, t in sorted(branches, key=lambda key: hash_key(seed, "audit", *key))[:SAMPLE]:
        one = branches[b, t]
        trunk = one.trunk(trunks[b].tokens)
        for number, (fork, reads) in enumerate(zip((one.real, *one.others), forest.steps[b, t], strict=True)):
            for answer, (start, stop) in zip(one.answers, reads, strict=True):
                which = "its own passages" if number == 0 else f"counterfactual {number - 1}"
                places.append((f"step {t} of rollout {b} (question {rollouts[b].question.id!r}), {which}", start, stop))
                contexts.append(([*trunk[: fork.at], *fork.tokens], answer))
    worst, allowed = 0.0, tolerance(policy)
    for (name, start, stop), separately in zip(places, policy.separate_logprobs(contexts), strict=True):
        packed, separate = float(logprobs[start:stop].mean()), float(separately.mean())
        worst = max(worst, abs(packed - separate))
        if not abs(packed - separate) <= allowed * max(1.0, abs(separate)):
            raise RuntimeError(
                f"{name}: the packed pass scores {packed:.6f} nats a token, a separate forward {separate:.6f};"
                f" tree attention does not fit {type(policy.model).__name__}"
            )
    return worst
