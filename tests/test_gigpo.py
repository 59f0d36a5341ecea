from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcredit.batch import RolloutBatch
from stepcredit.credit import GiGPO, SearchR1
from stepcredit.credit.gigpo import anchor_states
from stepcredit.credit.turns import Turns
from turn_rollouts import ANSWER, Turn, batches, by_turn, pieces, rollout, shuffled

#: Token sets of 20, of which 19 are shared with the next: Jaccard 19 / 21 = 0.905; the first and last share 18.
CHAIN = [tuple(range(30 + i, 50 + i)) for i in range(3)]


def found(message):
    return Turn(2, message)


def three():
    """One group: two rollouts that were shown the same, and one that was shown something else first."""
    return RolloutBatch.pack(
        [
            rollout([found((7, 8)), ANSWER], reward=1.0),
            rollout([found((7, 8)), ANSWER]),
            rollout([found((9,)), found((7, 8)), ANSWER], reward=1.0),
        ]
    )


def states(batch, similarity=1.0):
    """The states of turns, numbered as they appear."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(s, len(numbers)) for s in anchor_states(batch, Turns.of(batch), similarity).tolist()]


def test_mean_norm_by_hand():
    assert states(three()) == [0, 1, 0, 1, 0, 2, 1]
    credit = GiGPO(gamma=0.5, mode="mean_norm", omega=2.0)(three(), None)
    # returns: 1/2 1 | 0 0 | 1/4 1/2 1; after the prompt 1/2 0 1/4, after (7, 8) 1 0 1, after (9) one alone
    a, b, c = by_turn(three(), credit.advantages)
    assert a == pytest.approx([1 / 3 + 2 / 4, 1 / 3 + 2 / 3])
    assert b == pytest.approx([-2 / 3 - 2 / 4, -2 / 3 - 4 / 3])
    assert c == pytest.approx([1 / 3, 1 / 3, 1 / 3 + 2 / 3])
    assert credit.metrics["gigpo/turns"] == 7
    assert credit.metrics["gigpo/states"] == 3
    assert credit.metrics["gigpo/shared"] == pytest.approx(6 / 7)
    assert credit.metrics["gigpo/shared_later"] == pytest.approx(3 / 4)
    tokens = torch.tensor([5.0, 3, 5, 3, 5, 5, 3])  # of each turn: think, tag, two of the query, tag; think, answer
    bonus = torch.tensor([2 / 4, 2 / 3, 2 / 4, 4 / 3, 0, 0, 2 / 3])
    assert credit.metrics["advantage/bonus_abs_mean"] == pytest.approx(float((tokens * bonus).sum() / tokens.sum()))


def test_mean_std_norm_by_hand():
    a, b, c = by_turn(three(), GiGPO(gamma=0.5)(three(), None).advantages)
    high, low, std = 1 / 3**0.5, -2 / 3**0.5, 1 / 3**0.5  # 1 0 1 has mean 2/3 and deviation 1/sqrt(3)
    assert a == pytest.approx([high + 1, high + (1 / 3) / std], abs=1e-4)
    assert b == pytest.approx([low - 1, low - (2 / 3) / std], abs=1e-4)
    assert c == pytest.approx([high, high, high + (1 / 3) / std], abs=1e-4)


def test_similar_observations_share_a_state_over_chains():
    batch = RolloutBatch.pack([rollout([found(message), ANSWER]) for message in CHAIN])
    assert states(batch, 0.9) == [0, 1, 0, 1, 0, 1]  # the first and the last are joined by the one between
    assert states(batch, 0.91) == states(batch) == [0, 1, 0, 2, 0, 3]
    ends = RolloutBatch.pack([batch.rollouts[0], batch.rollouts[2]])
    assert states(ends, 0.9) == [0, 1, 0, 2]  # 18 / 22


def test_the_threshold_itself_is_similar():
    batch = RolloutBatch.pack([rollout([found(tuple(range(n))), ANSWER]) for n in (19, 20)])
    assert states(batch, 0.95) == [0, 1, 0, 1]
    assert states(batch, 0.951) == [0, 1, 0, 2]


def test_equal_observations_are_equal_in_order_and_number():
    messages = [(7, 8), (8, 7), (7, 7, 8)]
    batch = RolloutBatch.pack([rollout([found(message), ANSWER]) for message in messages])
    assert states(batch) == [0, 1, 0, 2, 0, 3]
    assert states(batch, 0.99) == [0, 1, 0, 1, 0, 1]  # of one set of tokens


def test_states_do_not_cross_groups():
    batch = RolloutBatch.pack([rollout([found((7, 8)), ANSWER], group=group) for group in (0, 1)])
    assert states(batch) == states(batch, 0.5) == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [{}, {"eps": 1e-2, "ddof": 0}, {"singleton": "zero"}])
@given(batch=batches())
@settings(max_examples=25, deadline=None)
def test_omega_zero_is_search_r1_to_the_bit(options, batch):
    assert torch.equal(GiGPO(omega=0.0, **options)(batch, None).advantages, SearchR1(**options)(batch, None).advantages)
    centred = GiGPO(omega=0.0, mode="mean_norm", **options)(batch, None).advantages
    assert torch.equal(centred, SearchR1(scale="none", **options)(batch, None).advantages)


def test_a_failing_group_learns_nothing_and_a_perfect_one_from_its_lengths():
    failing, perfect = (
        RolloutBatch.pack([rollout([found((7, 8))] * n + [ANSWER], reward=reward) for n in (1, 2)])
        for reward in (0.0, 1.0)
    )
    assert not GiGPO()(failing, None).advantages.any()
    short, long = by_turn(perfect, GiGPO(mode="mean_norm")(perfect, None).advantages)
    assert short[0] == pytest.approx((0.95 - 0.95**2) / 2)
    assert long[0] == pytest.approx((0.95**2 - 0.95) / 2)
    assert not GiGPO(gamma=1.0)(perfect, None).advantages.any()


@given(batch=batches(), similarity=st.sampled_from([0.5, 0.9, 1.0]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_ragged_batches_follow_the_formula_in_any_order(batch, similarity, data):
    method = GiGPO(gamma=0.9, similarity=similarity)
    turns = Turns.of(batch)
    state = anchor_states(batch, turns, similarity)
    credit = method(batch, None)
    outcome = SearchR1()(batch, None).advantages
    later = turns.last[turns.rollout] - torch.arange(len(turns))
    returns = 0.9 ** later.double() * batch.rewards[turns.rollout]
    for u in range(len(turns)):
        same = returns[state == state[u]]
        spread = float(same.max() - same.min()) > 1e-9
        step = (returns[u] - same.mean()) / (same.std() + 1e-6) if spread else 0.0
        at = int(turns.start[u])
        assert float(credit.advantages[at]) == pytest.approx(float(outcome[at] + step), abs=1e-3)
    order = data.draw(st.permutations(range(len(batch))))
    other = pieces(shuffled(batch, order), method(shuffled(batch, order), None).advantages)
    for b, mine in zip(order, other, strict=True):
        torch.testing.assert_close(mine, pieces(batch, credit.advantages)[b], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, r"credit\.gamma must be in \[0, 1\], got -0\.1"),
        ({"similarity": 0.0}, r"credit\.similarity must be in \(0, 1\], got 0\.0"),
        ({"omega": math.nan}, r"credit\.omega must be finite, got nan"),
        ({"mode": "std"}, r"credit\.mode must be one of mean_norm, mean_std_norm, got 'std'"),
    ],
)
def test_bad_constants_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GiGPO(**options)
