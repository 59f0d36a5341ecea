"""What a rollout is worth: each measure of an answer, of refinements and of retrieval, defined once.

Texts are compared as SQuAD does (Rajpurkar et al. 2016, official evaluation script v1.1): lower case, ASCII punctuation
removed, the articles a / an / the removed, white space collapsed; the best gold answer counts. `train.rewards` weighs
the measures into a reward, `evaluate` averages them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from stepcredit.rollout import Rollout, SpanKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stepcredit.data.conversations import Fact

#: How the examiner of self-play is paid for the difficulty of its question (`difficulty_reward`).
Difficulty = Literal["medium", "hard"]

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


def contains_answer(text: str, answers: Iterable[str]) -> float:
    """1.0 if a normalised gold answer is part of the normalised text, else 0.0.

    A substring, as in AutoRefine's released code: "art" is part of "party". Gold answers that normalise to nothing are
    part of nothing.
    """
    normalised = normalize_answer(text)
    return float(any(gold and gold in normalised for gold in map(normalize_answer, answers)))


def names_gold(rollout: Rollout, kind: SpanKind, tokenizer: PreTrainedTokenizerBase) -> float:
    """1.0 if a gold answer is part of what stands in the rollout's spans of a kind, such as REFINE, joined by spaces
    (`contains_answer`), else 0.0, which it is without such a span."""
    blocks = [s for s in rollout.spans if s.kind is kind]
    text = " ".join(str(tokenizer.decode(rollout.tokens[s.start : s.stop])) for s in blocks)
    return contains_answer(text, rollout.question.answers)


def closed_answer(rollout: Rollout) -> float:
    """The format: 1.0 for a rollout that closed its answer, else 0.0."""
    return float(rollout.finish == "answered")


def gold_hit(rollout: Rollout) -> float | None:
    """Retrieval recall: share of the question's supporting passages that were shown, in [0, 1]; None when none are
    known.

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


def difficulty_reward(right: int, attempts: int, form: Difficulty = "medium") -> float:
    """What a question is worth to its examiner when `right` of `attempts` are, in [0, 1]; 0 for none and for all.

    Args:
        right: k, at least 0 and at most n.
        attempts: n, at least 2.
        form: "medium" is 4 k (n - k) / n^2, most where half of the attempts are right; "hard" is (n - k) / (n - 1),
            most where one is.

    Source: pi-Play (arXiv 2604.14054) rewards medium difficulty by a formula that is not known; both are ours.
    """
    if attempts < 2 or not 0 <= right <= attempts:
        raise ValueError(f"right must lie in [0, attempts] and attempts be at least 2, got {right} of {attempts}")
    if right in (0, attempts):
        return 0.0
    if form == "medium":
        return 4 * right * (attempts - right) / attempts**2
    return (attempts - right) / (attempts - 1)


def right_region(rollout: Rollout) -> float:
    """1.0 if the region that was named and the one that is meant overlap by an IoU of at least one half (the usual
    precision at 0.5 of referring segmentation), else 0.0. The regions of a scene share no pixel, so that half of the
    union is hardly ever half of another one's too."""
    return float(rollout.rewards.get("iou", 0.0) >= 0.5)


def coverage(found: Collection[str], evidence: Collection[str], alpha: float) -> float:
    """How well what was found covers the evidence, in [0, 1]: `alpha * recall + (1 - alpha) * Jaccard index`.

    Recall is `|found & evidence| / |evidence|`; the Jaccard index, `|found & evidence| / |found | evidence|`, also pays
    for leaving out the rest.

    Args:
        found, evidence: ids; repeated ones count once.
        alpha: weight of the recall, in [0, 1].

    Raises:
        ValueError: `evidence` is empty, so that nothing could be covered, or `alpha` is out of range.

    Source: CoMAM (arXiv 2603.12631).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    wanted, got = set(evidence), set(found)
    if not wanted:
        raise ValueError("evidence is empty: there is nothing to cover")
    common = len(wanted & got)
    return alpha * common / len(wanted) + (1 - alpha) * common / len(wanted | got)


def states(text: str, value: str) -> bool:
    """Whether the normalised value stands in the normalised text as whole words: "tea" does not in "steam"."""
    wanted = normalize_answer(value)
    return bool(wanted) and f" {wanted} " in f" {normalize_answer(text)} "


def facts_stated(text: str, facts: Sequence[Fact]) -> float:
    """Share of the facts that a text states, in [0, 1]: it names the fact's value (`states`) and none of the values
    that the fact had before. 0.0 without facts. Ours: it reads no sentence, so that "tea, no longer coffee" counts as
    a contradiction."""
    if not facts:
        return 0.0
    stated = [states(text, f.value) and not any(states(text, old) for old in f.outdated) for f in facts]
    return sum(stated) / len(facts)


# A letter that is marked as one, and what follows it.
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[).:])(.*)", re.DOTALL)


def chosen_option(answer: str | None, options: Sequence[str]) -> int | None:
    """Which option an answer chooses: by its text, by its letter ("b", "(b)", "B."), or by both where they agree; None
    where it chooses none. Options are lettered from (a); a text that begins like a letter ("C. elegans") is a text
    where an option is that."""
    text = (answer or "").strip()
    named = {normalize_answer(option): i for i, option in enumerate(options)}.get(normalize_answer(text))
    if marked := _LETTER.fullmatch(text):
        letter, rest = marked[1] or marked[2], marked[3].strip()
        as_written = [_words(option) for option in options]  # with articles: the letter may be an "a"
        if rest and _words(text) in as_written:
            return as_written.index(_words(text))
    elif named is not None or len(text) != 1:
        return named
    else:
        letter, rest = text, ""
    number = ord(letter.lower()) - ord("a")
    if not 0 <= number < len(options) or (rest and normalize_answer(rest) != normalize_answer(options[number])):
        return None
    return number


def _words(text: str) -> list[str]:
    return text.lower().translate(_PUNCTUATION).split()


def _shown(rollout: Rollout) -> set[str]:
    return {passage for search in rollout.searches for passage in search.passage_ids}
