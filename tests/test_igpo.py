from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepcredit.credit.igpo
from scripted_rollouts import REFINE, random_policy, write
from stepcredit.batch import RolloutBatch
from stepcredit.counterfactual import score_steps
from stepcredit.credit import IGPO, SearchR1
from stepcredit.rollout import Question, SpanKind
from stepcredit.scorer import PolicyScorer
from tokenizers_under_test import BUILT
from turn_rollouts import ANSWER, Turn, batches, by_turn, gains_of, pieces, rollout, shuffled

NAN = math.nan
ROOT = 1.5**0.5  # (1 - 0) / the population deviation of 0, 1, 2 ... of -1, 0, 1


def run(batch, gains, **options):
    """IGPO with these gains of the batch's steps."""
    made = gains if not isinstance(gains, list) else gains_of(batch, gains)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepcredit.credit.igpo, "score_steps", lambda *_, **__: made)
        return IGPO(**options)(batch, None)


def two():
    """One group: two searches and a right answer, one search and a wrong one."""
    return RolloutBatch.pack([rollout([Turn(1), Turn(3), ANSWER], reward=1.0), rollout([Turn(2), ANSWER])])


def test_separate_by_hand():
    credit = run(two(), [0.5, 1.5, -0.5])  # normalised 0, ROOT, -ROOT; outcomes 1 and -1
    first, second = by_turn(two(), credit.advantages)
    assert first == pytest.approx([ROOT + 1, ROOT + 1, 1], abs=1e-5)
    assert second == pytest.approx([-ROOT - 1, -1], abs=1e-5)


def test_discount_by_turns_after_normalising():
    first, second = by_turn(two(), run(two(), [0.5, 1.5, -0.5], gamma=0.5).advantages)
    assert first == pytest.approx([(ROOT + 0.5) / 2, ROOT + 0.5, 1], abs=1e-5)
    assert second == pytest.approx([-ROOT - 0.5, -1], abs=1e-5)
    first, _ = by_turn(two(), run(two(), [0.5, 1.5, -0.5], gamma=0.0).advantages)
    assert first == pytest.approx([0, ROOT, 1], abs=1e-5)


def test_joint_by_hand():
    # gains 0.5, 1.5, -0.5 and outcomes 1, 0 as one set: mean 0.5, population variance 0.5
    first, second = by_turn(two(), run(two(), [0.5, 1.5, -0.5], norm="joint").advantages)
    half = 0.5 / 0.5**0.5
    assert first == pytest.approx([3 * half, 3 * half, half], abs=1e-5)
    assert second == pytest.approx([-3 * half, -half], abs=1e-5)


def test_a_gain_of_zero_counts():
    first, second = by_turn(two(), run(two(), [0.0, 1.0, 2.0], gamma=0.0).advantages)
    assert first[:2] == pytest.approx([-ROOT, 0], abs=1e-5)  # without the 0 they would be 0 and -1
    assert second[0] == pytest.approx(ROOT, abs=1e-5)


def test_an_unscored_turn_neither_counts_nor_earns():
    first, second = by_turn(two(), run(two(), [NAN, 1.0, 3.0]).advantages)
    assert first == pytest.approx([0, 0, 1], abs=1e-5)  # -1 of its second gain + 1 of the outcome
    assert second == pytest.approx([0, -1], abs=1e-5)
    assert run(two(), [NAN, 1.0, 3.0]).metrics["ig/scored"] == 2
    assert torch.equal(run(two(), [NAN] * 3, ddof=1).advantages, SearchR1()(two(), None).advantages)


def test_probabilities_instead_of_log_probabilities():
    real, before = torch.tensor([0.9, 0.6, 0.5]).log(), torch.tensor([0.1, 0.4, 0.5]).log()
    made = gains_of(two(), (real - before).tolist(), real=real.tolist())
    raw = torch.tensor([0.8, 0.2, 0.0])
    x = (raw - raw.mean()) / raw.std(correction=0)
    first, second = by_turn(two(), run(two(), made, gain="prob", gamma=0.0).advantages)
    assert [*first[:2], second[0]] == pytest.approx(x.tolist(), abs=1e-4)


