"""Configuration of the update: the loss, and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from stepcredit._validate import at_least, choices, require


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The policy loss and how a batch of rollouts is used.

    Attributes:
        clip_low: ratios below 1 - clip_low earn no further gradient.
        clip_high: ratios above 1 + clip_high earn no further gradient.
        kl_coef: weight of the low-variance KL to the policy as it was after the warm start; 0 keeps no reference.
        aggregation: "token" (every policy token of the batch weighs the same) or "sequence" (every rollout does).
        epochs: passes over a batch of rollouts.
        minibatches: optimizer steps per pass, each on its share of the rollouts.
        max_tokens: padded tokens per forward and backward; bounds memory (about 1 MB a token for SmolLM2), changes
            nothing else.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    aggregation: Literal["token", "sequence"] = "token"
    epochs: int = 1
    minibatches: int = 1
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        choices(self, "loss.")
        at_least(self, "loss.", clip_low=0.0, clip_high=0.0, kl_coef=0.0, epochs=1, minibatches=1, max_tokens=1)

    @property
    def optimizer_steps(self) -> int:
        """Of one batch of rollouts."""
        return self.epochs * self.minibatches


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW on float32 weights.

    Attributes:
        learning_rate: of GRPO.
        warmup_steps: GRPO steps over which the learning rate rises linearly to its value.
        beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        max_grad_norm: gradients are scaled down to this global norm.
    """

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, "optimizer.", learning_rate=0.0, warmup_steps=0, eps=0.0, weight_decay=0.0)
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", "in [0, 1)", getattr(self, name))
        require(self.max_grad_norm > 0, "optimizer.max_grad_norm", "positive", self.max_grad_norm)

    def adamw(self) -> dict[str, Any]:
        """The settings of `MasterAdamW`."""
        return {
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }

    def rate(self, step: int) -> float:
        """Learning rate of GRPO step `step`, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup_steps + 1))
