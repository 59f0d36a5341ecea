"""`sd_search`: outcome advantage, and on the queries' tokens distillation from the policy itself with hindsight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.branches.policy_tokens import runs_of
from stepcredit.credit.base import Credit
from stepcredit.credit.distillation import Distillation, Divergence
from stepcredit.credit.hindsight import BlockKind, Labels, attempt_of, hindsight_texts
from stepcredit.credit.privileged import distil
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.ops.topk_search import MAX_K
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class SDSearch:
    """SD-Search (arXiv 2605.18299): the policy, told in hindsight what its group searched for and what came of it,
    teaches itself which queries to write.

    The teacher has the same weights and no gradient; before the response it sees the hindsight block of the rollout's
    group. The update pulls the policy's predictions of query tokens towards the teacher's; advantages are those of
    `SearchR1`. Rollouts of a group whose outcomes are all alike are distilled like others, and counted. A rollout whose
    block is empty has a teacher that is the policy itself: its divergence is 0 and it is left out.

    Metrics, beside those of `SearchR1` (those marked * only in steps that distil something):

    * `sd/weight`: coefficient of the distillation in this step, 0 in the warm-up, when no teacher is run.
    * `sd/loss`*: mean over rollouts of the mean divergence of a rollout's query tokens, nats, from the update.
    * `sd/student_entropy`*, `sd/teacher_entropy`*: mean entropy at the distilled tokens, nats; the former from the
      update.
    * `sd/tail`*: mean probability that the teacher gives to tokens beyond its `top_k`.
    * `sd/tokens_distilled`: query tokens with a teacher; like those below, not in the warm-up.
    * `sd/groups_without_contrast`: share of groups whose rollouts are all correct or all incorrect.
    * `sd/rollouts_without_block`, `sd/too_long`: rollouts with queries that were left out because their block is empty,
      or does not fit into the policy's context with them.
    * `sd/tokens_teacher`: tokens run through the teacher, also as `tokens_forwarded`; `sd/seconds`: the time it took.

    Attributes:
        weight: coefficient of the distillation loss (paper: 1e-3). 0 gives exactly the credit of `SearchR1`.
        warmup: share of the training's steps before anything is distilled (paper: 50 of 200 steps).
        top_k: the teacher's likeliest tokens over which distributions are compared (paper: 50; that they are the
            teacher's is ours).
        tail: all other tokens are one more outcome (ours); otherwise both distributions are renormalised over top_k.
        divergence: "jsd" (paper), "forward_kl" (teacher || student) or "reverse_kl" (student || teacher).
        block: what the teacher sees of the group: all attempts ("group", paper), those that are correct
            ("correct_only"), all but the rollout's own ("leave_one_out"), or its own alone ("single", which of them is
            ours).
        labels: of the attempts: "true" (paper), "shuffled" within the group, or "none".
        rho: an attempt is correct if the F1 of its answer is above this (paper: 0).
        seed: of the shuffling, with the training step.
        max_tokens: tokens per forward pass of the teacher (ours).
        eps, ddof, scale, singleton: as in `SearchR1`.
    """

    weight: float = 1e-3
    warmup: float = 0.25
    top_k: int = 50
    tail: bool = True
    divergence: Divergence = "jsd"
    block: BlockKind = "group"
    labels: Labels = "true"
    rho: float = 0.0
    seed: int = 0
    max_tokens: int = 16384
    eps: float = 1e-6
    ddof: int = 1
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", weight=0, rho=0, seed=0, max_tokens=1, eps=0, ddof=0)
        require(0 <= self.warmup <= 1, "credit.warmup", "in [0, 1]", self.warmup)
        require(1 <= self.top_k <= MAX_K, "credit.top_k", f"in [1, {MAX_K}]", self.top_k)

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
        outcome = SearchR1(eps=self.eps, ddof=self.ddof, scale=self.scale, singleton=self.singleton)
        credit = outcome(batch, policy)
        weight = self.weight if progress >= self.warmup else 0.0
        distillation: Distillation | None = None
        metrics = {**credit.metrics, "sd/weight": weight}
        if weight:
            distillation, taught = self._teach(batch, policy, step)
            metrics |= taught
        return Credit(credit.advantages, metrics=metrics, distillation=distillation)

    def _teach(
        self, batch: RolloutBatch, policy: PolicyScorer, step: int
    ) -> tuple[Distillation | None, dict[str, float]]:
        """What the teacher says of the queries' tokens, None when there are none, and metrics."""
        groups = batch.groups.tolist()
        attempts = [attempt_of(rollout, policy, self.rho) for rollout in batch.rollouts]
        texts = hindsight_texts(
            batch.rollouts, groups, attempts, block=self.block, labels=self.labels, seed=self.seed, step=step
        )
        wanted = batch.step_ids >= 0
        distillation, taught = distil(
            batch,
            texts,
            wanted,
            policy,
            name="sd",
            top_k=self.top_k,
            coefficient=self.weight,
            divergence=self.divergence,
            tail=self.tail,
            max_tokens=self.max_tokens,
        )
        outcomes: dict[int, set[bool]] = {}
        for group, attempt in zip(groups, attempts, strict=True):
            outcomes.setdefault(group, set()).add(attempt.correct)
        metrics = {
            **taught,
            "sd/groups_without_contrast": sum(len(distinct) == 1 for distinct in outcomes.values()) / len(outcomes),
            "sd/rollouts_without_block": float(sum(not texts[b] for b in runs_of(batch, wanted))),
        }
        return distillation, metrics
