"""Scripted agents of the memory pipeline, of two qualities, for the supervised warm start."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from stepcredit.data.conversations import MemoryQuestion
from stepcredit.data.demonstrations import fragment
from stepcredit.rewards import normalize_answer, states

# Of the bad scripts: shares of the messages with evidence that are not kept, and of the small talk.
_FORGOTTEN, _IGNORED = 0.5, 0.8


@dataclass(frozen=True, slots=True)
class MemoryScript:
    """What the agents write for one question.

    Attributes:
        notes: the fine memory.
        profile: the coarse memory.
        query: what the retrieval agent searches for.
        answer: what it answers: the option that is gold, or the first gold answer.
    """

    notes: str
    profile: str
    query: str
    answer: str


def memory_scripts(questions: Sequence[MemoryQuestion], good: float, seed: int = 0) -> list[MemoryScript]:
    """One script per question, in the order given; deterministic for a seed.

    A good one keeps every message about a fact and the question's evidence, writes down each fact as it holds at the
    end, and searches for the question's plan (its text where it has none). A bad one forgets half of the messages,
    keeps small talk instead, writes outdated values where there are any, and searches for a few words of the question.
    Both write down only facts of which something was kept, and both answer right.

    Args:
        questions: with or without known facts; without, the question's evidence is all that is kept.
        good: share of the scripts that are good, in [0, 1]; it holds to within one script.
        seed: of what is drawn.
    """
    rng = random.Random(seed)
    ranks = list(range(len(questions)))
    rng.shuffle(ranks)
    return [
        _script(question, (rank + 0.5) / len(questions) < good, rng)
        for question, rank in zip(questions, ranks, strict=True)
    ]


def _script(question: MemoryQuestion, good: bool, rng: random.Random) -> MemoryScript:
    conversation = question.conversation
    about = {name: fact for fact in conversation.facts for name in fact.evidence}
    kept, notes = set(), []
    for number, message in enumerate(conversation.messages, start=1):
        wanted = message.id in about or message.id in question.supporting
        if not wanted if good else rng.random() < (_FORGOTTEN if wanted else _IGNORED):
            continue
        kept.add(message.id)
        fact = about.get(message.id)
        values = () if fact is None else (fact.value, *fact.outdated)
        said = next((value for value in values if states(message.text, value)), None)
        notes.append(f"[{number}]" if fact is None or said is None else f"[{number}] {fact.topic}: {said}")
    profile = [
        f"{fact.topic}: {fact.value if good or not fact.outdated else fact.outdated[-1]}"
        for fact in conversation.facts
        if kept & set(fact.evidence)
    ]
    gold = set(map(normalize_answer, question.answers))
    answer = next((o for o in question.options if normalize_answer(o) in gold), question.answers[0])
    return MemoryScript(
        notes="\n".join(notes),
        profile="\n".join(profile),
        query=(" ".join(question.plan) or question.text) if good else fragment(question.text, rng),
        answer=answer,
    )
