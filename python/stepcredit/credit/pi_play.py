"""`pi_play`: outcome advantage, and on all the policy's tokens distillation from a teacher who knows how the question
was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.credit.base import Credit, resolve_teacher
from stepcredit.credit.distillation import Distillation, Divergence
from stepcredit.credit.privileged import distil
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.ops.topk_search import MAX_K
from stepcredit.protocol import escape_tags
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class PiPlay:
    """The student of pi-Play (arXiv 2604.14054): a teacher that sees the path on which the examiner constructed the
    question teaches the student, who does not.

    The teacher is an exponential moving average of the student; before the response it sees the path of
    `Question.path`, queries and passages. The update pulls what the policy says wherever it wrote a token towards what
    the teacher says there, by the reverse KL on the policy's own rollouts; advantages are those of `SearchR1`. A
    rollout whose question has no path, such as a data set's, has no teacher and is left out of the distillation.

    Metrics, beside those of `SearchR1` (those marked * only in steps that distil something, and but for the first all
    only with a `weight` above 0):

    * `pi_play/weight`: coefficient of the distillation.
    * `pi_play/loss`*: mean over rollouts of the mean divergence of a rollout's policy tokens, the reverse KL unless
      `divergence` says otherwise, nats, from the update.
    * `pi_play/student_entropy`*, `pi_play/teacher_entropy`*: mean entropy at the distilled tokens, nats; the former
      from the update.
    * `pi_play/tail`*: mean probability that the teacher gives to tokens beyond its `top_k`.
    * `pi_play/tokens_distilled`: policy tokens with a teacher.
    * `pi_play/without_path`, `pi_play/too_long`: rollouts left out because their question has no path, or they do not
      fit into the teacher's context with it.
    * `pi_play/tokens_teacher`: tokens run through the teacher, also as `tokens_forwarded`; `pi_play/seconds`: the time
      it took.

    Attributes:
        weight: coefficient of the distillation loss (ours; the paper's is not known). 0 gives exactly the credit of
            `SearchR1`.
        tau: share by which the average moves to the student after each of its steps (paper: 0.05).
        teacher: "average" (paper), or the "policy" itself as it is now (ours).
        divergence: "reverse_kl" (student || teacher, paper), "forward_kl" (teacher || student) or "jsd".
        top_k: the teacher's likeliest tokens over which distributions are compared (ours).
        tail: all other tokens are one more outcome (ours); otherwise both distributions are renormalised over top_k.
        max_tokens: tokens per forward pass of the teacher (ours).
        eps, ddof, scale, singleton: as in `SearchR1`.
    """

    weight: float = 0.1
    tau: float = 0.05
    teacher: Literal["average", "policy"] = "average"
    divergence: Divergence = "reverse_kl"
    top_k: int = 50
    tail: bool = True
    max_tokens: int = 16384
    eps: float = 1e-6
    ddof: int = 1
    scale: Literal["std", "none"] = "std"
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", weight=0, max_tokens=1, eps=0, ddof=0)
        require(0 < self.tau <= 1, "credit.tau", "in (0, 1]", self.tau)
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
        teacher: PolicyScorer | None = None,
    ) -> Credit:
        """As `CreditMethod.__call__`, and with `teacher`: who teaches, with the policy's vocabulary. None: the policy,
        which `teacher="average"` refuses where a question has a path."""
        outcome = SearchR1(eps=self.eps, ddof=self.ddof, scale=self.scale, singleton=self.singleton)
        credit = outcome(batch, policy)
        metrics = {**credit.metrics, "pi_play/weight": self.weight}
        distillation: Distillation | None = None
        if self.weight:
            distillation, taught = self._teach(batch, policy, teacher)
            metrics |= taught
        return Credit(credit.advantages, metrics=metrics, distillation=distillation)

    def _teach(
        self, batch: RolloutBatch, policy: PolicyScorer, teacher: PolicyScorer | None
    ) -> tuple[Distillation | None, dict[str, float]]:
        """What the teacher says of the policy's tokens, None when there is nothing to say, and metrics."""
        texts = [path_text(rollout.question) for rollout in batch.rollouts]
        distillation, metrics = distil(
            batch,
            texts,
            batch.policy_mask,
            resolve_teacher(self.teacher, policy, teacher) if any(texts) else policy,
            name="pi_play",
            top_k=self.top_k,
            coefficient=self.weight,
            divergence=self.divergence,
            tail=self.tail,
            max_tokens=self.max_tokens,
        )
        return distillation, metrics | {"pi_play/without_path": float(texts.count(""))}


def path_text(question: Question) -> str:
    """What the teacher sees of a question's construction path (the wording is ours); "" for none. Queries and passages
    are data: their tags are escaped."""
    if not question.path:
        return ""
    lines = ["How this question was written:"]
    for query, shown in question.path:
        if query:
            lines.append(f"<search>{escape_tags(' '.join(query.split()))}</search>")
        lines.append(escape_tags(shown))
    return "\n".join([*lines, "An attempt to answer it:", ""])
