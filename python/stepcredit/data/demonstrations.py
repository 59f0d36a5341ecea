"""Scripted searchers of mixed quality, for the supervised warm start.

A policy that only saw good plans has nothing left to learn from; one that saw none does not search at all. So a known
share of the demonstrations searches badly, in ways that step-level credit can tell apart. What is scripted here is
what a searcher would write; `train/warm_start.py` runs it against the environment.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import accumulate

from stepcredit.data.referring import OPEN_QUESTIONS
from stepcredit.rollout import Question


@dataclass(frozen=True, kw_only=True, slots=True)
class DemonstrationMix:
    """Shares of the demonstrations by quality; they must sum to 1.

    "question" and "fragments" are cut from the question itself, "guess" and "idle" need nothing; the others need its
    plan.

    Attributes:
        good: the question's plan, every query in order.
        question: one search, for the question's own text.
        one_hop: the plan's first query only. A plan of one query has no later hop to leave out and stays good.
        repeat: the plan's first query twice.
        fragments: two searches, each for two to four neighbouring words of the question.
        guess: no search at all: the answer at once.
        idle: of scenes: one question to the user, about an attribute that the plan does not ask for.
    """

    good: float = 0.4
    question: float = 0.2
    one_hop: float = 0.2
    repeat: float = 0.2
    fragments: float = 0.0
    guess: float = 0.0
    idle: float = 0.0

    def __post_init__(self) -> None:
        for share in fields(self):
            if not 0 <= getattr(self, share.name) <= 1:
                raise ValueError(f"{share.name} must lie in [0, 1], got {getattr(self, share.name)}")
        if abs(sum(astuple(self)) - 1) > 1e-6:
            raise ValueError(f"the shares must sum to 1, got {sum(astuple(self)):g}: {self}")

    @property
    def needs_plan(self) -> bool:
        """Whether a quality that needs the question's plan has a share."""
        return self.good + self.one_hop + self.repeat > 0


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A searcher's script.

    Attributes:
        question: what is asked.
        quality: the field of `DemonstrationMix` it was drawn under.
        queries: what it searches for, or asks a user, in order; () for a guess. Where a search holds several queries,
            one a line.
        answer: what it answers: as a rule the first gold answer, whether or not the searches found it.
        merges: what it merges after each search; () when it merges nothing.
        later: its scripts for the episodes after the first, where the environment asks for several.
        asks: of an examiner's script, the question that it writes before its answer.
    """

    question: Question
    quality: str
    queries: tuple[str, ...]
    answer: str
    merges: tuple[str, ...] = ()
    later: tuple[Demonstration, ...] = ()
    asks: str = ""


def demonstrate(question: Question, quality: str, rng: random.Random) -> Demonstration:
    """The script of one quality; `rng` draws fragments and idle questions. ValueError for an unknown quality, or one
    that needs a plan where the question has none."""
    plan = question.plan
    scripts: dict[str, tuple[str, ...]] = {
        "good": plan,
        "question": (question.text,),
        "one_hop": plan[:1],
        "repeat": plan[:1] * 2,
        "fragments": (fragment(question.text, rng), fragment(question.text, rng)),
        "guess": (),
        "idle": (),
    }
    if quality == "idle":
        scripts["idle"] = (rng.choice([asks for asks in OPEN_QUESTIONS.values() if asks not in plan]),)
    if quality not in scripts:
        raise ValueError(f"quality is {quality!r}, expected one of {', '.join(scripts)}")
    if not scripts[quality] and quality != "guess":
        raise ValueError(f"question {question.id!r} has no plan, so it cannot be demonstrated as {quality!r}")
    return Demonstration(question=question, quality=quality, queries=scripts[quality], answer=question.answers[0])


def in_parallel(
    scripts: Sequence[Demonstration], *, several: float, merged: float, seed: int = 0
) -> list[Demonstration]:
    """Scripts for a grammar with several queries a search and a merge after it, drawn independently of their quality.

    A search of several queries asks for the script's own query, the question's text and a few words of it. A merge
    names what the plan's hop leads to ("Lyon: France"), after its last hop or without a plan the answer, whether or not
    the passages told it.

    Args:
        scripts: of a grammar with one query a search.
        several: share of the scripts whose searches become several queries, in [0, 1].
        merged: share of the scripts that merge, in [0, 1].
        seed: of what is drawn.
    """
    rng = random.Random(seed)
    result = []
    for script in scripts:
        queries, merges = script.queries, script.merges
        if rng.random() < several:
            text = script.question.text
            queries = tuple("\n".join((query, text, fragment(text, rng))) for query in queries)
        if rng.random() < merged:
            merges = tuple(_merge(script, step) for step in range(len(queries)))
        result.append(replace(script, queries=queries, merges=merges))
    return result


def _merge(script: Demonstration, step: int) -> str:
    hop = script.queries[step]
    plan = script.question.plan
    onward = plan[plan.index(hop) + 1 :] if hop in plan else ()
    return f"{hop}: {onward[0] if onward else script.answer}"


def fragment(text: str, rng: random.Random) -> str:
    """Two to four neighbouring words of the text, without the question mark; all of a shorter one."""
    words = text.rstrip("? ").split()
    count = min(rng.randint(2, 4), len(words))
    start = rng.randint(0, len(words) - count)
    return " ".join(words[start : start + count])


def demonstrations(
    questions: Sequence[Question], mix: DemonstrationMix | None = None, seed: int = 0
) -> list[Demonstration]:
    """One demonstration per question, in the order given; deterministic for a seed.

    The shares of `mix` (None: the defaults) hold to within one demonstration, not only on average.
    """
    bounds = list(accumulate(astuple(mix or DemonstrationMix())))[:-1]
    names = [share.name for share in fields(DemonstrationMix)]
    ranks = list(range(len(questions)))
    rng = random.Random(seed)
    rng.shuffle(ranks)
    return [
        demonstrate(question, names[bisect(bounds, (rank + 0.5) / len(questions))], rng)
        for question, rank in zip(questions, ranks, strict=True)
    ]
