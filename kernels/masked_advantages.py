"""`masked_advantages` in one launch, a program per rollout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepcredit.kernels import configs
from stepcredit.kernels._device import on_device
from stepcredit.kernels._math import tanh


@triton.jit
def _policy_and_step(
    policy_mask: tl.tensor, step_ids: tl.tensor, token: tl.tensor, inside: tl.tensor, num_steps: tl.tensor
) -> tl.tensor:
    """Whether the policy wrote the tokens, and the steps whose query they belong to, else -1."""
    policy = tl.load(policy_mask + token, mask=inside, other=0) != 0
    step = tl.load(step_ids + token, mask=policy, other=-1)
    return policy, tl.where(step < num_steps, step, -1)


@triton.jit
def masked_advantages_kernel(
    rewards: tl.tensor,
    groups: tl.tensor,
    cu_seqlens: tl.tensor,
    policy_mask: tl.tensor,
    step_ids: tl.tensor,
    step_gains: tl.tensor,
    advantages: tl.tensor,
    query_lengths: tl.tensor,
    num_rollouts: tl.tensor,
    num_steps: tl.tensor,
    alpha: tl.float64,
    eps: tl.float64,
    ddof: tl.int64,
    scale_std: tl.int1,
    singleton_reward: tl.int1,
    dead_zone: tl.float64,
    negative_scale: tl.float64,
    soft_clip: tl.float64,
    BLOCK: tl.constexpr,
) -> None:
    # A program reads all rewards twice: they are few and stay in L2, which buys one launch and no atomics on floats.
    rollout = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + rollout)
    own = tl.load(rewards + rollout).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    members = tl.zeros([BLOCK], tl.float64)
    different = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, num_rollouts, BLOCK):
        other = offset + tl.arange(0, BLOCK)
        member = tl.load(groups + other, mask=other < num_rollouts, other=-1) == group
        reward = tl.load(rewards + other, mask=member, other=0.0).to(tl.float64)
        total += reward
        members += tl.where(member, 1.0, 0.0)
        different += tl.where(member & (reward != own), 1, 0)
    count = tl.sum(members)
    mean = tl.sum(total) / count
    squares = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, num_rollouts, BLOCK):
        other = offset + tl.arange(0, BLOCK)
        member = tl.load(groups + other, mask=other < num_rollouts, other=-1) == group
        reward = tl.load(rewards + other, mask=member, other=0.0).to(tl.float64)
        squares += tl.where(member, (reward - mean) * (reward - mean), 0.0)

    advantage = own * 0.0
    deviation = advantage + 1.0
    if count > 1:
        # Equal rewards give exactly zero: a rounded mean would leave 1e-17 / eps behind.
        if tl.sum(different) > 0:
            advantage = own - mean
        deviation = tl.sqrt(tl.sum(squares) / (count - ddof))
    elif singleton_reward:
        advantage = own
    if scale_std:
        advantage = advantage / (deviation + eps)

    # The tokens of a step lie in one rollout, so its length is counted in this program. Integer atomics: order-free.
    first, last = tl.load(cu_seqlens + rollout), tl.load(cu_seqlens + rollout + 1)
    if num_steps > 0:
        for start in range(first, last, BLOCK):
            token = start + tl.arange(0, BLOCK)
            _, step = _policy_and_step(policy_mask, step_ids, token, token < last, num_steps)
            tl.store(query_lengths + step, 0, mask=step >= 0)
        tl.debug_barrier()  # the counts begin when every thread's zeros are written
        for start in range(first, last, BLOCK):
            token = start + tl.arange(0, BLOCK)
            _, step = _policy_and_step(policy_mask, step_ids, token, token < last, num_steps)
            tl.atomic_add(query_lengths + step, 1, mask=step >= 0, sem="relaxed", scope="cta")
        tl.debug_barrier()
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        policy, step = _policy_and_step(policy_mask, step_ids, token, token < last, num_steps)
        gain = tl.load(step_gains + step, mask=step >= 0, other=float("nan")).to(tl.float64)
        scored = gain == gain  # NaN marks an unscored step
        length = tl.load(query_lengths + step, mask=step >= 0, other=1)
        x = tl.where(tl.abs(gain) < dead_zone, 0.0, gain)
        x = tl.where(x < 0.0, negative_scale * x, x)
        if soft_clip < float("inf"):
            x = soft_clip * tanh(x / soft_clip)
        bonus = tl.where(scored, alpha * x / length, 0.0)
        result = tl.where(policy, advantage + bonus, 0.0)
        tl.store(advantages + token, result.to(advantages.dtype.element_ty), mask=token < last)


def launch(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    cu_seqlens: torch.Tensor,
    policy_mask: torch.Tensor,
    step_ids: torch.Tensor,
    step_gains: torch.Tensor,
    *,
    alpha: float,
    eps: float,
    ddof: int,
    scale: str,
    singleton: str,
    dead_zone: float,
    negative_scale: float,
    soft_clip: float,
) -> torch.Tensor:
    """The op, for checked arguments: float32 or float64, computed in float64."""
    advantages = rewards.new_empty(policy_mask.shape)
    if not rewards.numel():
        return advantages
    query_lengths = torch.empty(step_gains.shape, dtype=torch.int32, device=rewards.device)
    inputs = (t.contiguous() for t in (rewards, groups, cu_seqlens, policy_mask, step_ids, step_gains))
    with on_device(rewards):
        masked_advantages_kernel[(rewards.numel(),)](
            *inputs,
            advantages,
            query_lengths,
            rewards.numel(),
            step_gains.numel(),
            alpha,
            eps,
            ddof,
            scale == "std",
            singleton == "reward",
            dead_zone,
            negative_scale,
            soft_clip,
            **configs.MASKED_ADVANTAGES[rewards.dtype].launch,
        )
    return advantages
