import math

import pytest

from stepcredit.evaluate import any_gold_hit, exact_match, f1, gold_hit, normalize_answer, summarize
from stepcredit.rollout import Question, Rollout, Search, Span, SpanKind


def rollout(answer, *, answers=("Paris",), supporting=("a", "b"), shown=(), kind="", finish="answered", counts=None):
    """A rollout of three tokens; `shown` has the passage ids of each search."""
    return Rollout(
        question=Question(id="q", text="?", answers=answers, supporting=supporting, kind=kind),
        tokens=[1, 2, 3],
        prompt_length=1,
        spans=[Span(SpanKind.PROMPT, 0, 1), Span(SpanKind.ANSWER, 1, 3)],
        logprobs=[math.nan, -1.0, -1.0],
        finish=finish,
        answer=answer,
        searches=[Search(step, "query", tuple(ids)) for step, ids in enumerate(shown)],
        counts=counts or {},
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S. Dollar!", "us dollar"),
        ("  an   Apple a day ", "apple day"),
        ("theatre, anagram", "theatre anagram"),  # articles are whole words
        ("Porto-Novo", "portonovo"),
        ("Ōsaka", "ōsaka"),
        ("the", ""),
    ],
)
def test_normalize_answer_follows_squad(text, expected):
    assert normalize_answer(text) == expected


def test_exact_match_takes_the_best_gold_answer():
    assert exact_match("the euro.", ("EUR", "Euro")) == 1.0
    assert exact_match("euros", ("EUR", "Euro")) == 0.0


@pytest.mark.parametrize("nothing", [None, "", " ", "the", "..."])
@pytest.mark.parametrize("gold", ["Paris", "The"])
def test_no_prediction_scores_zero_even_against_a_gold_answer_of_articles(nothing, gold):
    assert exact_match(nothing, (gold,)) == 0.0
    assert f1(nothing, (gold,)) == 0.0


def test_f1_counts_words_with_multiplicity():
    assert f1("New York", ("New York City",)) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert f1("york york", ("york",)) == pytest.approx(2 / 3)
    assert f1("Rome", ("Paris", "Rome, Italy")) == pytest.approx(2 / 3)  # the best gold answer
    assert f1("Rome", ("Paris",)) == 0.0


def test_gold_hit_is_a_share_and_any_gold_hit_is_all_or_nothing():
    half = rollout("x", shown=[("a", "z"), ("a",)])
    assert gold_hit(half) == 0.5
    assert any_gold_hit(half) == 1.0
    assert gold_hit(rollout("x", shown=[("b",), ("a",)])) == 1.0
    miss = rollout("x", shown=[("z",), ()])
    assert gold_hit(miss) == any_gold_hit(miss) == 0.0
    unknown = rollout("x", supporting=(), shown=[("a",)])
    assert gold_hit(unknown) is any_gold_hit(unknown) is None


def test_summarize():
    result = summarize(
        [
            rollout("paris", kind="one_hop", supporting=("a",), shown=[("a",)], counts={"forged_tags": 2}),
            rollout("Paris France", kind="two_hop", shown=[("a",), ("z",)], counts={"forged_tags": 1}),
            rollout(None, kind="two_hop", shown=[], finish="context"),
            rollout("Paris", supporting=(), shown=[("a",)]),
        ]
    )
    assert result == {
        "rollouts": 4,
        "em": 0.5,
        "f1": pytest.approx((1 + 2 / 3 + 0 + 1) / 4),
        "hit": 0.5,
        "any_hit": pytest.approx(2 / 3),
        "without_supporting": 1,
        "finished": 0.75,
        "finish_answered": 3,
        "finish_context": 1,
        "searches": 1.0,
        "em_one_hop": 1.0,
        "f1_one_hop": 1.0,
        "hit_one_hop": 1.0,
        "em_two_hop": 0.0,
        "f1_two_hop": pytest.approx(1 / 3),
        "hit_two_hop": 0.25,
        "count_forged_tags": 3,
    }


def test_summarize_leaves_out_what_cannot_be_measured():
    result = summarize([rollout("Paris", supporting=())])
    assert "hit" not in result
    assert "any_hit" not in result
    assert result["without_supporting"] == 1
    with pytest.raises(ValueError, match="rollouts is empty"):
        summarize([])