def test_a_last_turn_that_searched_has_gain_and_outcome():
    batch = RolloutBatch.pack([rollout([Turn(2, None)], reward=1.0), rollout([Turn(2), ANSWER])])
    first, second = by_turn(batch, run(batch, [3.0, 1.0]).advantages)
    assert first == pytest.approx([2], abs=1e-5)
    assert second == pytest.approx([-2, -1], abs=1e-5)


def test_a_failing_group_learns_up_to_its_last_gain():
    batch = RolloutBatch.pack([rollout([Turn(1), Turn(1), ANSWER]), rollout([Turn(1), Turn(0), ANSWER])])
    first, second = by_turn(batch, run(batch, [0.1, 0.7, -0.4]).advantages)
    assert all(first[:2])
    assert first[2] == 0
    assert second[0] != 0
    assert second[1:] == [0, 0]


@pytest.mark.parametrize("norm", ["separate", "joint"])
@pytest.mark.parametrize("options", [{}, {"ddof": 1, "singleton": "reward"}, {"scale": "none"}, {"eps": 1e-2}])
@given(batch=batches())
@settings(max_examples=20, deadline=None)
def test_weight_zero_is_search_r1_to_the_bit(norm, options, batch):
    gains = torch.randn(batch.num_steps).tolist()
    plain = SearchR1(**{"ddof": 0, "singleton": "zero", **options})(batch, None)
    credit = run(batch, gains, weight=0.0, norm=norm, **options)
    assert torch.equal(credit.advantages, plain.advantages)
    assert credit.metrics["advantage/bonus_abs_mean"] == 0


def expected(batch, gains, *, gamma, joint, weight):
    """The formula in plain floats, turn by turn."""
    terms = [
        (int(g), "outcome", float(r), b, None) for b, (g, r) in enumerate(zip(batch.groups, batch.rewards, strict=True))
    ]
    for s, gain in enumerate(gains):
        b = int(batch.step_rollout[s])
        if gain == gain:
            terms.append((int(batch.groups[b]), "outcome" if joint else "gain", gain, b, int(batch.step_index[s])))
    values = {}
    for group, kind, value, b, step in terms:
        same = [v for g, k, v, _, _ in terms if (g, k) == (group, kind)]
        mean = math.fsum(same) / len(same)
        std = (math.fsum((v - mean) ** 2 for v in same) / len(same)) ** 0.5
        values[b, step] = 0.0 if len(same) == 1 or min(same) == max(same) else (value - mean) / (std + 1e-6)
    out = []
    for b, one in enumerate(batch.rollouts):
        rewards, before = [], False
        for span in one.spans:
            if span.by_policy and not before:
                rewards.append(0.0)
            if span.kind is SpanKind.QUERY:
                rewards[-1] += weight * values.get((b, span.step), 0.0)
            before = span.by_policy
        rewards[-1] += values[b, None]
        out.append(
            [math.fsum(gamma ** (v - u) * r for v, r in enumerate(rewards) if v >= u) for u in range(len(rewards))]
        )
    return out


