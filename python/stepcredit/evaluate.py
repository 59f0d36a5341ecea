"""Means of a set of rollouts: answers, retrieval, how they ended.

Each measure is defined in `stepcredit.rewards`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from stepcredit.rewards import any_gold_hit, closed_answer, exact_match, f1, gold_hit, right_region
from stepcredit.rollout import Rollout


def summarize(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over rollouts. Every value is finite; shares lie in [0, 1].

    Keys:
        rollouts: how many rollouts were averaged.
        em, f1: answer quality; a rollout without an answer scores 0.
        em_<kind>: EM of the questions of one kind ("em_one_hop"); f1 and hit likewise. Questions without a kind
            are in the overall means only.
        finished: share that closed their answer (`finish == "answered"`).
        finish_<reason>: number of rollouts that ended for each reason.
        searches: executed searches per rollout, failed retrievals included.
        hit: mean `gold_hit`, the share of supporting passages shown ("gold passages" in a run's last line).
        any_hit: mean `any_gold_hit`, the share of rollouts shown at least one supporting passage.
        without_supporting: rollouts left out of `hit` and `any_hit` because no supporting passage is known. When
            that is all of them, `hit` and `any_hit` are absent: there is nothing to report.
        count_<name>: sum of the rollouts' `counts[name]` ("count_forged_tags").
        clarify/<name>: of rollouts in scenes, see `clarification`.

    Raises ValueError when there are no rollouts.
    """
    if not rollouts:
        raise ValueError("rollouts is empty: nothing to summarize")
    result = {
        "rollouts": float(len(rollouts)),
        "finished": fmean(map(closed_answer, rollouts)),
        "searches": fmean(len(r.searches) for r in rollouts),
        "without_supporting": float(sum(not r.question.supporting for r in rollouts)),
        **_quality(rollouts, ""),
    }
    any_hits = [hit for r in rollouts if (hit := any_gold_hit(r)) is not None]
    if any_hits:
        result["any_hit"] = fmean(any_hits)
    for kind in sorted({r.question.kind for r in rollouts} - {""}):
        result |= _quality([r for r in rollouts if r.question.kind == kind], f"_{kind}")
    for reason, number in sorted(Counter(r.finish for r in rollouts).items()):
        result[f"finish_{reason}"] = float(number)
    for rollout in rollouts:
        for name, number in rollout.counts.items():
            result[f"count_{name}"] = result.get(f"count_{name}", 0.0) + number
    return result | clarification(rollouts)


def clarification(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over rollouts whose environment measured the region they name; nothing when there are none.

    Keys:
        clarify/iou: mean IoU of the region named and the one meant, 0 without an answer; clarify/iou_<kind>: the same
            of the questions of one kind.
        clarify/right: share whose IoU is at least one half; clarify/right_asked of those that asked a question,
            clarify/right_guessed of those that asked none (each absent when there are none).
        clarify/questions: questions per rollout that the user replied to.
        clarify/bits: mean bits of a question (absent without questions), log2 of the candidates before over those
            after; clarify/idle: share of the questions that told nothing.
    """
    rollouts = [r for r in rollouts if "iou" in r.rewards]
    if not rollouts:
        return {}
    asked = [r.inquiries for r in rollouts]
    bits = [inquiry.bits for inquiries in asked for inquiry in inquiries]
    right = [right_region(r) for r in rollouts]
    result = {
        "clarify/iou": fmean(r.rewards["iou"] for r in rollouts),
        "clarify/right": fmean(right),
        "clarify/questions": len(bits) / len(rollouts),
    }
    for kind in sorted({r.question.kind for r in rollouts} - {""}):
        result[f"clarify/iou_{kind}"] = fmean(r.rewards["iou"] for r in rollouts if r.question.kind == kind)
    for name, has in (("right_asked", True), ("right_guessed", False)):
        if chosen := [good for good, inquiries in zip(right, asked, strict=True) if bool(inquiries) is has]:
            result[f"clarify/{name}"] = fmean(chosen)
    if bits:
        result |= {"clarify/bits": fmean(bits), "clarify/idle": fmean(b == 0 for b in bits)}
    return result


def _quality(rollouts: Sequence[Rollout], suffix: str) -> dict[str, float]:
    hits = [hit for r in rollouts if (hit := gold_hit(r)) is not None]
    return {
        f"em{suffix}": fmean(exact_match(r.answer, r.question.answers) for r in rollouts),
        f"f1{suffix}": fmean(f1(r.answer, r.question.answers) for r in rollouts),
        **({f"hit{suffix}": fmean(hits)} if hits else {}),
    }
