from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepcredit.train.loss import KL_CLAMP, clipped_surrogate, low_variance_kl, policy_loss, token_weights


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_weights_sum_to_one_and_follow_the_aggregation(lengths):
    total, nonempty = sum(lengths), sum(n > 0 for n in lengths)
    token = token_weights(torch.tensor(lengths), "token")
    sequence = token_weights(torch.tensor(lengths), "sequence")
    torch.testing.assert_close(token, torch.full((total,), 1 / max(total, 1)))
    expected = [1 / (nonempty * n) for n in lengths for _ in range(n)]
    torch.testing.assert_close(sequence, torch.tensor(expected, dtype=torch.float32))
    if total:
        assert float(token.sum()) == pytest.approx(1, abs=1e-6)
        assert float(sequence.sum()) == pytest.approx(1, abs=1e-6)


def test_bad_weights_are_named():
    with pytest.raises(ValueError, match="'mean'"):
        token_weights(torch.tensor([1]), "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[2, -1\]"):
        token_weights(torch.tensor([2, -1]), "token")


def by_hand(lp, old, ref, advantage, weight, low, high, kl_coef):
    """The loss and its gradient for each token, written out in plain floats."""
    losses, gradients = [], []
    for x, o, r, a, w in zip(lp, old, ref, advantage, weight, strict=True):
        ratio = math.exp(x - o)
        clipped = min(max(ratio, 1 - low), 1 + high)
        free, bound = -a * ratio, -a * clipped
        loss = max(free, bound)
        inside = 1 - low <= ratio <= 1 + high
        slope = free if free > bound or inside else 0.0  # d(ratio)/dx = ratio, and free = -a * ratio
        d = r - x
        k3 = math.exp(d) - d - 1
        if k3 < KL_CLAMP:
            loss, slope = loss + kl_coef * k3, slope + kl_coef * (1 - math.exp(d))
        else:
            loss = loss + kl_coef * KL_CLAMP
        losses.append(w * loss)
        gradients.append(w * slope)
    return sum(losses), gradients


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_loss_and_gradient_equal_the_formula_in_float64(kl_coef):
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(5, 64, dtype=torch.float64, generator=generator)
    old, ref, advantage = -draw[0].abs(), -draw[1].abs() * 2, draw[2]
    ref[:3] = torch.tensor([4.0, 9.0, -30.0])  # beyond the clamp on both sides
    lp = (old + 0.4 * draw[3]).requires_grad_()
    weight = draw[4].abs()
    low, high = 0.2, 0.28
    loss, parts = policy_loss(
        lp, old, advantage, weight, clip_low=low, clip_high=high, kl_coef=kl_coef, reference_logprobs_T=ref
    )
    loss.backward()
    expected, gradient = by_hand(
        lp.tolist(), old.tolist(), ref.tolist(), advantage.tolist(), weight.tolist(), low, high, kl_coef
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(lp.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert parts["loss"] == loss.detach()
    ratio = (lp.detach() - old).exp()
    outside = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    assert 0 < outside.sum() < 64
    torch.testing.assert_close(parts["clip_fraction"], (weight * outside).sum())


def test_bounds_are_separate_and_pessimistic():
    lp = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, clipped = clipped_surrogate(lp, torch.zeros(4), advantage, clip_low=0.1, clip_high=0.3)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.3, math.exp(0.5), -math.exp(-0.5), 0.9]))
    assert clipped.tolist() == [True, False, False, True]


def test_on_policy_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    lp = torch.randn(7, requires_grad=True)
    advantage = torch.randn(7)
    loss, clipped = clipped_surrogate(lp, lp.detach(), advantage, clip_low=0.0, clip_high=0.0)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), -advantage)
    torch.testing.assert_close(lp.grad, -advantage)
    assert not clipped.any()


def test_kl_is_zero_for_equal_policies_and_never_negative():
    lp = torch.linspace(-8, 0, 50)
    assert (low_variance_kl(lp, lp) == 0).all()
    kl = low_variance_kl(lp, lp.flip(0))
    assert (kl >= 0).all()
    assert float(kl.max()) == KL_CLAMP


def test_old_logprobs_advantages_and_reference_get_no_gradient():
    lp, old, ref, advantage = (torch.randn(4, requires_grad=True) for _ in range(4))
    loss, _ = policy_loss(
        lp, old, advantage, torch.ones(4), clip_low=0.2, clip_high=0.2, kl_coef=0.1, reference_logprobs_T=ref
    )
    loss.backward()
    assert lp.grad is not None
    assert old.grad is None
    assert ref.grad is None
    assert advantage.grad is None


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match=r"kl_coef=0\.5"):
        policy_loss(*(torch.zeros(2) for _ in range(4)), clip_low=0.2, clip_high=0.2, kl_coef=0.5)


def test_nan_is_not_hidden_by_clipping():
    lp = torch.tensor([float("nan"), 0.0])
    loss, _ = policy_loss(lp, torch.zeros(2), torch.ones(2), torch.ones(2), clip_low=0.2, clip_high=0.2)
    assert loss.isnan()


def test_no_tokens_give_zero():
    nothing = torch.zeros(0, requires_grad=True)
    loss, _ = policy_loss(nothing, nothing, nothing, nothing, clip_low=0.2, clip_high=0.2)
    assert float(loss.detach()) == 0