@given(
    batch=batches(),
    gamma=st.sampled_from([0.0, 0.7, 1.0]),
    joint=st.booleans(),
    weight=st.sampled_from([1.0, 0.5]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_ragged_batches_follow_the_formula(batch, gamma, joint, weight, data):
    values = st.sampled_from([NAN, 0.0, 0.5, -1.25, 2.0])
    gains = data.draw(st.lists(values, min_size=batch.num_steps, max_size=batch.num_steps))
    credit = run(batch, gains, gamma=gamma, norm="joint" if joint else "separate", weight=weight)
    for mine, theirs in zip(
        by_turn(batch, credit.advantages), expected(batch, gains, gamma=gamma, joint=joint, weight=weight), strict=True
    ):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_the_order_of_rollouts_does_not_matter():
    batch = RolloutBatch.pack(
        [rollout([Turn(1 + i % 2)] * i + [ANSWER], reward=float(i == 2), group=i % 2) for i in range(6)]
    )
    gains = torch.linspace(-1, 2, batch.num_steps)
    order = [4, 1, 0, 5, 3, 2]
    steps = torch.cat([(batch.step_rollout == b).nonzero().squeeze(1) for b in order])
    plain = pieces(batch, run(batch, gains.tolist()).advantages)
    other = pieces(shuffled(batch, order), run(shuffled(batch, order), gains[steps].tolist()).advantages)
    for b, mine in zip(order, other, strict=True):
        torch.testing.assert_close(mine, plain[b])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"credit\.gamma must be in \[0, 1\], got 1\.5"),
        ({"weight": math.inf}, r"credit\.weight must be finite, got inf"),
        ({"norm": "both"}, r"credit\.norm must be one of separate, joint, got 'both'"),
        ({"max_variants": 0}, r"credit\.max_variants must be at least 1, got 0"),
    ],
)
def test_bad_constants_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        IGPO(**options)


# With a policy

TOKENIZER = BUILT["byte_bpe"]()
RIVER = Question("a", "Which river flows through Lyon?", ("Rhône", "the Rhône"))


@pytest.fixture(scope="module")
def policy():
    return PolicyScorer(random_policy("llama", TOKENIZER), TOKENIZER, REFINE)


def searched():
    seen = [("river", "Lyon lies on the Rhône.", "the Rhône"), ("Lyon", "Paris is the capital.", "no")]
    return RolloutBatch.pack(
        [write(TOKENIZER, RIVER, seen[: i + 1], reward=float(i), answer="Rhône") for i in range(2)]
    )


def test_gains_are_over_the_context_a_turn_earlier(policy):
    """The first turn's over the prompt. Contexts end with the passages: a refinement is part of the next turn."""
    batch = searched()
    gains = score_steps(batch, policy, baseline="previous", refinements=False, verify=True)
    probe, gold = TOKENIZER.encode(REFINE.answer_probe), TOKENIZER.encode(" Rhône")

    def score(tokens):
        return float(policy.separate_logprobs([([*tokens, *probe], gold)])[0].mean())

    at = 0
    for one in batch.rollouts:
        ends = [one.prompt_length, *(one.find(SpanKind.DOCUMENTS, t).stop for t in one.steps())]
        scores = [score(one.tokens[:end]) for end in ends]
        for before, after in pairwise(scores):
            assert float(gains.real[at]) == pytest.approx(after, abs=1e-5)
            assert float(gains.baseline[at]) == pytest.approx(before, abs=1e-5)
            at += 1
    assert at == 3
    credit = IGPO()(batch, policy, verify=True)
    torch.testing.assert_close(credit.advantages, run(batch, gains).advantages, rtol=1e-3, atol=1e-4)
    assert credit.metrics["ig/audit_difference"] < 1e-5
    later = score_steps(batch, policy, baseline="previous")  # contexts that hold the refinement
    assert not torch.allclose(later.real, gains.real)


def test_log_probs_of_the_policy_come_from_the_same_pass(policy):
    batch = searched()
    credit = IGPO()(batch, policy, temperature=0.7)
    expected = score_steps(batch, policy, baseline="empty", temperature=0.7).logprobs
    torch.testing.assert_close(credit.logprobs, expected, rtol=0, atol=1e-5)
    assert IGPO()(batch, policy).logprobs is None


def test_metrics_are_documented(policy):
    credit = IGPO()(searched(), policy)
    assert all(math.isfinite(value) for value in credit.metrics.values())
    assert credit.metrics["igpo/turns"] == 5
    assert {"ig/gain_mean", "ig/steps", "tokens_forwarded", "advantage/bonus_abs_mean"} <= set(credit.metrics)
    assert replace(IGPO(), weight=0.5).weight == 0.5
