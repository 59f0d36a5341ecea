"""Optimizer steps: supervised on demonstrations, and the policy update on a batch of credited rollouts.

A forward covers only what can receive a gradient. Attention is causal, so a rollout is run up to its last token with
an advantage and not further, one without such a token is not run at all, and the LM head sees no other row: the
gradient is that of the whole batch.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from stepcredit.rollout import RolloutBatch
from stepcredit.train.config import LossConfig
from stepcredit.train.loss import policy_loss, token_weights
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.policy import micro_batches, policy_logprobs, used_lengths


def batch_logprobs(
    model: PreTrainedModel, batch: RolloutBatch, used_T: torch.Tensor, temperature: float, max_tokens: int
) -> torch.Tensor:
    """Log-probs [T] of the used tokens, without gradient; 0 elsewhere."""
    lengths = used_lengths(batch, used_T)
    logprobs_T = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    with torch.no_grad():
        for members in micro_batches(lengths, max_tokens):
            position_N, logprobs_N = policy_logprobs(model, batch, used_T, members, lengths, temperature)
            logprobs_T[position_N] = logprobs_N
    return logprobs_T


def supervised_step(
    model: PreTrainedModel, optimizer: MasterAdamW, batch: RolloutBatch, *, learning_rate: float, max_tokens: int
) -> dict[str, float]:
    """One step on the mean negative log-likelihood of the policy's tokens; what the environment wrote is masked.

    Returns:
        {"loss" (nats per policy token), "grad_norm", "tokens_forwarded"}.
    """
    lengths = used_lengths(batch, batch.policy_mask)
    weight = 1.0 / max(int(batch.policy_mask.sum()), 1)
    total = 0.0
    for members in micro_batches(lengths, max_tokens):
        _, logprobs_N = policy_logprobs(model, batch, batch.policy_mask, members, lengths, 1.0)
        loss = -weight * logprobs_N.sum()
        loss.backward()
        total += float(loss.detach())
    _check_finite("supervised loss", total)
    return {
        "loss": total,
        "grad_norm": optimizer.step(learning_rate),
        "tokens_forwarded": float(sum(lengths)),
    }


def policy_update(
    model: PreTrainedModel,
    optimizer: MasterAdamW,
    batch: RolloutBatch,
    advantages_T: torch.Tensor,
    config: LossConfig,
    *,
    learning_rate: float,
    temperature: float,
    reference: PreTrainedModel | None = None,
) -> dict[str, float]:
    """The policy update on one batch: `config.epochs` passes of `config.minibatches` optimizer steps each.

    With a single optimizer step the policy that is trained is the one that sampled, so the old log-probs are the new
    ones without gradient and need no forward of their own; otherwise they are computed first.

    Args:
        batch: B packed rollouts, T tokens.
        advantages_T: float32 [T].
        temperature: the sampling temperature.
        reference: the policy of the KL term, with `config.kl_coef` > 0.

    Returns:
        Means over the optimizer steps of "loss", "kl", "clip_fraction" and "grad_norm"; "logprob_gap", the mean
        absolute difference between the log-probs of training and of sampling (0 but for rounding, measured before
        the first optimizer step); "optimizer_steps"; "skipped_zero_advantage", rollouts that were not run because no
        token of theirs has an advantage; "tokens_forwarded".

    Raises:
        FloatingPointError: loss or gradient is not finite.
    """
    used_T = batch.policy_mask if config.kl_coef > 0 else batch.policy_mask & (advantages_T != 0)
    lengths = used_lengths(batch, used_T)
    num_steps = config.epochs * config.minibatches
    old_T = reference_T = None
    if num_steps > 1:
        old_T = batch_logprobs(model, batch, used_T, temperature, config.max_tokens)
    if config.kl_coef > 0 and reference is not None:
        reference_T = batch_logprobs(reference, batch, used_T, temperature, config.max_tokens)
    passes = config.epochs + (old_T is not None) + (reference_T is not None)

    policy_lengths_B = torch.segment_reduce(
        batch.policy_mask.double(), "sum", lengths=torch.diff(batch.cu_seqlens)
    ).long()
    names = ("loss", "kl", "clip_fraction", "grad_norm")
    sums = dict.fromkeys(names, 0.0)
    gap, compared, steps = 0.0, 0, 0
    for _ in range(config.epochs):
        for share in torch.arange(len(batch)).tensor_split(config.minibatches):
            chosen_B = torch.zeros(len(batch), dtype=torch.bool, device=batch.tokens.device)
            chosen_B[share] = True
            weights_T = torch.zeros_like(advantages_T)
            weights_T[batch.policy_mask] = token_weights(policy_lengths_B * chosen_B, config.aggregation)
            for members in micro_batches(
                [n * int(c) for n, c in zip(lengths, chosen_B, strict=True)], config.max_tokens
            ):
                position_N, logprobs_N = policy_logprobs(model, batch, used_T, members, lengths, temperature)
                loss, parts = policy_loss(
                    logprobs_N,
                    logprobs_N.detach() if old_T is None else old_T[position_N],
                    advantages_T[position_N],
                    weights_T[position_N],
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                    kl_coef=config.kl_coef,
                    reference_logprobs_T=None if reference_T is None else reference_T[position_N],
                )
                loss.backward()
                for name, value in parts.items():
                    sums[name] += float(value)
                if steps == 0:
                    gap += float((logprobs_N.detach() - batch.sampling_logprobs[position_N]).abs().sum())
                    compared += position_N.numel()
            _check_finite("policy loss", sums["loss"])
            sums["grad_norm"] += optimizer.step(learning_rate)
            steps += 1
    return {
        **{name: total / num_steps for name, total in sums.items()},
        "logprob_gap": gap / max(compared, 1),
        "optimizer_steps": float(steps),
        "skipped_zero_advantage": float(sum(n == 0 for n in lengths)),
        "tokens_forwarded": float(passes * sum(lengths)),
    }


def _check_finite(name: str, value: float) -> None:
    if value != value or abs(value) == float("inf"):
        raise FloatingPointError(f"{name} is {value}: log-probs of the policy are NaN or infinite")
