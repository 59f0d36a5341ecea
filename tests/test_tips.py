from __future__ import annotations

import math
from copy import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepcredit.credit.tips
from scripted_rollouts import SEARCH_R1, random_policy, write
from stepcredit.batch import RolloutBatch
from stepcredit.counterfactual import score_steps
from stepcredit.credit import TIPS, SearchR1
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer
from tokenizers_under_test import BUILT
from turn_rollouts import ANSWER, Turn, batches, gains_of, pieces, rollout, shuffled

NAN = math.nan
TOKENIZER = BUILT["byte_bpe"]()
RIVER = Question("a", "Which river flows through Lyon?", ("Rhône", "the river Rhône", "Rhone"))


def run(batch, scores, **options):
    """TIPS with these scores [step][answer][after, before]; a step whose scores are all NaN is unscored."""
    gain = [NAN if all(a != a for row in step for a in row) else 0.0 for step in scores]
    with pytest.MonkeyPatch.context() as patch:
        made = gains_of(batch, gain, scores=scores)
        patch.setattr(stepcredit.credit.tips, "score_steps", lambda *_, **__: made)
        return TIPS(**options)(batch, None)


def lse(*values):
    return math.log(sum(map(math.exp, values)))


SCORES = [[[-1.0, -3.0], [-2.0, -2.0]], [[-4.0, -1.0], [NAN, NAN]], [[NAN, NAN], [NAN, NAN]]]


def three():
    """A right answer after two searches, and a wrong one after one; the second gold answer is the first one's alone."""
    return RolloutBatch.pack([rollout([Turn(1), Turn(4), ANSWER], reward=1.0), rollout([Turn(2), ANSWER])])


def test_shaping_by_hand():
    batch = three()
    plain = SearchR1()(batch, None).advantages
    credit = run(batch, SCORES, alpha=0.5)
    first = lse(-1, -2) - lse(-3, -2)
    bonus = credit.advantages - plain
    assert bonus[batch.step_ids == 0].tolist() == pytest.approx([0.5 * first], abs=1e-6)
    assert bonus[batch.step_ids == 1].tolist() == pytest.approx([0.5 * -3 / 4] * 4, abs=1e-6)
    assert not bonus[batch.step_ids == 2].any()
    assert not bonus[batch.step_ids < 0].any()
    assert credit.metrics["tips/potential"] == pytest.approx((lse(-1, -2) - 4) / 2)
    assert credit.metrics["tips/shaping"] == pytest.approx((first - 3) / 2)
    assert credit.metrics["tips/positive_share"] == 0.5
    assert credit.metrics["advantage/bonus_abs_mean"] == pytest.approx((0.5 * first + 4 * 0.5 * 3 / 4) / 5)


def test_the_closing_token_takes_it_all():
    batch = three()
    bonus = run(batch, SCORES, alpha=0.5, placement="closing").advantages - SearchR1()(batch, None).advantages
    # prompt 0-3, think 4, tag 5, query 6, tag 7, message 8-9, think 10, tag 11, query 12-15, tag 16
    assert bonus.nonzero().squeeze(1).tolist() == [7, 16]
    assert bonus[[7, 16]].tolist() == pytest.approx([0.5 * (lse(-1, -2) - lse(-3, -2)), -1.5], abs=1e-6)


@pytest.mark.parametrize("placement", ["query", "closing"])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-2, "ddof": 0}, {"scale": "none", "singleton": "zero"}])
@given(batch=batches())
@settings(max_examples=15, deadline=None)
def test_alpha_zero_is_search_r1_to_the_bit(placement, options, batch):
    scores = torch.randn(batch.num_steps, 2, 2).tolist()
    credit = run(batch, scores, alpha=0.0, placement=placement, **options)
    assert torch.equal(credit.advantages, SearchR1(**options)(batch, None).advantages)


