"""`clarify`: credit of three levels for a policy that may ask a user before it answers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.branches.policy_tokens import score_tokens
from stepcredit.credit.base import Credit, mean, resolve_teacher
from stepcredit.credit.hindsight import with_blocks
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.ops import masked_advantages
from stepcredit.protocol import escape_tags
from stepcredit.rollout import Rollout, SpanKind
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class Clarify:
    """IC-Seg (arXiv 2605.17531): credit of the trajectory, of its questions, and, by RLSD (2604.03128), of its tokens.

    For a rollout with outcome advantage A_i (of `SearchR1`), question t with tokens Q_t, and a teacher T that is told
    which region is meant, where the policy S is not::

        v_t = log2(candidates before / after) / log2(candidates at first) - cost
        d_p = log p_T(token p) - log p_S(token p)                                        no gradient
        w_p = exp(sign(A_i) * d_p)
        A_p = trajectory * A_i * [(1 - share) + share * clip(w_p, 1 - clip, 1 + clip)]
              + turn * v_t / |Q_t|                                                       if p is in Q_t

    The outcome says in which direction a token is pushed, the teacher how far. Where A_i is 0 the first part is 0,
    whatever the teacher says; the second is not. Over a rollout the v_t, but for the costs, sum to the share of its
    ambiguity that questions resolved.

    The paper has rewards of these three levels; its released code has the scripts, not the formulas of the first two.
    That they are added up, v_t and where it is placed are ours. RLSD's formula is that paper's; which words tell the
    teacher, and that both sides are at temperature 1, are ours.

    A rollout without an `Inquiry`, as in other environments, has no turn level. The teacher is told the first gold
    answer of the question.

    Metrics, beside those of `SearchR1` (those marked * only in steps in which a teacher was run):

    * `clarify/share`: the share of this step; 0 when no teacher is run.
    * `clarify/turn_value`: mean v_t of the questions, in steps that have some, and `advantage/bonus_abs_mean`: mean
      absolute turn-level credit of their tokens.
    * `clarify/teacher_gap`*: mean d_p, nats, of the tokens that a teacher weighs; `clarify/clipped`*: share of them
      whose w_p is clipped; `clarify/weight`*: mean weight, the bracket above.
    * `clarify/too_long`*: rollouts that keep their weights of 1, as they do not fit the context with what the teacher
      is told.
    * `clarify/tokens_teacher`*: tokens run through teacher and policy, also as `tokens_forwarded`; `clarify/seconds`*:
      the time it took.

    Attributes:
        trajectory: coefficient of the outcome's advantage (ours).
        turn: coefficient of the questions' values (ours). 0 leaves them out.
        cost: what a question costs, in units of the whole ambiguity (ours): without it no question is ever worth less
            than none.
        share_start: the share at the start of the run (released script: 0.5). 0 leaves the teacher out; with `turn` 0
            too this is exactly `SearchR1`.
        share_end: share of the run's steps over which it falls to 0 (released script: all of 100 steps; 50 of 140 with
            the larger model). That it falls linearly is ours.
        clip: how far a weight may be from 1 (RLSD and released script: 0.2).
        teacher: who is told: "policy", which made the rollouts (ours), or "reference", a frozen copy: in the trainer
            the policy after the warm start (released script: a copy that is renewed every 10 steps).
        max_tokens: tokens per forward pass, as in `score_tokens` (ours).
        eps, ddof, scale, singleton: as in `SearchR1`.
    """

    trajectory: float = 1.0
    turn: float = 1.0
    cost: float = 0.1
    share_start: float = 0.5
    share_end: float = 1.0
    clip: float = 0.2
    teacher: Literal["policy", "reference"] = "policy"
    max_tokens: int = 16384
    eps: float = 1e-6
    ddof: int = 1
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", trajectory=0, turn=0, cost=0, max_tokens=1, eps=0, ddof=0)
        require(0 <= self.share_start <= 1, "credit.share_start", "in [0, 1]", self.share_start)
        require(0 < self.share_end <= 1, "credit.share_end", "in (0, 1]", self.share_end)
        require(0 <= self.clip < 1, "credit.clip", "in [0, 1)", self.clip)

    def share(self, progress: float) -> float:
        """The share when that much of the run is done, in [0, 1]; exactly 0 from `share_end` on."""
        return self.share_start * max(0.0, 1.0 - progress / self.share_end)

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
        """As `CreditMethod.__call__`, and with `teacher`: who is told, with the policy's vocabulary. None: the policy,
        which `teacher="reference"` refuses. At a `progress` of 1, the default, no teacher is run."""
        teacher = resolve_teacher(self.teacher, policy, teacher)
        outcome = SearchR1(eps=self.eps, ddof=self.ddof, scale=self.scale, singleton=self.singleton)
        plain = outcome(batch, policy)
        share = self.share(progress)
        advantages = plain.advantages
        metrics = {**plain.metrics, "clarify/share": share}
        if share:
            advantages, told = self._reweighted(batch, policy, teacher, advantages, share)
            metrics |= told
        if self.trajectory != 1:
            advantages = self.trajectory * advantages
        asked, values = question_values(batch, self.cost)
        if values.numel():
            metrics["clarify/turn_value"] = mean(values)
            bonus = self._turn_level(batch, asked, values)
            metrics["advantage/bonus_abs_mean"] = mean(bonus[asked >= 0].abs())
            if self.turn:
                advantages = advantages + bonus
        return Credit(advantages, metrics=metrics)

    def _turn_level(self, batch: RolloutBatch, asked: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[T]: `turn` times the value of each question, shared out over its tokens, and no outcome."""
        nothing = torch.zeros_like(batch.rewards)
        return masked_advantages(
            nothing, batch.groups, batch.cu_seqlens, batch.policy_mask, asked, values, alpha=self.turn
        )

    def _reweighted(
        self, batch: RolloutBatch, policy: PolicyScorer, teacher: PolicyScorer, advantages: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The advantages as a teacher weighs them, and metrics."""
        started, scorers = time.perf_counter(), {id(scorer): scorer for scorer in (policy, teacher)}.values()
        before = sum(scorer.tokens_forwarded for scorer in scorers)
        taught, blocks = with_blocks(batch, [privileged_text(rollout) for rollout in batch.rollouts], teacher)
        limit = min(scorer.max_context or math.inf for scorer in scorers)
        weighed = batch.policy_mask & (advantages != 0)
        # The last token is only ever predicted.
        fits = [len(r.tokens) + len(block) - 1 <= limit for r, block in zip(batch.rollouts, blocks, strict=True)]
        fits_B = torch.tensor(fits, device=weighed.device)
        wanted = weighed & fits_B.repeat_interleave(batch.cu_seqlens.diff())
        # What was put in is the environment's, so that the policy's tokens are the same ones in the same order.
        told = torch.zeros_like(taught.policy_mask).masked_scatter(taught.policy_mask, wanted[batch.policy_mask])
        known = score_tokens(taught, teacher, told, temperature=1.0, max_tokens=self.max_tokens)[told]
        alone = score_tokens(batch, policy, wanted, temperature=1.0, max_tokens=self.max_tokens)[wanted]
        gap = known - alone
        advantages = advantages.clone()
        own = advantages[wanted]
        advantages[wanted] = reweigh(own, gap, share, self.clip)
        ratio = (own.sign() * gap).exp()
        forwarded = float(sum(scorer.tokens_forwarded for scorer in scorers) - before)
        return advantages, {
            "clarify/teacher_gap": mean(gap),
            "clarify/clipped": mean(((ratio - 1).abs() > self.clip).float()),
            "clarify/weight": mean(reweigh(own.sign(), gap, share, self.clip).abs()),
            "clarify/too_long": float(fits.count(False)),
            "clarify/tokens_teacher": forwarded,
            "tokens_forwarded": forwarded,
            "clarify/seconds": time.perf_counter() - started,
        }


def reweigh(advantages: torch.Tensor, gap: torch.Tensor, share: float, clip: float) -> torch.Tensor:
    """`A * [(1 - share) + share * clip(exp(sign(A) * gap), 1 - clip, 1 + clip)]`, elementwise: RLSD's advantage.

    Args:
        advantages: float [N].
        gap: float [N], the teacher's log-prob of each token less the policy's, nats, finite.
        share: how much of an advantage the teacher decides, in [0, 1].
        clip: in [0, 1).
    """
    weight = (advantages.sign() * gap).exp().clamp(1 - clip, 1 + clip)
    return advantages * ((1 - share) + share * weight)


def privileged_text(rollout: Rollout) -> str:
    """What the teacher is told at the end of the prompt (the wording is ours): the first gold answer, tags escaped."""
    return f"Meant is: {escape_tags(' '.join(rollout.question.answers[0].split()))}\n"


def question_values(batch: RolloutBatch, cost: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The questions of a batch and their values.

    A value is the share of the candidates' bits that the reply resolved, `log2(before / after) / log2(first)`, less the
    cost; where there was but one candidate from the start, no question resolves anything.

    Returns:
        (asked int64 [T], values float32 [K]): the question of which a token is part (strictly between its tags), -1
        elsewhere; and their values, in the order of the rollouts. A question without tokens of its own is left out.
    """
    asked = torch.full_like(batch.step_ids, -1)
    values: list[float] = []
    for rollout, start in zip(batch.rollouts, batch.cu_seqlens.tolist(), strict=False):
        for inquiry in (inquiries := rollout.inquiries):
            spans = [s for s in rollout.spans if s.kind is SpanKind.ASK and s.step == inquiry.step]
            for span in spans:
                asked[start + span.start : start + span.stop] = len(values)
            if spans:
                ambiguity = math.log2(inquiries[0].before)
                values.append((inquiry.bits / ambiguity if ambiguity else 0.0) - cost)
    return asked, torch.tensor(values, dtype=torch.float32, device=batch.tokens.device)
