from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcredit.batch import RolloutBatch
from stepcredit.credit import SearchR1, StepSearch
from stepcredit.credit.step_search import coverage
from stepcredit.rewards import gold_hit
from stepcredit.rollout import Search
from turn_rollouts import ANSWER, Turn, batches, pieces, rollout, shuffled

GOLD = ("a", "b")


def shown(*passages, query=2):
    return Turn(query, passages=passages)


def test_gain_and_redundancy_by_hand():
    one = rollout([shown("a", "x"), shown("a", "b", "x", "y"), shown("b"), shown(), ANSWER], supporting=GOLD)
    assert coverage(one) == [(0.5, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 0.0)]


def test_what_cannot_be_valued_is_counted_by_reason():
    known = rollout([shown("a"), Turn(2, failed=True), shown("b", "a"), ANSWER], supporting=GOLD)
    unknown = rollout([shown("a"), ANSWER])
    unrecorded = replace(rollout([shown("a"), ANSWER], supporting=GOLD), searches=[], rewards={"total": 0.0})
    assert coverage(known) == [(0.5, 0.0), "failed_retrieval", (0.5, 0.5)]
    assert coverage(unknown) == ["no_supporting"]
    assert coverage(unrecorded) == ["no_record"]
    metrics = StepSearch()(RolloutBatch.pack([known, unknown, unrecorded]), None).metrics
    assert metrics["step_search/steps"] == 5
    assert metrics["step_search/scored"] == 2
    for reason in ("no_supporting", "no_record", "failed_retrieval"):
        assert metrics[f"step_search/unscored_{reason}"] == 1
    assert metrics["step_search/gain"] == 0.5
    assert metrics["step_search/redundancy"] == 0.25


def test_several_queries_of_a_step_are_one_search():
    one = rollout([shown("a"), shown("x"), ANSWER], supporting=GOLD)
    one.searches = [Search(0, "1", ("a",)), Search(0, "2", ("b",)), Search(1, "3", (), True), Search(1, "4", ("a",))]
    assert coverage(one) == [(1.0, 0.0), (0.0, 1.0)]


def pair():
    return RolloutBatch.pack(
        [
            rollout([shown("a", query=1), shown("a", "b", query=4), ANSWER], reward=1.0, supporting=GOLD),
            rollout([shown("x", query=2), shown("x", query=2), ANSWER], supporting=GOLD),
        ]
    )


def test_values_go_to_the_queries():
    batch = pair()
    bonus = StepSearch(alpha=2.0, redundancy=0.5)(batch, None).advantages - SearchR1()(batch, None).advantages
    for step, value in enumerate([2 * 0.5, 2 * (0.5 - 0.25), 0.0, 2 * -0.5]):
        query = batch.step_ids == step
        assert bonus[query].tolist() == pytest.approx([value / int(query.sum())] * int(query.sum()), abs=1e-6)
    assert not bonus[batch.step_ids < 0].any()


def test_values_go_to_the_closing_token():
    batch = pair()
    bonus = StepSearch(placement="closing")(batch, None).advantages - SearchR1()(batch, None).advantages
    closing = [7, 16]  # as in test_tips
    assert bonus[closing].tolist() == pytest.approx([0.5, 0.0], abs=1e-6)
    assert float(bonus.sum()) == pytest.approx(0.5 + 0.0 + 0.0 - 1.0, abs=1e-6)
    assert not bonus[batch.step_ids >= 0].any()


def test_a_failing_group_learns_on_queries_that_found_or_repeated():
    batch = pair()
    batch.rewards.zero_()
    credit = StepSearch()(batch, None)
    assert set(batch.step_ids[credit.advantages != 0].tolist()) == {0, 3}  # 0.5 - 0.5 and 0 - 0 are no credit


@pytest.mark.parametrize("placement", ["query", "closing"])
@given(batch=batches())
@settings(max_examples=25, deadline=None)
def test_alpha_zero_is_search_r1_to_the_bit(placement, batch):
    credit = StepSearch(alpha=0.0, placement=placement)(batch, None)
    assert torch.equal(credit.advantages, SearchR1()(batch, None).advantages)
    assert not credit.advantages[~batch.policy_mask].any()
    assert all(math.isfinite(value) for value in credit.metrics.values())


@given(batch=batches(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_gains_add_up_to_the_recall_in_any_order(batch, data):
    for one in batch.rollouts:
        values = coverage(one)
        assert len(values) == len(one.steps())
        assert all(0 <= p <= 1 and 0 <= g <= 1 for g, p in (v for v in values if not isinstance(v, str)))
        if one.question.supporting:
            assert sum(v[0] for v in values if not isinstance(v, str)) == pytest.approx(gold_hit(one))
    order = data.draw(st.permutations(range(len(batch))))
    plain, other = StepSearch()(batch, None), StepSearch()(shuffled(batch, order), None)
    for b, mine in zip(order, pieces(shuffled(batch, order), other.advantages), strict=True):
        torch.testing.assert_close(mine, pieces(batch, plain.advantages)[b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": math.inf}, r"credit\.alpha must be finite, got inf"),
        ({"redundancy": -1.0}, r"credit\.redundancy must be at least 0, got -1\.0"),
        ({"placement": "turn"}, r"credit\.placement must be one of query, closing, got 'turn'"),
    ],
)
def test_bad_constants_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StepSearch(**options)
