"""`search_r1`: outcome reward, group-relative, on the policy's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepcredit._validate import at_least, choices
from stepcredit.batch import RolloutBatch
from stepcredit.credit.base import Credit, outcome_metrics
from stepcredit.ops import masked_advantages
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchR1:
    """Search-R1 (arXiv 2503.09516): GRPO with the retrieved text masked.

    Metrics: `advantage/zero_variance_groups`, `advantage/outcome_abs_mean` (see `credit.base.outcome_metrics`).

    Attributes:
        eps: added to a group's standard deviation (released code: 1e-6).
        ddof: degrees of freedom subtracted in the variance (released code: 1, torch's default).
        scale: "std" divides by the standard deviation (released code); "none" only centres (Dr. GRPO).
        singleton: advantage of a group of one: its "reward" (released code), or "zero".
    """

    eps: float = 1e-6
    ddof: int = 1
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", eps=0, ddof=0)

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
        advantages = masked_advantages(
            batch.rewards,
            batch.groups,
            batch.cu_seqlens,
            batch.policy_mask,
            eps=self.eps,
            ddof=self.ddof,
            scale=self.scale,
            singleton=self.singleton,
        )
        return Credit(advantages, metrics=outcome_metrics(batch, advantages))
