"""Outcome rewards: measures of `stepcredit.rewards` as named parts of a rollout's reward, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from transformers import PreTrainedTokenizerBase

from stepcredit.rewards import closed_answer, exact_match, f1, gold_hit, names_gold
from stepcredit.rollout import MULTI_QUERIES, Rollout, SpanKind


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardWeights:
    """How much each part of the outcome reward counts; the total is the weighted sum of the parts.

    Attributes:
        f1: weight of the token F1 of the answer (AutoRefine's reward).
        em: weight of the exact match of the answer (Search-R1's reward).
        format: weight of having finished with a closed answer.
        gold_hit: weight of the share of the question's supporting passages that were shown.
        refine: weight of naming a gold answer inside the refine blocks when the answer's F1 is 0 (AutoRefine: 0.1).
        multi_query: weight of searching with more than two queries at a time (MultiSearch; the weight is not given).
        merge: weight of naming a gold answer inside the merge blocks (MultiSearch; the weight is not given).
        iou: weight of the overlap of the region that is named with the one that is meant, in scenes (IC-Seg).
    """

    f1: float = 1.0
    em: float = 0.0
    format: float = 0.0
    gold_hit: float = 0.0
    refine: float = 0.0
    multi_query: float = 0.0
    merge: float = 0.0
    iou: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not math.isfinite(getattr(self, field.name)):
                raise ValueError(f"rewards.{field.name} must be finite, got {getattr(self, field.name)}")


def assign_rewards(rollouts: Sequence[Rollout], weights: RewardWeights, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill `rollout.rewards` with every part, weighted or not, and with "total".

    Parts lie in [0, 1]:
        f1, em: of the answer against the best gold answer; 0 without an answer.
        format: 1 for a rollout that closed its answer.
        gold_hit: share of the supporting passages shown, answer or not; 0 where no supporting passage is known.
        refine: 1 if there is an answer, its F1 is 0, and a normalised gold answer is part of the normalised text of
            the refine blocks; without an answer 0, whatever they hold. Sources: Search-R1 and AutoRefine, whose
            totals are `em=1` and `f1=1, refine=0.1`.
        multi_query: 1 if the rollout's searches hold more than `MULTI_QUERIES` queries on average and its answer is
            right (an F1 above 0: ours, the paper's threshold is not known).
        merge: 1 if a normalised gold answer is part of the normalised text of the merge blocks and the answer is right.
            Source of both: MultiSearch.
        iou: mask IoU of the region named and the one meant, as the environment measured it; 0 without an answer. A part
            only where an environment measures it.
    """
    measured = any("iou" in rollout.rewards for rollout in rollouts)
    for rollout in rollouts:
        answers = rollout.question.answers
        quality = f1(rollout.answer, answers)
        rollout.rewards = {
            **({"iou": rollout.rewards.get("iou", 0.0)} if measured else {}),
            "f1": quality,
            "em": exact_match(rollout.answer, answers),
            "format": closed_answer(rollout),
            "gold_hit": gold_hit(rollout) or 0.0,
            "refine": 0.0 if rollout.answer is None or quality else names_gold(rollout, SpanKind.REFINE, tokenizer),
            "multi_query": float(quality > 0 and rollout.queries_per_search > MULTI_QUERIES),
            "merge": names_gold(rollout, SpanKind.MERGE, tokenizer) if quality > 0 else 0.0,
        }
        rollout.rewards["total"] = sum(getattr(weights, name) * part for name, part in rollout.rewards.items())
