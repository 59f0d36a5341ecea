"""`masked_advantages` against eager lines and the padded computation of trainers: on IG-Search's default options, and
of three rewards as MultiSearch has them, there also against launches of one reward each:
`pytest benchmarks/bench_masked_advantages.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import numerics
from benchmarks.measure import DEVICE, interleave, record_peaks, size_bytes
from benchmarks.shapes import SHAPES
from stepcredit import masked_advantages, reference

OPTIONS: dict[str, Any] = dict(
    alpha=0.3, eps=1e-6, ddof=1, scale="std", singleton="zero", dead_zone=0.0, negative_scale=1.0, soft_clip=math.inf
)
#: Of MultiSearch, whose rewards are weighted and normalised over the batch.
SEVERAL: dict[str, Any] = OPTIONS | {"eps": 1e-4, "batch_norm": True}
QUERY_TOKENS = 8
#: The reference reads every token once a step, so it checks the first groups; the eager lines check the whole batch.
CHECKED_GROUPS = 4


def query_bonus(policy_mask: torch.Tensor, step_ids: torch.Tensor, step_gains: torch.Tensor) -> torch.Tensor:
    """What each query token gets of its step's gain; packed and padded layouts alike."""
    query = policy_mask & (step_ids >= 0)
    lengths = torch.bincount(step_ids[query], minlength=step_gains.numel())
    share = OPTIONS["alpha"] * step_gains.nan_to_num() / lengths
    return torch.where(query, share[step_ids.clamp(min=0)], 0)


def group_relative(rewards: torch.Tensor, groups: torch.Tensor, eps: float) -> torch.Tensor:
    """Of one reward [B], or of each column of several [B, M]."""

    def of_group(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(values).index_add(0, groups, values)[groups]

    size = of_group(torch.ones_like(rewards))
    centred = rewards - of_group(rewards) / size
    deviation = (of_group(centred.square()) / (size - 1)).sqrt()
    return centred / (deviation + eps)


def broadcast(advantage: torch.Tensor, cu_seqlens: torch.Tensor, policy_mask: torch.Tensor) -> torch.Tensor:
    return advantage.repeat_interleave(cu_seqlens.diff(), output_size=policy_mask.numel()) * policy_mask


def eager(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    cu_seqlens: torch.Tensor,
    policy_mask: torch.Tensor,
    step_ids: torch.Tensor,
    step_gains: torch.Tensor,
) -> torch.Tensor:
    tokens = broadcast(group_relative(rewards, groups, OPTIONS["eps"]), cu_seqlens, policy_mask)
    return tokens + query_bonus(policy_mask, step_ids, step_gains)


def eager_several(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    cu_seqlens: torch.Tensor,
    policy_mask: torch.Tensor,
    step_ids: torch.Tensor,
    step_gains: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    total = (group_relative(rewards, groups, SEVERAL["eps"]) * weights).sum(1)
    total = (total - total.mean()) / (total.std() + SEVERAL["eps"])
    return broadcast(total, cu_seqlens, policy_mask) + query_bonus(policy_mask, step_ids, step_gains)


def by_group(rewards: torch.Tensor, group: int, eps: float) -> torch.Tensor:
    """`group_relative` where groups lie side by side."""
    r = rewards.view(-1, group, *rewards.shape[1:])
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)).view(rewards.shape)


def padded(
    rewards: torch.Tensor, response_mask: torch.Tensor, step_ids: torch.Tensor, step_gains: torch.Tensor, group: int
) -> torch.Tensor:
    """GRPO on (B, L) rectangles, groups side by side, as trainers keep them; the gains are added in that layout."""
    advantage = by_group(rewards, group, OPTIONS["eps"])
    return advantage[:, None] * response_mask + query_bonus(response_mask, step_ids, step_gains)


