"""`step_search`: outcome advantage, plus each search's newly found gold passages less what it found again."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.credit.base import Credit, mean
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.credit.turns import Placement, add_step_credit
from stepcredit.rollout import Rollout
from stepcredit.scorer import PolicyScorer

#: Why a search can be without a value; each is counted as "step_search/unscored_<reason>".
REASONS = ("no_supporting", "no_record", "failed_retrieval")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSearch:
    """StepSearch (arXiv 2505.15107): a search is worth the gold passages it finds first, less its share of old ones.

    For search t of a rollout whose question has the gold passages i = 1..n::

        c_i^t = 1 if search t shows gold passage i, else 0
        m_i^t = max(m_i^{t-1}, c_i^t),  m_i^0 = 0
        G_t   = mean over i of max(c_i^t - m_i^{t-1}, 0)
        P_t   = share of the passages of search t that earlier searches of the rollout showed
        A_p   = A_i + alpha * (G_t - redundancy * P_t) / |p_t|   if p is in p_t, else A_i

    where A_i is the outcome's advantage of `SearchR1` and p_t the tokens of the query. Of our choice: c is by the
    passages' ids, which a rollout has; in the released code it is the largest cosine of TF-IDF vectors, for which the
    gold passages' texts are needed. Its outcome is F1 plus 0.618 times how well the queries match those of annotated
    sub-questions, which only its own data set has; here it is the trainer's reward. p_t is the query for the reason
    that `TIPS` gives; the released code rewards one token of the turn, under PPO. A search that showed nothing has
    G = P = 0.

    Metrics, beside those of `SearchR1` (those marked * only when a step was scored):

    * `step_search/gain`*, `step_search/redundancy`*: mean G and P of the scored searches.
    * `step_search/steps`, `step_search/scored`: searches, and those with a value.
    * `step_search/unscored_no_supporting`, `step_search/unscored_no_record`, `step_search/unscored_failed_retrieval`:
      those without, as no gold passage of the question is known, the rollout has no record of what was shown (one read
      from text), or the retriever failed.
    * `advantage/bonus_abs_mean`: mean absolute value added to the tokens p_t of scored searches.

    Attributes:
        alpha: weight of a search's value (ours; the released code adds G - P to the rewards as it is). 0 gives exactly
            the advantages of `SearchR1`.
        redundancy: weight of P_t (released code: 1).
        placement: p_t: the "query" (ours), or the "closing" token of the turn (released code).
        eps: added to a group's standard deviation (Search-R1: 1e-6).
        ddof: degrees of freedom subtracted in the variance (Search-R1: 1).
        scale: "std" divides by the standard deviation (Search-R1); "none" only centres (Dr. GRPO).
        singleton: advantage of a group of one: its "reward" (Search-R1), or "zero".
    """

    alpha: float = 1.0
    redundancy: float = 1.0
    placement: Placement = "query"
    eps: float = 1e-6
    ddof: int = 1
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", redundancy=0, eps=0, ddof=0)
        require(math.isfinite(self.alpha), "credit.alpha", "finite", self.alpha)

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
        found = [value for rollout in batch.rollouts for value in coverage(rollout)]
        counts = Counter(value for value in found if isinstance(value, str))
        pairs = [(math.nan, math.nan) if isinstance(value, str) else value for value in found]
        gain, repeated = torch.tensor(pairs, dtype=batch.rewards.dtype, device=batch.rewards.device).reshape(-1, 2).T
        plain = SearchR1(eps=self.eps, ddof=self.ddof, scale=self.scale, singleton=self.singleton)
        values = gain - self.redundancy * repeated
        credit = add_step_credit(plain, batch, policy, values, alpha=self.alpha, placement=self.placement)
        scored = ~values.isnan()
        metrics = {
            **credit.metrics,
            "step_search/steps": float(len(found)),
            "step_search/scored": float(scored.sum()),
            **{f"step_search/unscored_{reason}": float(counts[reason]) for reason in REASONS},
        }
        if bool(scored.any()):
            metrics |= {"step_search/gain": mean(gain[scored]), "step_search/redundancy": mean(repeated[scored])}
        return Credit(credit.advantages, metrics=metrics)


def coverage(rollout: Rollout) -> list[tuple[float, float] | str]:
    """Of each search step of a rollout, in order, its (G, P), or the reason of `REASONS` why it has none."""
    supporting = set(rollout.question.supporting)
    shown: set[str] = set()
    values: list[tuple[float, float] | str] = []
    for step in rollout.steps():
        searches = [search for search in rollout.searches if search.step == step]
        passages = [passage for search in searches for passage in search.passage_ids]
        if not supporting:
            values.append("no_supporting")
        elif not searches:
            values.append("no_record")
        elif all(search.failed for search in searches):
            values.append("failed_retrieval")
        else:
            gain = len((set(passages) & supporting) - shown) / len(supporting)
            values.append((gain, sum(passage in shown for passage in passages) / max(len(passages), 1)))
        shown.update(passages)
    return values
