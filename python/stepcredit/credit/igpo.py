"""`igpo`: each turn's information gain over the turn before, normalised in the group, on it and those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.counterfactual import StepGains, score_steps
from stepcredit.credit.base import Credit, group_relative, mean
from stepcredit.credit.ig_search import gain_metrics
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.credit.turns import Turns
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class IGPO:
    """IGPO (arXiv 2510.14967): a turn is worth what it adds to the gold answer's probability, the last one its outcome.

    For turn t of a rollout, with the context up to and including what its search was answered::

        r_t = log p(gold | context_t) - log p(gold | context_{t-1})   # per answer token; context_0 is the prompt
        r_T = outcome reward                                          # of the last turn
        x   = (r - mean) / (std + eps)                                # in the group, gains and outcomes apart or joint
        A_t = x_t + gamma * A_{t+1}                                   # on all tokens of turn t

    Normalised before it is discounted, as in the paper; discounted by turns. A gain of exactly 0 counts in the
    statistics; the released code tells gains from other tokens by not being 0, and so leaves it out. Of our choice: a
    turn without a scored search (no passages, no search at all) has no gain and adds nothing; a last turn that searched
    has its gain beside the outcome; a gold answer is scored after the protocol's answer tag alone.

    Metrics, beside those of `SearchR1`: `ig/...` and `tokens_forwarded` as in `IGSearch`, where baseline means the
    context a turn earlier, and the gain is in nats whatever `gain` says; `advantage/bonus_abs_mean`: mean absolute
    difference to the outcome's own advantage, of all policy tokens; `igpo/turns`: turns of the policy.

    Attributes:
        weight: factor on the normalised gains (ours; the released code's curriculum scales them before, which
            norm="separate" undoes). 0 leaves the gains out, in the statistics too: with gamma=1 it gives exactly the
            advantages of `SearchR1` of the same eps, ddof, scale and singleton.
        gain: of "log_prob" (released script), or of "prob" (its other choice), which is exp of the mean log-prob.
        norm: mean and deviation of a group's gains and of its outcomes "separate", or "joint".
        gamma: discount of the turns that follow (released script: 1).
        eps: added to the standard deviation (released code: 1e-6, and 1e-8 inside the root, which we leave out).
        ddof: degrees of freedom subtracted in the variance (released code: 0).
        scale: "std" divides by the standard deviation (released code); "none" only centres.
        singleton: value of what is alone in its group: "zero" (released code), or itself, "reward".
        max_variants: gold answers scored per turn, the best counts (released code: 1).
        answer_probe: what precedes the gold answer when scored; none is the protocol's.
        max_tokens: tokens per forward pass, as in `score_steps` (ours).
        max_context: contexts of a turn are cut on their left to this many tokens, all alike; none is the model's limit.
    """

    weight: float = 1.0
    gain: Literal["log_prob", "prob"] = "log_prob"
    norm: Literal["separate", "joint"] = "separate"
    gamma: float = 1.0
    eps: float = 1e-6
    ddof: int = 0
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "zero"
    max_variants: int = 1
    answer_probe: str | None = None
    max_tokens: int = 16384
    max_context: int | None = None

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", eps=0, ddof=0, max_variants=1, max_tokens=1, max_context=1)
        require(math.isfinite(self.weight), "credit.weight", "finite", self.weight)
        require(0 <= self.gamma <= 1, "credit.gamma", "in [0, 1]", self.gamma)

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
        gains = score_steps(
            batch,
            policy,
            baseline="previous",
            refinements=False,
            max_variants=self.max_variants,
            answer_probe=self.answer_probe,
            step=step,
            max_tokens=self.max_tokens,
            max_context=self.max_context,
            temperature=temperature,
            verify=verify,
        )
        turns = Turns.of(batch)
        outcome, gain = self._normalised(batch, gains)
        values = turns.outcome(outcome) + turns.gains(self.weight * gain)
        advantages = turns.spread(turns.returns_to_go(values, self.gamma))
        plain = SearchR1(eps=self.eps, ddof=self.ddof, scale=self.scale, singleton=self.singleton)(batch, policy)
        metrics = {
            **plain.metrics,
            "advantage/bonus_abs_mean": mean((advantages - plain.advantages)[batch.policy_mask].abs()),
            "igpo/turns": float(len(turns)),
            **gain_metrics(gains),
        }
        return Credit(advantages, metrics=metrics, logprobs=gains.logprobs)

    def _normalised(self, batch: RolloutBatch, gains: StepGains) -> tuple[torch.Tensor, torch.Tensor]:
        """Outcomes [B] and gains [S], each normalised in its group; NaN where a gain was not scored."""
        raw = gains.gain if self.gain == "log_prob" else gains.real.exp() - gains.baseline.exp()
        scored = gains.scored if self.weight else torch.zeros_like(gains.scored)
        terms = [batch.rewards, raw[scored].to(batch.rewards.dtype)]
        groups = [batch.groups, batch.groups[batch.step_rollout[scored]]]
        if self.norm == "separate":
            outcome, gain = (self._relative(*pair) for pair in zip(terms, groups, strict=True))
        else:
            joint = self._relative(torch.cat(terms), torch.cat(groups))
            outcome, gain = joint[: len(batch)], joint[len(batch) :]
        return outcome, torch.full_like(raw, math.nan).masked_scatter(scored, gain)

    def _relative(self, values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        return group_relative(values, groups, eps=self.eps, ddof=self.ddof, scale=self.scale, singleton=self.singleton)
