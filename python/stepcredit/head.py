"""The language-model head of a Hugging Face model, run at chosen hidden states only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from stepcredit.ops import gather_logprobs


def head_options(model: PreTrainedModel) -> dict[str, float]:
    """What a model does to its logits, as arguments of `gather_logprobs`: soft cap (Gemma-2), scale (Cohere,
    Granite)."""
    config = model.config.get_text_config()
    options = {}
    if softcap := getattr(config, "final_logit_softcapping", None):
        options["softcap"] = float(softcap)
    if scale := getattr(config, "logit_scale", None):
        options["logit_scale"] = float(scale)
    elif divisor := getattr(config, "logits_scaling", None):
        options["logit_scale"] = 1.0 / float(divisor)
    return options


def head_logprobs(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    name: Callable[[int], str],
) -> torch.Tensor:
    """Log-probs of tokens from the hidden states that predict them.

    Args:
        model: a causal language model.
        hidden: float [N, H], the last hidden states of its base model.
        targets: int64 [N].
        temperature: log-probs are of the distribution at this temperature.
        name: what to call a row in an error.

    Returns:
        [N], nats, float32 (float64 for a float64 model); differentiable.

    Raises:
        FloatingPointError: a hidden state or a log-prob is NaN or infinite.
    """
    _require_finite("hidden states", hidden, name)
    head = model.get_output_embeddings()
    options: dict[str, Any] = head_options(model)
    bias = getattr(head, "bias", None)
    logprobs = gather_logprobs(hidden, head.weight, targets, bias=bias, temperature=temperature, **options)
    _require_finite("log-probs", logprobs, name)
    return logprobs


def _require_finite(what: str, values: torch.Tensor, name: Callable[[int], str]) -> None:
    bad = ~values.detach().isfinite().reshape(values.shape[0], -1).all(-1)
    if bool(bad.any()):
        raise FloatingPointError(f"the policy's {what} are not finite for {name(int(bad.nonzero()[0]))}")
