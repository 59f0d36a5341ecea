"""The policy's own tokens by the packed pass: their log-probs, alone or on the way to the answers' scores, and the
likeliest tokens in their place."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from stepcredit.batch import RolloutBatch
from stepcredit.branches.contexts import Trunk
from stepcredit.branches.forest import Forest, plant
from stepcredit.branches.tree_reads import TopTokens
from stepcredit.scorer import PolicyScorer


def score_tokens(
    batch: RolloutBatch, policy: PolicyScorer, wanted: torch.Tensor, *, temperature: float, max_tokens: int = 16384
) -> torch.Tensor:
    """Log-probs of tokens of a batch under any policy, such as the reference of a KL term, without gradient.

    The pass of `score_steps(temperature=...)` without its leaves: prefixes that rollouts of a question share are run
    once, and a rollout up to its last wanted token.

    Args:
        batch: packed rollouts, T tokens.
        policy: whose log-probs.
        wanted: bool [T]; never a rollout's first token.
        temperature: log-probs are of the distribution at this temperature.
        max_tokens: tokens per forward pass.

    Returns:
        float32 [T], nats, 0 where not wanted.
    """
    runs = runs_of(batch, wanted)
    trunks = [Trunk(rollout.tokens) for rollout in batch.rollouts]
    forest = plant(batch.rollouts, trunks, {}, runs=runs, temperature=temperature, max_tokens=max_tokens)
    logprobs = policy.logprobs(forest.trees, max_tokens=max_tokens).to(batch.tokens.device)
    return place_logprobs(batch, forest, runs, logprobs)


def score_top_tokens(
    batch: RolloutBatch, policy: PolicyScorer, wanted: torch.Tensor, k: int, *, max_tokens: int = 16384
) -> TopTokens:
    """The likeliest tokens under any policy, such as a teacher, in place of tokens of a batch, without gradient.

    The pass of `score_tokens`, read otherwise.

    Args:
        batch: packed rollouts, T tokens.
        policy: whose distributions, at temperature 1.
        wanted: bool [T], R of them True; never a rollout's first token.
        k: tokens a place; all of the vocabulary where that has fewer.
        max_tokens: tokens per forward pass.

    Returns:
        R places, in the order of the wanted tokens.
    """
    runs = runs_of(batch, wanted)
    trunks = [Trunk(rollout.tokens) for rollout in batch.rollouts]
    forest = plant(batch.rollouts, trunks, {}, runs=runs, temperature=1.0, max_tokens=max_tokens)
    top = policy.top_tokens(forest.trees, k, max_tokens=max_tokens)
    places = [np.arange(start, stop) for b in runs for start, stop in forest.policy[b]]
    order = np.concatenate([np.zeros(0, np.int64), *places])
    return top.at(torch.from_numpy(order).to(top.ids.device))


def runs_of(batch: RolloutBatch, wanted: torch.Tensor) -> dict[int, list[tuple[int, int]]]:
    """Of each rollout with wanted tokens their runs, as (start, stop) in the rollout."""
    mask, found = wanted.cpu().numpy(), {}
    for b, (first, last) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        edges = np.flatnonzero(np.diff(mask[first:last].astype(np.int8), prepend=0, append=0)).tolist()
        if edges:
            found[b] = list(zip(edges[::2], edges[1::2], strict=True))
    return found


def place_logprobs(
    batch: RolloutBatch, forest: Forest, runs: dict[int, list[tuple[int, int]]], logprobs: torch.Tensor
) -> torch.Tensor:
    """[T]: log-probs of the tokens of `runs`, 0 elsewhere."""
    out = torch.zeros(batch.tokens.shape, device=logprobs.device)
    for b, places in forest.policy.items():
        offset = int(batch.cu_seqlens[b])
        for (first, last), (start, stop) in zip(runs[b], places, strict=True):
            out[offset + first : offset + last] = logprobs[start:stop]
    return out
