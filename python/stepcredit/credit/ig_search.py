"""`ig_search`: outcome advantage, plus each search's information gain on the tokens of its query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.branches.contexts import TrunkMode
from stepcredit.branches.draws import Pool
from stepcredit.counterfactual import Baseline, StepGains, score_steps
from stepcredit.credit.base import Credit, mean, outcome_metrics
from stepcredit.ops import masked_advantages
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class IGSearch:
    """IG-Search (arXiv 2604.15148): a search is worth what its passages do for the gold answer's log-prob, against
    passages of other questions.

    Metrics, beside those of `SearchR1` (those marked * only when a step was scored):

    * `ig/gain_mean`*, `ig/gain_std`*: of the scored steps' raw gains, nats per answer token.
    * `ig/positive_share`*: share of the scored steps whose raw gain is above 0.
    * `ig/real_mean`*, `ig/baseline_mean`*: mean score of the gold answer under real and counterfactual passages.
    * `ig/steps`, `ig/scored`: search steps, and those scored; `ig/unscored_*`: those not, by why (`StepGains`).
    * `ig/pool_size`, `ig/pool_fallback`, `ig/pool_repeated`: steps whose passages could be drawn; steps that drew from
      the whole batch, or with replacement, because the pool was too small (baseline="random").
    * `ig/tokens_trunk`, `ig/tokens_real`, `ig/tokens_counterfactual`: tokens run through the model, and their sum
      `tokens_forwarded`; `ig/seconds`: the time it took.
    * `ig/truncated`: steps whose contexts were cut; `ig/empty_answers`: gold answers left out, they have no tokens;
      `ig/no_query`: passages of a search whose query has no tokens.
    * `ig/audit_difference`: with `verify`, see `StepGains.difference`.
    * `advantage/bonus_abs_mean`: mean absolute bonus of the query tokens of scored steps.

    Attributes:
        alpha: weight of the gain (paper: 0.3). 0 gives exactly the advantages of `SearchR1`.
        num_random: counterfactuals per step (paper: 3).
        dead_zone: gains smaller in magnitude count as 0, nats (named in the paper, the value is ours).
        negative_scale: factor on negative gains (named in the paper, the value is ours).
        soft_clip: bound of the gains through tanh, nats (named in the paper; form and value are ours).
        center: what is subtracted from a gain first, so that searching more does not pay by itself: the mean gain of
            the scored steps of the "batch", or of the same "group" of rollouts, whose questions are alike in how much
            passages can tell (both ours); "none": nothing (paper).
        trunk: contexts are the rollout as generated ("rollout", paper), or leave out reasoning between steps
            ("skeleton", released code).
        baseline: passages of other steps ("random", paper), none ("empty", the paper's ablation), or the context of the
            step before ("previous", IGPO).
        pool: draw from "other_questions" (paper) or the whole "batch" (released code).
        head_tokens: the first this many answer tokens weigh head_weight (paper: none; released code: 3).
        head_weight: their weight (released code: 3.0).
        max_variants: gold answers scored per step, the best counts (released code: 1).
        answer_probe: what precedes the gold answer when scored; none is the protocol's (released code: "\\n<answer> ").
        seed: of the draws, with the training step.
        max_tokens: tokens per forward pass, as in `score_steps` (ours).
        max_context: contexts of a step are cut on their left to this many tokens, all alike; none is the model's limit
            (released code: 4096, each by itself).
        eps: added to a group's standard deviation (Search-R1: 1e-6).
        ddof: degrees of freedom subtracted in the variance (Search-R1: 1).
        scale: "std" divides by the standard deviation (Search-R1); "none" only centres (Dr. GRPO).
        singleton: advantage of a group of one: its "reward" (Search-R1), or "zero".
    """

    alpha: float = 0.3
    num_random: int = 3
    dead_zone: float = 0.1
    negative_scale: float = 0.5
    soft_clip: float = 3.0
    center: Literal["none", "batch", "group"] = "none"
    trunk: TrunkMode = "rollout"
    baseline: Baseline = "random"
    pool: Pool = "other_questions"
    head_tokens: int = 0
    head_weight: float = 1.0
    max_variants: int = 1
    answer_probe: str | None = None
    seed: int = 0
    max_tokens: int = 16384
    max_context: int | None = None
    eps: float = 1e-6
    ddof: int = 1
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", num_random=1, dead_zone=0, negative_scale=0, head_tokens=0, head_weight=0)
        at_least(self, "credit.", max_variants=1, seed=0, max_tokens=1, max_context=1, eps=0, ddof=0)
        require(math.isfinite(self.alpha), "credit.alpha", "finite", self.alpha)
        require(self.soft_clip > 0, "credit.soft_clip", "positive", self.soft_clip)

    @classmethod
    def paper(cls) -> IGSearch:
        """As the paper describes it; constants it leaves open keep our values."""
        return cls()

    @classmethod
    def code(cls) -> IGSearch:
        """As the released `ig_reward.py` computes it: whole-batch pool, weighted answer heads, no reasoning between
        steps. It holds nothing of the advantages; those are the paper's."""
        return cls(
            trunk="skeleton", pool="batch", head_tokens=3, head_weight=3.0, answer_probe="\n<answer> ", max_context=4096
        )

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
        gains = self._score(batch, policy, step, temperature, verify)
        outcome = self._advantages(batch, batch.rewards, None)
        advantages = self._advantages(batch, batch.rewards, gains)
        scored_query = torch.isin(batch.step_ids, gains.scored.nonzero().squeeze(1))
        metrics = {
            **outcome_metrics(batch, outcome),
            "advantage/bonus_abs_mean": mean((advantages - outcome)[scored_query].abs()),
            **gain_metrics(gains),
        }
        return Credit(advantages, metrics=metrics, logprobs=gains.logprobs)

    def bonus(self, batch: RolloutBatch, policy: PolicyScorer, *, step: int = 0, verify: bool = False) -> Credit:
        """What the gains add to the outcome's advantages, for a trainer that computes those by itself.

        Args:
            batch: packed rollouts; their rewards are not looked at.
            policy, step, verify: as in a call.

        Returns:
            Credit whose `advantages` are 0 but on the query tokens of scored steps, with the metrics of the gains.
        """
        gains = self._score(batch, policy, step, None, verify)
        bonus = self._advantages(batch, torch.zeros_like(batch.rewards), gains)
        scored_query = torch.isin(batch.step_ids, gains.scored.nonzero().squeeze(1))
        metrics = {"advantage/bonus_abs_mean": mean(bonus[scored_query].abs()), **gain_metrics(gains)}
        return Credit(bonus, metrics=metrics)

    def _score(
        self, batch: RolloutBatch, policy: PolicyScorer, step: int, temperature: float | None, verify: bool
    ) -> StepGains:
        return score_steps(
            batch,
            policy,
            num_random=self.num_random,
            trunk=self.trunk,
            baseline=self.baseline,
            pool=self.pool,
            head_tokens=self.head_tokens,
            head_weight=self.head_weight,
            max_variants=self.max_variants,
            answer_probe=self.answer_probe,
            seed=self.seed,
            step=step,
            max_tokens=self.max_tokens,
            max_context=self.max_context,
            temperature=temperature if self.trunk == "rollout" else None,
            verify=verify,
        )

    def _advantages(self, batch: RolloutBatch, rewards: torch.Tensor, gains: StepGains | None) -> torch.Tensor:
        step_gains = None
        if gains is not None:
            step_gains = gains.gain - self._center(batch, gains)
        return masked_advantages(
            rewards,
            batch.groups,
            batch.cu_seqlens,
            batch.policy_mask,
            None if gains is None else batch.step_ids,
            step_gains,
            alpha=self.alpha,
            eps=self.eps,
            ddof=self.ddof,
            scale=self.scale,
            singleton=self.singleton,
            dead_zone=self.dead_zone,
            negative_scale=self.negative_scale,
            soft_clip=self.soft_clip,
        )

    def _center(self, batch: RolloutBatch, gains: StepGains) -> torch.Tensor:
        """What each gain is measured from, [S] or a scalar; NaN at steps with nothing to be measured against."""
        if self.center == "none":
            return gains.gain.new_zeros(())
        if self.center == "batch":
            return gains.gain.nanmean()
        group = batch.groups[batch.step_rollout]
        size = int(batch.groups.max()) + 1
        total = gains.gain.new_zeros(size).index_add(0, group[gains.scored], gains.gain[gains.scored])
        return (total / group[gains.scored].bincount(minlength=size))[group]


def gain_metrics(gains: StepGains) -> dict[str, float]:
    """The metrics of `IGSearch` that come from the gains."""
    metrics = {f"ig/{name}": float(count) for name, count in gains.counts.items()}
    metrics |= {f"ig/tokens_{name}": float(count) for name, count in gains.tokens_forwarded.items()}
    metrics |= {"tokens_forwarded": float(sum(gains.tokens_forwarded.values())), "ig/seconds": gains.seconds}
    if gains.difference is not None:
        metrics["ig/audit_difference"] = gains.difference
    if bool(gains.scored.any()):
        gain = gains.gain[gains.scored]
        metrics |= {
            "ig/gain_mean": mean(gain),
            "ig/gain_std": float(gain.std(correction=0)),
            "ig/positive_share": mean((gain > 0).float()),
            "ig/real_mean": mean(gains.real[gains.scored]),
            "ig/baseline_mean": mean(gains.baseline[gains.scored]),
        }
    return metrics
