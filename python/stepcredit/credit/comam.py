"""`comam`: agents of a pipeline, each credited with its own reward and a share of the pipeline's that follows how well
the two agree."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from stepcredit._validate import at_least, choices
from stepcredit.batch import RolloutBatch
from stepcredit.credit.base import Credit, mean
from stepcredit.ops import masked_advantages
from stepcredit.scorer import PolicyScorer


def ranking_consistency(local: ArrayLike, outcome: ArrayLike) -> float:
    """NDCG in [0, 1] of ranking trajectories by an agent's own reward, with the pipeline's reward as their relevance.

    Equivalent, where no two local rewards are equal::

        order = argsort(local, descending)
        v     = sum(outcome[order] / log2(rank + 1)) / sum(sort(outcome, descending) / log2(rank + 1))    ranks from 1

    * Trajectories whose local rewards are equal share the mean discount of the ranks that they occupy together, which
      is the mean of v over all orders of the tie. So v does not depend on the order of the trajectories.
    * Where no trajectory has an outcome above 0 every ranking is as good as another, and v is 1.

    Args:
        local: [G], the agent's rewards, finite.
        outcome: [G], the pipeline's, finite and at least 0.

    Raises:
        ValueError: shapes differ or are empty, a value is not finite, or an outcome is negative.

    Source: CoMAM (arXiv 2603.12631), which says NDCG and no more; gain, discount, ties and the case without relevance
    are ours.
    """
    scores, relevance = np.asarray(local, np.float64), np.asarray(outcome, np.float64)
    if scores.ndim != 1 or scores.shape != relevance.shape or not scores.size:
        raise ValueError(f"local and outcome must have one shape [G], got {scores.shape} and {relevance.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"local must be finite, got {scores.tolist()}")
    if not (np.isfinite(relevance).all() and (relevance >= 0).all()):
        raise ValueError(f"outcome must be finite and at least 0, got {relevance.tolist()}")
    discounts = 1 / np.log2(np.arange(2, scores.size + 2))
    ideal = float(np.sort(relevance)[::-1] @ discounts)
    if ideal == 0:
        return 1.0
    order = np.lexsort((relevance, scores))[::-1]  # by relevance within ties: sums round alike in any order
    starts = np.flatnonzero(np.diff(scores[order], prepend=math.inf))
    shared = np.add.reduceat(discounts, starts) / np.diff(starts, append=scores.size)
    return min(1.0, float(np.add.reduceat(relevance[order], starts) @ shared) / ideal)


def consistency_weights(consistencies: Sequence[float]) -> list[float]:
    """Softmax of the agents' consistencies: the weights of the pipeline's reward, which sum to 1.

    Consistencies lie in [0, 1], so that of three agents no weight is below 0.155 or above 0.576: the contrast is low.
    """
    powers = [math.exp(v) for v in consistencies]
    return [power / math.fsum(powers) for power in powers]


@dataclass(frozen=True, kw_only=True, slots=True)
class CoMAM:
    """CoMAM (arXiv 2603.12631): joint credit of the agents of a pipeline, GRPO for each of them.

    A batch holds the rollouts of all agents, told apart by `Rollout.agent`; the rollouts of one input (`Rollout.group`)
    are G trajectories through the pipeline, one rollout of each agent for each. `Rollout.rewards` has

    * "local": the agent's own reward r_n for this rollout;
    * "total": the pipeline's reward r of the trajectory that the rollout is part of, the same for all of its agents, at
      least 0.

    So all agents of a batch have rollouts of every input, and the same total rewards there; a batch in which they have
    not, such as one with an agent's name forgotten, is refused. (Where all names are, it reads as one agent's.)

    For every input v_n is agent n's `ranking_consistency`, w the `consistency_weights` of its agents, and
    `r_n + w_n * r` is normalised over the agent's rollouts of that input. Tokens are not read, so that agents may have
    different tokenizers. With agents in models of their own, `credit.advantages` split at `batch.cu_seqlens` is each
    rollout's.

    Metrics, of every agent by its name:

    * `comam/reward_<agent>`: mean local reward.
    * `comam/ndcg_<agent>`: mean consistency (only where local rewards are read).
    * `comam/weight_<agent>`: mean weight of the pipeline's reward (only with reward="both").
    * `comam/advantage_<agent>`: mean absolute advantage of its tokens.

    And of all:

    * `comam/all_wrong`: share of the inputs of which no trajectory has a reward above 0; there all consistencies are 1.
    * `advantage/zero_variance_groups`: share of the agents' groups whose combined rewards are all equal.
    * `advantage/outcome_abs_mean`: mean absolute advantage of policy tokens.

    Attributes:
        reward: "both"; "local", each agent's own (the weight of the pipeline's is 0), or "global", the pipeline's alone
            (both are the paper's ablations). "global" of one agent is exactly `SearchR1` on the total reward, "local"
            exactly `SearchR1` on the local one.
        weights: "adaptive", by consistency, or "uniform", one over the number of agents (the paper's ablation).
        eps: added to a group's standard deviation (not given; Search-R1's 1e-6).
        ddof: degrees of freedom subtracted in the variance (not given; 1, torch's default).
        scale: "std" divides by the group's standard deviation (the paper normalises); "none" only centres.
        singleton: advantage of a group of one: its "reward" (as in Search-R1), or "zero".
    """

    reward: Literal["both", "local", "global"] = "both"
    weights: Literal["adaptive", "uniform"] = "adaptive"
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
        policy: PolicyScorer | None = None,
        *,
        step: int = 0,
        progress: float = 1.0,
        temperature: float | None = None,
        verify: bool = False,
    ) -> Credit:
        """As in `CreditMethod`; nothing is scored, so that `policy` may be None. ValueError when the agents of an input
        have other total rewards, a rollout has no local reward where one is read, or a reward is out of its range; the
        message names question and agent."""
        members: dict[tuple[str, int], list[int]] = defaultdict(list)  # rollouts of an agent's group
        for b, (rollout, group) in enumerate(zip(batch.rollouts, batch.groups.tolist(), strict=True)):
            members[rollout.agent, group].append(b)
        _check_trajectories(batch, members)
        consistencies = self._consistencies(batch, members)
        weights = self._weights(members, consistencies)
        rewards, groups = batch.rewards.clone(), torch.empty_like(batch.groups)
        for number, (key, rows) in enumerate(members.items()):
            for b in rows:
                groups[b] = number
                if self.reward != "global":
                    rewards[b] = batch.rollouts[b].rewards["local"] + weights[key] * batch.rollouts[b].reward
        advantages = masked_advantages(
            rewards,
            groups,
            batch.cu_seqlens,
            batch.policy_mask,
            eps=self.eps,
            ddof=self.ddof,
            scale=self.scale,
            singleton=self.singleton,
        )
        final = rewards.tolist()
        wrong: dict[int, bool] = defaultdict(lambda: True)
        for (_, group), rows in members.items():
            wrong[group] &= not any(batch.rollouts[b].reward for b in rows)
        return Credit(
            advantages,
            metrics={
                **self._metrics(batch, members, consistencies, weights, advantages),
                "comam/all_wrong": sum(wrong.values()) / len(wrong),
                "advantage/zero_variance_groups": sum(len({final[b] for b in rows}) == 1 for rows in members.values())
                / len(members),
                "advantage/outcome_abs_mean": mean(advantages[batch.policy_mask].abs()),
            },
        )

    def _consistencies(
        self, batch: RolloutBatch, members: dict[tuple[str, int], list[int]]
    ) -> dict[tuple[str, int], float]:
        if self.reward == "global":
            return {}
        consistencies = {}
        for (agent, group), rows in members.items():
            rollouts = [batch.rollouts[b] for b in rows]
            where = f"question {rollouts[0].question.id!r}, agent {agent!r}"
            for rollout in rollouts:
                if "local" not in rollout.rewards:
                    raise ValueError(f"{where}: a rollout has no reward 'local'; parts: {', '.join(rollout.rewards)}")
            try:
                consistencies[agent, group] = ranking_consistency(
                    [r.rewards["local"] for r in rollouts], [r.reward for r in rollouts]
                )
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return consistencies

    def _weights(
        self, members: dict[tuple[str, int], list[int]], consistencies: dict[tuple[str, int], float]
    ) -> dict[tuple[str, int], float]:
        """The weight of the pipeline's reward for each agent's group."""
        if self.reward != "both":
            return dict.fromkeys(members, 0.0)
        agents: dict[int, list[str]] = defaultdict(list)
        for agent, group in members:
            agents[group].append(agent)
        weights: dict[tuple[str, int], float] = {}
        for group, names in agents.items():
            values = [consistencies[name, group] if self.weights == "adaptive" else 0.0 for name in names]
            weights |= {(name, group): w for name, w in zip(names, consistency_weights(values), strict=True)}
        return weights

    def _metrics(
        self,
        batch: RolloutBatch,
        members: dict[tuple[str, int], list[int]],
        consistencies: dict[tuple[str, int], float],
        weights: dict[tuple[str, int], float],
        advantages: torch.Tensor,
    ) -> dict[str, float]:
        """The metrics of each agent; one without a name is called "policy"."""
        spread = advantages.abs().split(batch.cu_seqlens.diff().tolist())
        masks = batch.policy_mask.split(batch.cu_seqlens.diff().tolist())
        metrics: dict[str, float] = {}
        for agent in dict.fromkeys(agent for agent, _ in members):
            keys = [key for key in members if key[0] == agent]
            rows = [b for key in keys for b in members[key]]
            name = agent or "policy"
            if self.reward != "global":
                local = [batch.rollouts[b].rewards["local"] for b in rows]
                metrics[f"comam/reward_{name}"] = math.fsum(local) / len(local)
                metrics[f"comam/ndcg_{name}"] = math.fsum(consistencies[key] for key in keys) / len(keys)
            if self.reward == "both":
                metrics[f"comam/weight_{name}"] = math.fsum(weights[key] for key in keys) / len(keys)
            metrics[f"comam/advantage_{name}"] = mean(torch.cat([spread[b][masks[b]] for b in rows]))
        return metrics


def _check_trajectories(batch: RolloutBatch, members: dict[tuple[str, int], list[int]]) -> None:
    """ValueError unless the agents of the batch have the same total rewards in every group."""
    agents = list(dict.fromkeys(agent for agent, _ in members))
    for group in dict.fromkeys(group for _, group in members):
        rows = {agent: members.get((agent, group), []) for agent in agents}
        totals = [sorted(batch.rollouts[b].reward for b in rows[agent]) for agent in agents]
        for agent, own in zip(agents, totals, strict=True):
            if own != totals[0]:
                question = next(batch.rollouts[b].question for some in rows.values() for b in some)
                raise ValueError(
                    f"question {question.id!r}: agents {agents[0]!r} and {agent!r} must have the same trajectories, "
                    f"got total rewards {totals[0]} and {own}: is every rollout's agent set?"
                )