@given(batch=batches(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_ragged_batches_follow_the_formula(batch, data):
    value = st.sampled_from([-5.0, -1.0, -0.25])
    step = st.one_of(st.just([[NAN, NAN]] * 2), st.lists(st.tuples(value, value).map(list), min_size=2, max_size=2))
    scores = data.draw(st.lists(step, min_size=batch.num_steps, max_size=batch.num_steps))
    plain = SearchR1()(batch, None).advantages
    bonus = run(batch, scores, alpha=0.5).advantages - plain
    closing = run(batch, scores, alpha=0.5, placement="closing").advantages - plain
    for s, answers in enumerate(scores):
        query = batch.step_ids == s
        gain = 0.5 * (lse(*(a for a, _ in answers)) - lse(*(b for _, b in answers)))
        assert float(bonus[query].sum()) == pytest.approx(0.0 if gain != gain else gain, abs=1e-5)
    assert not bonus[batch.step_ids < 0].any()
    assert not closing[batch.step_ids >= 0].any()
    assert float(closing.sum()) == pytest.approx(float(bonus.sum()), abs=1e-5)
    order = data.draw(st.permutations(range(len(batch))))
    steps = [s for b in order for s in range(batch.num_steps) if batch.step_rollout[s] == b]
    other = run(shuffled(batch, order), [scores[s] for s in steps], alpha=0.5).advantages
    for b, mine in zip(order, pieces(shuffled(batch, order), other), strict=True):
        torch.testing.assert_close(mine, pieces(batch, plain + bonus)[b], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": math.nan}, r"credit\.alpha must be finite, got nan"),
        ({"placement": "tag"}, r"credit\.placement must be one of query, closing, got 'tag'"),
        ({"teacher": "judge"}, r"credit\.teacher must be one of policy, reference, got 'judge'"),
        ({"max_context": 0}, r"credit\.max_context must be at least 1, got 0"),
    ],
)
def test_bad_constants_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TIPS(**options)


# With a policy and a teacher


def scorer(seed=1):
    torch.manual_seed(seed)
    return PolicyScorer(random_policy("llama", TOKENIZER, initializer_range=0.1 + 0.05 * seed), TOKENIZER, SEARCH_R1)


@pytest.fixture(scope="module")
def policy():
    return scorer()


def searched(rewards=(0.0, 0.0)):
    seen = [("river", "Lyon lies on the Rhône.", None), ("Lyon again", "Paris is the capital.", None)]
    seen.append(("more", "The Seine flows north.", None))
    return RolloutBatch.pack(
        [
            write(TOKENIZER, RIVER, seen[: i + 2], protocol=SEARCH_R1, reward=reward, answer="Rhône")
            for i, reward in enumerate(rewards)
        ]
    )


def test_shaping_telescopes_to_the_last_potential_minus_the_first(policy):
    batch = searched()
    gains = score_steps(batch, policy, baseline="previous", refinements=False, max_variants=8)
    assert gains.scores.shape == (5, 3, 2)
    phi = gains.scores.logsumexp(1)
    bonus = TIPS(alpha=0.3)(batch, policy).advantages  # rewards are 0, so that this is all
    for b, steps in enumerate(([0, 1], [2, 3, 4])):
        torch.testing.assert_close(phi[steps[1:], 1], phi[steps[:-1], 0], rtol=0, atol=1e-5)
        total = float(pieces(batch, bonus)[b].sum())
        assert total == pytest.approx(0.3 * float(phi[steps[-1], 0] - phi[steps[0], 1]), abs=1e-5)


def test_a_failing_group_learns_on_its_queries_alone(policy):
    batch = searched()
    assert torch.equal(TIPS()(batch, policy).advantages != 0, batch.step_ids >= 0)


def test_all_scores_hold_the_best_ones(policy):
    gains = score_steps(searched(), policy, max_variants=2, baseline="previous")
    best = gains.scores[:, :, 0].max(1)
    torch.testing.assert_close(best.values, gains.real)
    torch.testing.assert_close(gains.scores[torch.arange(5), best.indices, 1], gains.baseline)


def test_a_teacher_scores_in_the_policys_place(policy):
    batch, teacher = searched((0.0, 1.0)), scorer(3)
    mine = TIPS()(batch, policy, teacher=teacher, temperature=1.0)
    torch.testing.assert_close(mine.advantages, TIPS()(batch, teacher).advantages)
    assert not torch.allclose(mine.advantages, TIPS()(batch, policy).advantages)
    assert mine.logprobs is None  # these are the policy's to give
    assert TIPS()(batch, policy, temperature=1.0).logprobs is not None
    reference = TIPS(teacher="reference")
    torch.testing.assert_close(reference(batch, policy, teacher=teacher).advantages, mine.advantages)
    with pytest.raises(ValueError, match=r"teacher must be given with credit\.teacher='reference', got None"):
        reference(batch, policy)
    foreign = copy(teacher)
    foreign.tokenizer = BUILT["wordpiece"]()
    with pytest.raises(ValueError, match="teacher must be a scorer with the policy's vocabulary"):
        TIPS()(batch, policy, teacher=foreign)


def test_nothing_to_score(policy):
    batch = RolloutBatch.pack([write(TOKENIZER, RIVER, [], protocol=SEARCH_R1, reward=1.0)])
    credit = TIPS()(batch, policy)
    assert torch.equal(credit.advantages, SearchR1()(batch, policy).advantages)
    assert "tips/potential" not in credit.metrics
    assert all(math.isfinite(value) for value in credit.metrics.values())
