"""`multi_search`: several rewards, each normalised in its group by itself, on the policy's own tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.credit.base import Credit, mean
from stepcredit.ops import masked_advantages
from stepcredit.rollout import MULTI_QUERIES, SpanKind
from stepcredit.scorer import PolicyScorer

#: Parts of the outcome reward that are normalised, in the order of the weights.
REWARDS = ("f1", "multi_query", "merge")


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiSearch:
    """MultiSearch (arXiv 2605.13534): parallel queries, an explicit merge, and GDPO's decoupled normalisation, which
    keeps a reward that seldom differs from drowning in one that often does.

    The rewards are the parts of `Rollout.rewards` by these names (`stepcredit.train.rewards` fills them); the total is
    not read. A part that a rollout does not have, or that is NaN, is missing: it counts for nobody in its group. A part
    that is equal in a whole group is exactly 0 there.

    Metrics:

    * `multi_search/queries`: mean number of queries of the batch's searches (only where there was a search).
    * `multi_search/several_share`: share of the rollouts whose searches hold more than two queries on average, whether
      or not the answer is right.
    * `multi_search/merged_share`: share of the searches whose passages the policy merged (only where there was one).
    * `multi_search/constant_<reward>`: share of the groups in which that reward tells no rollout from another.
    * `multi_search/missing_rewards`: missing rewards of the batch.
    * `advantage/zero_variance_groups`: share of the groups in which no reward of a weight other than 0 does.
    * `advantage/outcome_abs_mean`: mean absolute advantage of policy tokens.

    Attributes:
        f1: weight of the answer's F1 (GDPO: the sum, so 1; the paper's own weights are not known).
        multi_query: weight of searching with more than two queries at a time (as f1).
        merge: weight of a merge that names a gold answer (as f1).
        batch_norm: normalise the weighted sum over the batch (GDPO). False with multi_query=0 and merge=0 gives exactly
            the advantages of `SearchR1` on the F1, with the same eps.
        eps: added to standard deviations (GDPO's code: 1e-4).
        ddof: degrees of freedom subtracted in the variance (GDPO's code: 1, torch's default).
        scale: "std" divides by the group's standard deviation (GDPO); "none" only centres.
        singleton: advantage of a group of one: its "reward" (as in Search-R1), or "zero".
    """

    f1: float = 1.0
    multi_query: float = 1.0
    merge: float = 1.0
    batch_norm: bool = True
    eps: float = 1e-4
    ddof: int = 1
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", eps=0, ddof=0)
        for name in REWARDS:
            require(math.isfinite(getattr(self, name)), f"credit.{name}", "finite", getattr(self, name))

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
        """As in `CreditMethod`. ValueError when no rollout has a part that has a weight: nobody assigned it."""
        rewards, weights = self._rewards(batch), [getattr(self, name) for name in REWARDS]
        advantages = masked_advantages(
            rewards,
            batch.groups,
            batch.cu_seqlens,
            batch.policy_mask,
            weights=torch.tensor(weights, dtype=torch.float64).to(rewards.device),
            eps=self.eps,
            ddof=self.ddof,
            scale=self.scale,
            singleton=self.singleton,
            batch_norm=self.batch_norm,
        )
        constant = _constant(rewards, batch.groups)
        weighted = torch.tensor([weight != 0 for weight in weights], device=rewards.device)
        metrics = {
            **search_metrics(batch),
            **{f"multi_search/constant_{name}": mean(constant[:, k].float()) for k, name in enumerate(REWARDS)},
            "multi_search/missing_rewards": float(rewards.isnan().sum()),
            "advantage/zero_variance_groups": mean((constant | ~weighted).all(1).float()),
            "advantage/outcome_abs_mean": mean(advantages[batch.policy_mask].abs()),
        }
        return Credit(advantages, metrics=metrics)

    def _rewards(self, batch: RolloutBatch) -> torch.Tensor:
        """float32 [B, M], NaN where a rollout does not have the part."""
        for name in REWARDS:
            if getattr(self, name) and not any(name in rollout.rewards for rollout in batch.rollouts):
                known = ", ".join(batch.rollouts[0].rewards) or "none"
                raise ValueError(
                    f"no rollout has a reward {name!r}, which has the weight credit.{name}; parts: {known}"
                )
        rows = [[rollout.rewards.get(name, math.nan) for name in REWARDS] for rollout in batch.rollouts]
        return torch.tensor(rows, dtype=torch.float32).to(batch.rewards.device)


def search_metrics(batch: RolloutBatch) -> dict[str, float]:
    """The metrics of `MultiSearch` that come from searches."""
    rollouts = batch.rollouts
    counts = [search.num_queries for rollout in rollouts for search in rollout.searches]
    several = sum(rollout.queries_per_search > MULTI_QUERIES for rollout in rollouts)
    metrics = {"multi_search/several_share": several / len(rollouts)}
    if counts:
        merged = sum(
            rollout.find(SpanKind.MERGE, search.step) is not None for rollout in rollouts for search in rollout.searches
        )
        metrics["multi_search/queries"] = sum(counts) / len(counts)
        metrics["multi_search/merged_share"] = merged / len(counts)
    return metrics


def _constant(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """bool [groups, M]: whether the rewards of a group that are not missing are all equal."""
    index = groups[:, None].expand_as(rewards)
    size = (int(groups.max()) + 1, rewards.shape[1])
    low = rewards.new_full(size, math.inf).scatter_reduce(0, index, rewards.nan_to_num(math.inf), "amin")
    high = rewards.new_full(size, -math.inf).scatter_reduce(0, index, rewards.nan_to_num(-math.inf), "amax")
    return low >= high
