"""Exact match, F1 and retrieval recall of rollouts.

Answers are compared as SQuAD does (Rajpurkar et al. 2016, official evaluation script v1.1): lower case, ASCII
punctuation removed, the articles a / an / the removed, white space collapsed; the best gold answer counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from stepcredit.rollout import Rollout

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, single spaces. "The U.S. Dollar" -> "us dollar"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str | None, answers: Iterable[str]) -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0.

    No prediction (None) and a prediction that normalises to nothing ("", "the") score 0.0, whatever the gold.
    """
    predicted = normalize_answer(prediction or "")
    return float(bool(predicted) and any(predicted == normalize_answer(answer) for answer in answers))


def f1(prediction: str | None, answers: Iterable[str]) -> float:
    """Token F1 in [0, 1] against the best gold answer; tokens are words after normalisation, counted with
    multiplicity. None, or nothing left after normalisation, scores 0.0."""
    predicted = Counter(normalize_answer(prediction or "").split())
    best = 0.0
    for answer in answers:
        gold = Counter(normalize_answer(answer).split())
        common = (predicted & gold).total()
        if common:
            best = max(best, 2 * common / (predicted.total() + gold.total()))
    return best


def gold_hit(rollout: Rollout) -> float | None:
    """Share of the question's supporting passages that were shown, in [0, 1]; None when none are known.

    A two-hop question whose first passage alone was shown has a gold hit of 0.5.
    """
    supporting = set(rollout.question.supporting)
    if not supporting:
        return None
    return len(supporting & _shown(rollout)) / len(supporting)


def any_gold_hit(rollout: Rollout) -> float | None:
    """1.0 if at least one supporting passage was shown, else 0.0; None when none are known."""
    supporting = set(rollout.question.supporting)
    if not supporting:
        return None
    return float(not supporting.isdisjoint(_shown(rollout)))


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

    Raises ValueError when there are no rollouts.
    """
    if not rollouts:
        raise ValueError("rollouts is empty: nothing to summarize")
    result = {
        "rollouts": float(len(rollouts)),
        "finished": fmean(r.finish == "answered" for r in rollouts),
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
    return result


def _quality(rollouts: Sequence[Rollout], suffix: str) -> dict[str, float]:
    hits = [hit for r in rollouts if (hit := gold_hit(r)) is not None]
    return {
        f"em{suffix}": fmean(exact_match(r.answer, r.question.answers) for r in rollouts),
        f"f1{suffix}": fmean(f1(r.answer, r.question.answers) for r in rollouts),
        **({f"hit{suffix}": fmean(hits)} if hits else {}),
    }


def _shown(rollout: Rollout) -> set[str]:
    return {passage for search in rollout.searches for passage in search.passage_ids}
