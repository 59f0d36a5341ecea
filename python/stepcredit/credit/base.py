"""What every credit method takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeGuard

import torch

from stepcredit._validate import require
from stepcredit.batch import RolloutBatch
from stepcredit.credit.distillation import Distillation
from stepcredit.ops import masked_advantages
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, slots=True)
class Credit:
    """Per-token credit of a batch.

    Attributes:
        advantages: float32 [T], exactly 0 on tokens of the environment.
        metrics: numbers to log by name; each method documents its own.
        logprobs: float32 [T], log-probs of the policy's tokens (0 elsewhere), when they were asked for and the method
            ran these tokens anyway; else None.
        distillation: what a teacher says of some of the policy's tokens, towards which the update pulls the policy; or
            None.
    """

    advantages: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    logprobs: torch.Tensor | None = None
    distillation: Distillation | None = None


class CreditMethod(Protocol):
    """A credit method: a frozen dataclass of its constants that is called with a batch."""

    def __call__(
        self,
        batch: RolloutBatch,
        policy: PolicyScorer,
        *,
        step: int = 0,
        progress: float = 1.0,
        temperature: float | None = None,
        verify: bool = False,
    ) -> Credit:
        """Credit of a batch.

        Args:
            batch: packed rollouts with rewards.
            policy: scores token trees under the policy that made the rollouts.
            step: of training, or a number made from it; seeds what the method draws.
            progress: share of the training's steps that are done, in [0, 1]; for what a method changes on the way.
            temperature: the trainer needs the log-probs of the policy's tokens at this temperature: a method whose own
                pass can give them does, which saves the trainer a pass.
            verify: check what is computed in a packed pass against separate forwards, where the method has one.
        """
        ...


class TaughtByAverage(CreditMethod, Protocol):
    """A method that is to be called with `teacher=` an exponential moving average of the policy."""

    @property
    def tau(self) -> float:
        """Share by which the average moves to the policy after each of its steps, in (0, 1]."""
        ...


def taught_by_reference(method: CreditMethod) -> bool:
    """Whether a method is to be called with `teacher=` a frozen copy of the policy: its field `teacher` says so."""
    return getattr(method, "teacher", None) == "reference"


def taught_by_average(method: CreditMethod) -> TypeGuard[TaughtByAverage]:
    """Whether a method is a `TaughtByAverage`: its field `teacher` says so."""
    return getattr(method, "teacher", None) == "average"


def resolve_teacher(wanted: str, policy: PolicyScorer, teacher: PolicyScorer | None) -> PolicyScorer:
    """Who teaches in a method whose field `teacher` is `wanted`, when it is called with `teacher`.

    None stands for the policy, which only "policy" lets teach; another must have the policy's vocabulary, else
    ValueError.
    """
    if teacher is None:
        require(wanted == "policy", "teacher", f"given with credit.teacher={wanted!r}", teacher)
        return policy
    if teacher.tokenizer is not policy.tokenizer:
        same = teacher.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
        require(same, "teacher", "a scorer with the policy's vocabulary", teacher.name)
    return teacher


def outcome_metrics(batch: RolloutBatch, outcome: torch.Tensor) -> dict[str, float]:
    """Metrics of the outcome advantages [T].

    * `advantage/zero_variance_groups`: share of groups whose rewards are all equal (groups of one included).
    * `advantage/outcome_abs_mean`: mean absolute outcome advantage of policy tokens.
    """
    rewards: dict[int, set[float]] = {}
    for group, reward in zip(batch.groups.tolist(), batch.rewards.tolist(), strict=True):
        rewards.setdefault(group, set()).add(reward)
    equal = sum(len(distinct) == 1 for distinct in rewards.values())
    return {
        "advantage/zero_variance_groups": equal / len(rewards),
        "advantage/outcome_abs_mean": mean(outcome[batch.policy_mask].abs()),
    }


def group_relative(
    values: torch.Tensor,
    groups: torch.Tensor,
    *,
    eps: float,
    ddof: int,
    scale: Literal["std", "none"],
    singleton: Literal["zero", "reward"],
) -> torch.Tensor:
    """Values [N] normalised within their group: `masked_advantages` of N rollouts that are one token long.

    Args:
        values: float [N], finite.
        groups: int64 [N], any labels.
        eps, ddof, scale, singleton: as in `masked_advantages`.
    """
    if not values.numel():
        return values
    _, dense = groups.unique(return_inverse=True)
    cu_seqlens = torch.arange(values.numel() + 1, device=values.device)
    everywhere = torch.ones_like(values, dtype=torch.bool)
    return masked_advantages(
        values, dense, cu_seqlens, everywhere, eps=eps, ddof=ddof, scale=scale, singleton=singleton
    )


def mean(values: torch.Tensor) -> float:
    """The mean, 0 of nothing."""
    return float(values.mean()) if values.numel() else 0.0
