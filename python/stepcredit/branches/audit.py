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


#: A single context may differ by this many times what the mean of all may.
OUTLIER = 4


def tolerance(policy: PolicyScorer) -> float:
    """How far two ways to compute mean log-probs may lie apart by rounding, in the mean over contexts, per nat of score
    and at least for one nat. Ours: with SmolLM2-135M in bfloat16 single contexts differ by up to 0.22 nats, and a wrong
    window of 100 tokens by 3.4."""
    dtype, device = policy.compute_dtype, policy.device.type
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
) -> float | None:
    """The largest difference, nats per answer token, between packed and separate scores of a sample of steps; None when
    there is no scored step to sample.

    Raises:
        RuntimeError: scores differ by more than rounding; names the step that differs most.
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
    packed = [float(logprobs[start:stop].mean()) for _, start, stop in places]
    separate = [float(answer.mean()) for answer in policy.separate_logprobs(contexts)]
    differences = [abs(a - b) for a, b in zip(packed, separate, strict=True)]
    if not differences:
        return None
    sizes = [max(1.0, abs(score)) for score in separate]
    allowed = tolerance(policy)
    in_mean = sum(differences) <= allowed * sum(sizes)
    worst = max(range(len(sizes)), key=lambda k: differences[k] / sizes[k])
    if not (in_mean and differences[worst] <= OUTLIER * allowed * sizes[worst]):
        raise RuntimeError(
            f"{places[worst][0]}: the packed pass scores {packed[worst]:.6f} nats a token, a separate forward"
            f" {separate[worst]:.6f}; tree attention does not fit {policy.name}"
        )
    return max(differences)
