"""Optimizer steps: supervised on demonstrations, and the policy update on a batch of credited rollouts.

A forward covers only what can receive a gradient. Attention is causal, so a rollout is run up to its last token with
an advantage or a teacher and not further, one without such a token is not run at all, a prefix that rollouts share is
run once, and the LM head sees no other row: the gradient is that of the whole batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from stepcredit.batch import RolloutBatch
from stepcredit.branches.policy_tokens import score_tokens
from stepcredit.credit import Credit, Distillation
from stepcredit.scorer import PolicyScorer
from stepcredit.train.loss import Aggregation, policy_loss, token_weights, topk_divergence
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.policy import Forward, policy_logprobs, row_limit, training_attention
from stepcredit.train.rows import micro_batches, pack_rows, used_lengths
from stepcredit.train.update_config import LossConfig


def supervised_step(
    model: PreTrainedModel, optimizer: MasterAdamW, batch: RolloutBatch, *, learning_rate: float, max_tokens: int
) -> dict[str, float]:
    """One step on the mean negative log-likelihood of the policy's tokens; what the environment wrote is masked.

    Returns:
        {"loss" (nats per policy token), "grad_norm", "tokens_forwarded"}.
    """
    used_T = batch.policy_mask
    rows = pack_rows(batch, used_lengths(batch, used_T), row_limit(model, max_tokens))
    weight = 1.0 / max(int(used_T.sum()), 1)
    total = 0.0
    with training_attention(model, rows):
        for micro in micro_batches(rows, max_tokens):
            _, logprobs_N = policy_logprobs(model, batch, used_T, micro, 1.0)
            loss = -weight * logprobs_N.sum()
            loss.backward()
            total += float(loss.detach())
    return {
        "loss": total,
        "grad_norm": optimizer.step(learning_rate),
        "tokens_forwarded": float(sum(len(row.tokens) for row in rows)),
    }


def policy_update(
    policy: PolicyScorer,
    optimizer: MasterAdamW,
    batch: RolloutBatch,
    credit: Credit,
    config: LossConfig,
    *,
    learning_rate: float,
    temperature: float,
    reference: PolicyScorer | None = None,
) -> dict[str, float]:
    """The policy update on one batch: `config.epochs` passes of `config.minibatches` optimizer steps each.

    With a single optimizer step the policy that is trained is the one that sampled, so the old log-probs are the new
    ones without gradient and need no forward of their own; otherwise they are the credit's, or computed first.

    Args:
        policy: whose model is trained, by `optimizer`.
        batch: B packed rollouts, T tokens.
        credit: advantages [T], perhaps the log-probs of the policy's tokens at `temperature`, and perhaps a teacher's
            distributions, whose divergence is added to the policy loss, from the same forward passes.
        temperature: the sampling temperature.
        reference: the policy of the KL term, with `config.kl_coef` > 0.

    Returns:
        Means over the optimizer steps of "loss" (the policy's alone), "kl", "clip_fraction" and "grad_norm", and of
        "<name>/loss", the distillation's before its coefficient; "<name>/student_entropy", the policy's mean entropy at
        distilled tokens; "logprob_gap", the mean absolute difference between the log-probs of training and of sampling
        (0 but for rounding, measured before the first optimizer step), and "old_logprob_gap", that between training and
        the old log-probs, if these took a pass of their own; "optimizer_steps", those that had a gradient;
        "skipped_zero_advantage", rollouts that were not run because no token of theirs has an advantage or a teacher;
        "tokens_forwarded".

    Raises:
        FloatingPointError: log-probs or the gradient are not finite.
    """
    num_steps = config.optimizer_steps
    distillation = credit.distillation
    used_T = batch.policy_mask if config.kl_coef > 0 else batch.policy_mask & (credit.advantages != 0)
    run_T = used_T if distillation is None else used_T.index_fill(0, distillation.positions, True)
    lengths = used_lengths(batch, run_T)
    model = policy.model
    limit = row_limit(model, config.max_tokens)
    passes = [scorer for scorer in (policy, reference) if scorer is not None]
    before = sum(scorer.tokens_forwarded for scorer in passes)
    old_T = reference_T = None
    if num_steps > 1:
        old_T = credit.logprobs
        if old_T is None:
            old_T = score_tokens(batch, policy, used_T, temperature=temperature, max_tokens=config.max_tokens)
    if config.kl_coef > 0 and reference is not None:
        reference_T = score_tokens(batch, reference, used_T, temperature=temperature, max_tokens=config.max_tokens)
    forwarded = sum(scorer.tokens_forwarded for scorer in passes) - before

    unchanged = True  # a share of which nothing is run moves no weight
    totals: dict[str, float] = defaultdict(float)
    for number in range(num_steps):
        share = torch.arange(len(batch)).tensor_split(config.minibatches)[number % config.minibatches].tolist()
        weights_T = share_weights(batch, share, config.aggregation)
        chosen = set(share)
        rows = pack_rows(batch, [length * (b in chosen) for b, length in enumerate(lengths)], limit)
        forwarded += sum(len(row.tokens) for row in rows)
        with training_attention(model, rows):
            for micro in micro_batches(rows, config.max_tokens):
                forward = Forward(model, batch, micro)
                position_N, logprobs_N = forward.logprobs(used_T, temperature)
                now_N = logprobs_N.detach()
                loss, parts = policy_loss(
                    logprobs_N,
                    now_N if old_T is None else old_T[position_N],
                    credit.advantages[position_N],
                    weights_T[position_N],
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                    kl_coef=config.kl_coef,
                    reference_logprobs_T=None if reference_T is None else reference_T[position_N],
                )
                if distillation is not None:
                    extra, entropies = distillation_loss(forward, distillation, len(share))
                    loss = loss + distillation.coefficient * extra
                    totals["distillation"] += float(extra.detach()) / num_steps
                    totals["entropy"] += float(entropies.sum())
                    totals["distilled"] += entropies.numel()
                loss.backward()
                for name, value in parts.items():
                    totals[name] += float(value) / num_steps
                if unchanged:
                    totals["gap"] += float((now_N - batch.sampling_logprobs[position_N]).abs().sum())
                    totals["compared"] += position_N.numel()
                    if old_T is not None:
                        totals["old_gap"] += float((now_N - old_T[position_N]).abs().sum())
        unchanged = unchanged and not rows
        norm = optimizer.step(learning_rate)
        totals["grad_norm"] += norm / num_steps
        totals["optimizer_steps"] += norm > 0
    return {
        **{name: totals[name] for name in ("loss", "kl", "clip_fraction", "grad_norm", "optimizer_steps")},
        **({} if distillation is None else distillation_metrics(distillation, totals)),
        "logprob_gap": totals["gap"] / max(totals["compared"], 1.0),
        **({} if old_T is None else {"old_logprob_gap": totals["old_gap"] / max(totals["compared"], 1.0)}),
        "skipped_zero_advantage": float(sum(length == 0 for length in lengths)),
        "tokens_forwarded": float(forwarded),
    }


def distillation_loss(forward: Forward, distillation: Distillation, rollouts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a distillation's loss, before its coefficient, that the rollouts of a forward have in an update on
    `rollouts` rollouts; and the policy's entropies at their distilled tokens."""
    which_N, student_NK, entropy_N = forward.candidates(distillation.positions, distillation.candidates)
    divergence_N = topk_divergence(
        student_NK, distillation.logprobs[which_N], distillation.divergence, tail=distillation.tail
    )
    return (distillation.weights[which_N] * divergence_N).sum() / rollouts, entropy_N


def distillation_metrics(distillation: Distillation, totals: Mapping[str, float]) -> dict[str, float]:
    """What `policy_update` reports of a distillation."""
    metrics = {f"{distillation.name}/loss": totals["distillation"]}
    if totals["distilled"]:
        metrics[f"{distillation.name}/student_entropy"] = totals["entropy"] / totals["distilled"]
    return metrics


def share_weights(batch: RolloutBatch, share: Sequence[int], aggregation: Aggregation) -> torch.Tensor:
    """Loss weights [T] of the policy's tokens of some rollouts, summing to one over all of them; 0 elsewhere."""
    policy_B = torch.tensor(
        [int(part.sum()) for part in batch.policy_mask.split(torch.diff(batch.cu_seqlens).tolist())]
    )
    lengths_B = torch.zeros_like(policy_B)
    lengths_B[list(share)] = policy_B[list(share)]
    in_share_B = torch.zeros(len(batch), dtype=torch.bool)
    in_share_B[list(share)] = True
    in_share_T = in_share_B.to(batch.tokens.device).repeat_interleave(torch.diff(batch.cu_seqlens))
    weights_T = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    weights_T[batch.policy_mask & in_share_T] = token_weights(lengths_B, aggregation).to(weights_T)
    return weights_T
