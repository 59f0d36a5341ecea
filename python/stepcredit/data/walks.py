"""Scripted walks over a corpus, for the warm start of self-play: questions made from passages alone.

A fact is a name or a number inside a sentence. A question is that sentence with "what" in the fact's place, so that it
works for any corpus with titles; its English is plain ("Lyon is a city in what?"), and better is left to learn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stepcredit.data.demonstrations import Demonstration
from stepcredit.environments.examiner import seed_question
from stepcredit.environments.search import cut_passage
from stepcredit.retrieval import Passage, Retriever
from stepcredit.rewards import normalize_answer, states
from stepcredit.rollout import Question

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_FACT = re.compile(r"(?<!\w)(?:[A-Z][\w'’-]*(?: [A-Z][\w'’-]*)*|\+?\d(?:[\d,.-]*\d)?)(?!\w)")
_DRAWS = 8  # seed passages that may be drawn for each walk


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk from a seed passage to one that it names.

    Attributes:
        examiner: the examiner's script: it searches for a name of the seed passage, and asks about what it found.
        question: what it asks, with a plan for the student: the titles of the passages, in order.
    """

    examiner: Demonstration
    question: Question


def scripted_walks(
    passages: Sequence[Passage],
    retriever: Retriever,
    count: int,
    *,
    top_k: int,
    passage_words: int | None = None,
    seed: int = 0,
) -> list[Walk]:
    """Walks whose questions hold, about half of them in two hops; deterministic for a seed.

    From a drawn passage a name is searched for, and the question asks for a fact of the passage that is found. Where
    that passage's title is the name, every other question is in two hops: it says of the name only what the first
    passage does ("Lyon is a city in X. The capital of X is what?").

    Args:
        passages: the corpus.
        retriever: finds them.
        count: walks to make.
        top_k, passage_words: as in `SearchEnvironment`.
        seed: of what is drawn.

    Raises:
        ValueError: `_DRAWS * count` drawn passages did not give as many walks.
    """
    rng = random.Random(seed)
    walks: list[Walk] = []
    for _ in range(_DRAWS):
        if len(walks) >= count:
            break
        drawn = [passages[rng.randrange(len(passages))] for _ in range(count)]
        starts = [(passage, fact) for passage in drawn if (fact := _draw(passage, passage_words, rng, name=True))]
        queries = [fact.answer for _, fact in starts]
        hits = retriever.search(queries, top_k).passages if queries else []
        for (start, fact), found in zip(starts, hits, strict=True):
            walk = _walk(start, fact, found, passage_words, rng)
            if walk is not None:
                walks.append(walk)
    if len(walks) < count:
        raise ValueError(
            f"the corpus of {len(passages)} passages gave {len(walks)} of {count} scripted walks: passages need "
            "titles, and names in their texts that a search finds; warm_start.steps=0 does without"
        )
    return walks[:count]


@dataclass(frozen=True, slots=True)
class _Fact:
    """A fact of a passage: `before`, `answer` and `after` are its sentence."""

    before: str
    answer: str
    after: str


def _walk(start: Passage, name: _Fact, found: Sequence[Passage], words: int | None, rng: random.Random) -> Walk | None:
    """The walk from a passage by one of its names, None where no question of it holds."""
    end = next((passage for passage in found if passage.id != start.id), None)
    fact = _draw(end, words, rng) if end is not None else None
    if end is None or fact is None:
        return None
    text = f"{fact.before}what{fact.after}?"
    plan: tuple[str, ...] = (end.title,)
    if normalize_answer(end.title) == normalize_answer(name.answer) and rng.random() < 0.5:
        clue = f"{name.before}X{name.after}"
        asked = re.sub(re.escape(end.title), "X", text, flags=re.IGNORECASE)
        if not states(clue, end.title) and asked != text:
            text, plan = f"{clue}. {asked}", (start.title, end.title)
    if states(text, fact.answer):
        return None
    identity = f"walk:{start.id}:{end.id}:{normalize_answer(fact.answer)}"
    question = Question(identity, text, (fact.answer,), plan=plan, kind="two_hop" if len(plan) == 2 else "one_hop")
    return Walk(Demonstration(seed_question(start, words), "walk", (name.answer,), fact.answer, asks=text), question)


def _draw(passage: Passage, words: int | None, rng: random.Random, *, name: bool = False) -> _Fact | None:
    """A fact of a passage as it is shown, a name if it is to be one; None where there is none, or no title."""
    shown, _ = cut_passage(passage, words)
    facts = [fact for fact in _facts(shown) if not (name and fact.answer[-1].isdigit())]
    return rng.choice(facts) if facts and normalize_answer(shown.title) else None


def _facts(passage: Passage) -> Iterator[_Fact]:
    """The facts of a passage. What begins a sentence, or shares a word with the title, is none."""
    title = set(normalize_answer(passage.title).split())
    for sentence in _SENTENCE_END.split(passage.text):
        sentence = sentence.strip().rstrip(".!?")
        topic = "" if states(sentence, passage.title) else f"{passage.title}: "
        for match in _FACT.finditer(sentence):
            normal = set(normalize_answer(match[0]).split())
            if match.start() and normal and not normal & title:
                yield _Fact(topic + sentence[: match.start()], match[0], sentence[match.end() :])