def padded_several(
    rewards: torch.Tensor,
    response_mask: torch.Tensor,
    step_ids: torch.Tensor,
    step_gains: torch.Tensor,
    weights: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """GDPO in the same layout."""
    total = (by_group(rewards, group, SEVERAL["eps"]) * weights).sum(1)
    total = (total - total.mean()) / (total.std() + SEVERAL["eps"])
    return total[:, None] * response_mask + query_bonus(response_mask, step_ids, step_gains)


def launches(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    cu_seqlens: torch.Tensor,
    policy_mask: torch.Tensor,
    step_ids: torch.Tensor,
    step_gains: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Several rewards by the op on one, at its cheapest: a launch for each over rollouts that are one token long, the
    weighted sum normalised over the batch in eager lines, and a launch that spreads it over the tokens."""
    everywhere = torch.ones_like(groups, dtype=torch.bool)
    ends = torch.arange(groups.numel() + 1, device=groups.device)
    each = {name: SEVERAL[name] for name in ("eps", "ddof", "scale", "singleton")}
    columns = [masked_advantages(r, groups, ends, everywhere, **each) for r in rewards.T.contiguous()]
    total = (torch.stack(columns, 1) * weights).sum(1)
    total = (total - total.mean()) / (total.std() + SEVERAL["eps"])
    alone = OPTIONS | {"singleton": "reward"}
    return masked_advantages(total, ends[:-1], cu_seqlens, policy_mask, step_ids, step_gains, **alone)


def make(rollouts: int, group: int, tokens: int, searches: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rollouts of `tokens / 2` to `tokens` tokens; each is cut into a turn per search and a last one, a turn begins
    with what the policy wrote, ends with passages, and its first tokens are the query."""
    torch.manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + 1, (rollouts,))
    offset = torch.cat([torch.arange(n) for n in lengths.tolist()])
    turn_length = (lengths // (searches + 1)).repeat_interleave(lengths)
    turn, place = offset // turn_length, offset % turn_length
    policy_mask = (turn >= searches) | (place < turn_length // 2)
    first_step = (torch.arange(rollouts) * searches).repeat_interleave(lengths)
    step_ids = torch.where((turn < searches) & (place < QUERY_TOKENS) & policy_mask, first_step + turn, -1)
    batch = (
        torch.randint(2, (rollouts,)).to(dtype),
        torch.arange(rollouts) // group,
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        policy_mask,
        step_ids,
        torch.where(torch.rand(rollouts * searches) < 0.1, math.nan, torch.randn(rollouts * searches)).to(dtype),
    )
    return tuple(t.to(DEVICE) for t in batch)


def first_rollouts(batch: tuple[torch.Tensor, ...], rollouts: int, searches: int) -> tuple[torch.Tensor, ...]:
    rewards, groups, cu_seqlens, policy_mask, step_ids, step_gains = batch
    tokens = int(cu_seqlens[rollouts])
    kept = (rewards[:rollouts], groups[:rollouts], cu_seqlens[: rollouts + 1], policy_mask[:tokens], step_ids[:tokens])
    return *kept, step_gains[: rollouts * searches]


def rectangle(
    width: int, cu_seqlens: torch.Tensor, policy_mask: torch.Tensor, step_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which places of (B, width) hold tokens, and the mask and the steps in that layout."""
    rows = torch.arange(width, device=DEVICE) < cu_seqlens.diff()[:, None]
    response_mask = torch.zeros_like(rows).masked_scatter(rows, policy_mask)
    return rows, response_mask, torch.full(rows.shape, -1, device=DEVICE).masked_scatter(rows, step_ids)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("shape", SHAPES["masked_advantages"])
def test_masked_advantages(benchmark: Any, shape: str, dtype: torch.dtype) -> None:
    size = SHAPES["masked_advantages"][shape]
    group, searches = size["group"], size["searches"]
    batch = make(**size, dtype=dtype)
    rewards, _, cu_seqlens, policy_mask, step_ids, step_gains = batch
    rows, response_mask, padded_ids = rectangle(size["tokens"], cu_seqlens, policy_mask, step_ids)

    advantages = masked_advantages(*batch, **OPTIONS)  # a wrong result has no speed
    few = first_rollouts(batch, min(CHECKED_GROUPS * group, rewards.numel()), searches)
    numerics.check(advantages[: few[3].numel()], reference.masked_advantages, *few, **OPTIONS)
    numerics.check(advantages, eager, *batch)
    numerics.check(padded(rewards, response_mask, padded_ids, step_gains, group)[rows], eager, *batch)

    compiled = torch.compile(eager)
    baselines = {
        "eager": lambda: eager(*batch),
        "compiled": lambda: compiled(*batch),
        "padded": lambda: padded(rewards, response_mask, padded_ids, step_gains, group),
    }
    info = benchmark.extra_info
    info["flops"] = 6 * rewards.numel() + 2 * policy_mask.numel()  # group statistics; a product and a sum a token
    info["bytes"] = size_bytes(*batch, advantages)

    def ours() -> torch.Tensor:
        return masked_advantages(*batch, **OPTIONS)

    interleave(benchmark, ours, baselines)
    record_peaks(benchmark, ours, baselines)


@pytest.mark.parametrize("rewards", ["3 rewards"])
@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("shape", SHAPES["masked_advantages"])
def test_several_rewards(benchmark: Any, shape: str, dtype: torch.dtype, rewards: str) -> None:
    size = SHAPES["masked_advantages"][shape]
    group, searches, columns = size["group"], size["searches"], int(rewards.split()[0])
    one, *tokens = make(**size, dtype=dtype)
    several = torch.stack([one, *(torch.randint_like(one, 2) * one for _ in range(columns - 1))], 1)
    weights = torch.linspace(1, 0.5, columns, dtype=dtype, device=DEVICE)
    batch = (several, *tokens)
    _, cu_seqlens, policy_mask, step_ids, step_gains = tokens
    rows, response_mask, padded_ids = rectangle(size["tokens"], cu_seqlens, policy_mask, step_ids)

    def ours() -> torch.Tensor:
        return masked_advantages(*batch, weights=weights, **SEVERAL)

    advantages = ours()  # a wrong result has no speed
    few = first_rollouts(batch, min(CHECKED_GROUPS * group, one.numel()), searches)
    some = masked_advantages(*few, weights=weights, **SEVERAL)
    numerics.check(some, reference.masked_advantages, *few, weights, **SEVERAL)
    numerics.check(advantages, eager_several, *batch, weights)
    rectangular = (several, response_mask, padded_ids, step_gains, weights, group)
    numerics.check(padded_several(*rectangular)[rows], eager_several, *batch, weights)
    numerics.check(launches(*batch, weights), eager_several, *batch, weights)

    compiled = torch.compile(eager_several)
    baselines = {
        "eager": lambda: eager_several(*batch, weights),
        "compiled": lambda: compiled(*batch, weights),
        "padded": lambda: padded_several(*rectangular),
        "launches": lambda: launches(*batch, weights),
    }
    info = benchmark.extra_info
    info["flops"] = 8 * several.numel() + 4 * one.numel() + 2 * policy_mask.numel()
    info["bytes"] = size_bytes(*batch, weights, advantages)
    interleave(benchmark, ours, baselines)
    record_peaks(benchmark, ours, baselines)
