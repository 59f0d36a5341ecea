"""`tips`: outcome advantage, plus a teacher's change of belief in the gold answers at each search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.counterfactual import score_steps
from stepcredit.credit.base import Credit, mean, resolve_teacher
from stepcredit.credit.ig_search import gain_metrics
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.credit.turns import Placement, add_step_credit
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class TIPS:
    """TIPS (arXiv 2603.22293): potential-based shaping by how probable a teacher finds the gold answers.

    For search t of a rollout, with the context up to and including what it was answered::

        phi_t = logsumexp over gold answers a of mean log p_teacher(a | context_t)    # context_0 is the prompt
        F_t   = alpha * (phi_t - phi_{t-1})
        A_p   = A_i + F_t / |P_t|   if p is in P_t, else A_i

    where A_i is the outcome's advantage of `SearchR1`. Over a rollout whose searches are all scored the F sum to
    alpha * (phi_last - phi_0), whatever was searched in between: shaping of this form leaves the best policy of the
    undiscounted return as it is.

    Of our choice: P_t is the query by default. The released code trains with PPO and rewards the one token that closes
    the turn; a critic then carries the reward back to the tokens before it. Here there is no critic, and a closing tag,
    which the policy writes almost surely, learns nothing from an advantage of its own: what was chosen is the query.
    The answer's tags are fed, not scored (the released code averages over them too), and the answer is scored after the
    protocol's answer tag.

    Metrics, beside those of `SearchR1` (those marked * only when a step was scored):

    * `tips/potential`*: mean phi after the scored searches; `tips/shaping`*: their mean phi_t - phi_{t-1}, nats;
      `tips/positive_share`*: share of them where it is above 0.
    * `ig/...`, `tokens_forwarded`: as in `IGSearch`, under the teacher, where the best gold answer counts and baseline
      means the context a search earlier.
    * `advantage/bonus_abs_mean`: mean absolute shaping of the tokens P_t of scored searches.

    Attributes:
        alpha: weight of the shaping (released code: 0.02). 0 gives exactly the advantages of `SearchR1`.
        placement: P_t: the "query" (ours), or the "closing" token of the turn (released code).
        teacher: whose belief: "policy", which made the rollouts (ours), or "reference", a frozen copy: in the trainer
            the policy after the warm start, as of the KL term (released code: a copy that is renewed now and then).
        max_variants: gold answers of the sum (released code: all; the bound is ours).
        answer_probe: what precedes a gold answer when scored; none is the protocol's.
        max_tokens: tokens per forward pass, as in `score_steps` (ours).
        max_context: contexts of a search are cut on their left to this many tokens, all alike; none is the model's
            limit.
        eps: added to a group's standard deviation (Search-R1: 1e-6).
        ddof: degrees of freedom subtracted in the variance (Search-R1: 1).
        scale: "std" divides by the standard deviation (Search-R1); "none" only centres (Dr. GRPO).
        singleton: advantage of a group of one: its "reward" (Search-R1), or "zero".
    """

    alpha: float = 0.02
    placement: Placement = "query"
    teacher: Literal["policy", "reference"] = "policy"
    max_variants: int = 8
    answer_probe: str | None = None
    max_tokens: int = 16384
    max_context: int | None = None
    eps: float = 1e-6
    ddof: int = 1
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", max_variants=1, max_tokens=1, max_context=1, eps=0, ddof=0)
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
        teacher: PolicyScorer | None = None,
    ) -> Credit:
        """As `CreditMethod.__call__`, and with `teacher`: who scores, with the policy's vocabulary and protocol. None:
        the policy, which `teacher="reference"` refuses. Log-probs at `temperature` are given by the policy alone."""
        teacher = resolve_teacher(self.teacher, policy, teacher)
        gains = score_steps(
            batch,
            teacher,
            baseline="previous",
            refinements=False,
            max_variants=self.max_variants,
            answer_probe=self.answer_probe,
            step=step,
            max_tokens=self.max_tokens,
            max_context=self.max_context,
            temperature=temperature if teacher is policy else None,
            verify=verify,
        )
        # An answer that a step lacks is NaN: it adds nothing to the sum. Of a step that was not scored all are.
        scores = torch.where(gains.scored[:, None, None], gains.scores.nan_to_num(-math.inf), math.nan)
        potential, before = scores.logsumexp(1).unbind(1) if scores.numel() else (gains.real, gains.baseline)
        change = potential - before
        plain = SearchR1(eps=self.eps, ddof=self.ddof, scale=self.scale, singleton=self.singleton)
        credit = add_step_credit(plain, batch, policy, change, alpha=self.alpha, placement=self.placement)
        metrics = {**credit.metrics, **gain_metrics(gains)}
        if bool(gains.scored.any()):
            metrics |= {
                "tips/potential": mean(potential[gains.scored]),
                "tips/shaping": mean(change[gains.scored]),
                "tips/positive_share": mean((change[gains.scored] > 0).float()),
            }
        return Credit(credit.advantages, metrics=metrics, logprobs=gains.logprobs)
