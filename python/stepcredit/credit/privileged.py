"""A teacher that sees more than the policy did: what it says in place of the policy's tokens, as a `Distillation`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from stepcredit.batch import RolloutBatch
from stepcredit.branches.policy_tokens import runs_of, score_top_tokens
from stepcredit.credit.base import mean
from stepcredit.credit.distillation import Distillation, Divergence
from stepcredit.credit.hindsight import with_blocks
from stepcredit.scorer import PolicyScorer


def distil(
    batch: RolloutBatch,
    texts: Sequence[str],
    wanted: torch.Tensor,
    teacher: PolicyScorer,
    *,
    name: str,
    top_k: int,
    coefficient: float,
    divergence: Divergence,
    tail: bool,
    max_tokens: int,
) -> tuple[Distillation | None, dict[str, float]]:
    """The distillation of some tokens of a batch from a teacher that sees a block before each response.

    The teacher runs in one packed pass, without gradient. In the loss of its rollout every token weighs the same.

    Args:
        batch: B packed rollouts, T tokens.
        texts: B blocks, shown to the teacher at the end of the prompt; a rollout with an empty one is left out.
        wanted: bool [T], tokens of the policy.
        teacher: with the batch's vocabulary.
        name, coefficient, divergence, tail: as in `Distillation`.
        top_k: the teacher's likeliest tokens, over which distributions are compared.
        max_tokens: tokens per forward pass.

    Returns:
        (distillation, None when there is nothing to distil; metrics). `<name>/tokens_distilled`, `<name>/too_long`
        (rollouts left out because they do not fit into the teacher's context with their block),
        `<name>/tokens_teacher`, also as `tokens_forwarded`, and `<name>/seconds`; with a distillation also
        `<name>/teacher_entropy` and `<name>/tail`.
    """
    started, before = time.perf_counter(), teacher.tokens_forwarded
    device = batch.tokens.device
    taught, blocks = with_blocks(batch, texts, teacher)
    limit = teacher.max_context or math.inf
    chosen, too_long = torch.zeros(len(batch), dtype=torch.bool, device=device), 0
    for b, runs in runs_of(batch, wanted).items():
        fits = runs[-1][1] + len(blocks[b]) - 1 <= limit  # the last token is only ever predicted
        chosen[b] = bool(blocks[b]) and fits
        too_long += bool(blocks[b]) and not fits
    kept = wanted & chosen.repeat_interleave(batch.cu_seqlens.diff())
    positions = kept.nonzero().squeeze(1)
    rollout_of = torch.bucketize(positions, batch.cu_seqlens, right=True) - 1
    there = torch.zeros_like(taught.policy_mask).masked_scatter(taught.policy_mask, kept[batch.policy_mask])
    top = score_top_tokens(taught, teacher, there, top_k, max_tokens=max_tokens)
    forwarded = float(teacher.tokens_forwarded - before)
    metrics = {
        f"{name}/tokens_distilled": float(len(positions)),
        f"{name}/too_long": float(too_long),
        f"{name}/tokens_teacher": forwarded,
        "tokens_forwarded": forwarded,
        f"{name}/seconds": time.perf_counter() - started,
    }
    if not len(positions):
        return None, metrics
    metrics |= {
        f"{name}/teacher_entropy": mean(top.entropy),
        f"{name}/tail": mean(1 - top.logprobs.exp().sum(-1)),
    }
    distillation = Distillation(
        name=name,
        positions=positions,
        candidates=top.ids.to(device),
        logprobs=top.logprobs.to(device),
        weights=1.0 / rollout_of.bincount(minlength=len(batch))[rollout_of],
        coefficient=coefficient,
        divergence=divergence,
        tail=tail,
    )
    return distillation, metrics
