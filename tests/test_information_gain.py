from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import numerics
from stepcredit import information_gain, reference
from triton_under_test import TRITON

IMPLS = ["cpu", TRITON, "reference"]
FIELDS = reference.InformationGain._fields


def offsets(sizes):
    return torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])


def make(lengths, variants, steps, dtype=torch.float32, seed=0):
    """Answer lengths per branch, branches per variant, variants per step."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -5 * torch.rand(sum(lengths), generator=g, dtype=torch.float64)
    return logprobs.to(dtype), offsets(lengths), offsets(variants), offsets(steps)


def verify(args, impl, head_tokens=0, head_weight=1.0, device="cpu"):
    given = (t.to(device) for t in args)
    out = information_gain(*given, head_tokens=head_tokens, head_weight=head_weight, impl=impl)
    out = reference.InformationGain(*(t.cpu() for t in out))
    for field in FIELDS:

        def one(*a, field=field):
            return getattr(reference.information_gain(*a, head_tokens=head_tokens, head_weight=head_weight), field)

        numerics.check(getattr(out, field), one, *args)
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", [(0, 1.0), (3, 3.0), (2, 0.0), (99, 0.0)])
def test_values(impl, dtype, head):
    verify(make([2, 4, 1, 6, 3, 5, 2], [4, 2, 1], [1, 2], dtype), impl, *head)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape", [([], [], []), ([], [], [0]), ([1], [1], [1]), ([0, 2], [2], [1]), ([2, 2], [0, 2], [2])]
)
def test_degenerate_layouts(impl, shape):
    verify(make(*shape), impl)


@pytest.mark.parametrize("impl", ["cpu", TRITON])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ragged(impl, data):
    steps = data.draw(st.lists(st.integers(0, 3), max_size=6))
    variants = data.draw(st.lists(st.integers(0, 4), min_size=sum(steps), max_size=sum(steps)))
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=sum(variants), max_size=sum(variants)))
    verify(make(lengths, variants, steps, seed=data.draw(st.integers(0, 99))), impl, 3, 3.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided(impl):
    args = make([2, 4, 1, 6, 3, 5], [4, 2], [1, 1])
    wide = [torch.stack([t, t.flip(0)], dim=1)[:, 0] for t in args]
    assert not any(t.is_contiguous() for t in wide)
    out = verify(wide, impl, 3, 3.0)
    for got, expected in zip(out, information_gain(*args, head_tokens=3, head_weight=3.0, impl=impl), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("at", range(7))
def test_planted_extreme(impl, at):
    logprobs, *layout = make([3] * 7, [3, 2, 2], [2, 1])
    logprobs[3 * at + 1] = -1e30
    out = verify((logprobs, *layout), impl)
    others = torch.arange(7) != at
    assert out.scores[at].item() == pytest.approx(-1e30 / 3)
    assert (out.scores[others] >= -5).all()  # no other branch is touched
    if at == 0:
        assert out.best_variant[0] == 1  # the other gold answer is the better one


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_when_nothing_changes(impl):
    logprobs = torch.tensor([-1.0, -2.5, -0.5]).repeat(4)
    out = information_gain(logprobs, offsets([3] * 4), offsets([4]), offsets([1]), impl=impl)
    assert out.gain.item() == 0.0
    assert out.scored.item()


@pytest.mark.parametrize("impl", IMPLS)
def test_step_without_counterfactual_is_flagged(impl):
    out = information_gain(torch.tensor([-1.0, -2.0]), offsets([2]), offsets([1]), offsets([1]), impl=impl)
    assert out.gain.isnan().item()
    assert not out.scored.item()
    assert out.real.item() == -1.5


@pytest.mark.parametrize("impl", IMPLS)
def test_best_real_variant_wins_with_its_own_baselines(impl):
    logprobs = torch.tensor([-5.0, -1.0, -2.0, -4.0])  # variant 0: gain -4; variant 1: gain 2
    out = information_gain(logprobs, offsets([1] * 4), offsets([2, 2]), offsets([2]), impl=impl)
    assert out.best_variant.item() == 1
    assert out.gain.item() == 2.0


@pytest.mark.parametrize("impl", IMPLS)
def test_head_weight_is_normalised_by_its_mean(impl):
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -5.0])
    score = information_gain(
        logprobs, offsets([4]), offsets([1]), offsets([1]), head_tokens=3, head_weight=3.0, impl=impl
    )
    assert score.scores.item() == pytest.approx((3 * -3.0 - 5.0) / 10)
    short = information_gain(
        logprobs[:3], offsets([3]), offsets([1]), offsets([1]), head_tokens=3, head_weight=3.0, impl=impl
    )
    assert short.scores.item() == -1.0  # three tokens or fewer: the plain mean


@pytest.mark.parametrize("impl", IMPLS)
def test_more_branches_and_tokens_than_a_block(impl):
    verify(make([40, 3, 0, 17, 33, *range(20), 16, 8, 1], [25, 3], [1, 1]), impl, 20, 3.0)


def test_many_branches_use_threads():
    args = make([3] * 8000, [4] * 2000, [1] * 2000)
    out = information_gain(*args, impl="cpu")
    scores = args[0].view(2000, 4, 3).double().mean(-1)
    assert torch.allclose(out.gain.double(), scores[:, 0] - scores[:, 1:].mean(-1), atol=1e-5)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.tensor([-1.0, math.nan, 0.0]), "logprobs must be finite, got nan at 1"),
        (0, torch.tensor([-1.0, -math.inf, 0.0]), "logprobs must be finite, got -inf at 1"),
        (0, torch.zeros(3, 1), r"logprobs must have \(1,\) dimensions"),
        (1, torch.tensor([0, 2]), "cu_branches must run from 0 to 3, got 0 to 2"),
        (1, torch.tensor([0, 3, 1, 3]), "cu_branches must not fall"),
        (2, torch.tensor([0, 1]), "cu_variants must run from 0 to 2, got 0 to 1"),
        (3, torch.tensor([1, 1]), "cu_steps must run from 0 to 1, got 1 to 1"),
        (3, torch.zeros(0, dtype=torch.int64), "cu_steps is empty"),
        (3, torch.tensor([0.0, 1.0]), "cu_steps must have int64"),
    ],
)
def test_bad_input(index, value, message):
    args = list(make([2, 1], [2], [1]))
    args[index] = value
    with pytest.raises(ValueError, match=message):
        information_gain(*args)


def test_bad_head_weight():
    with pytest.raises(ValueError, match="head_weight must be in"):
        information_gain(*make([2, 1], [2], [1]), head_weight=-1.0)


@pytest.mark.parametrize("impl", ["cpu", TRITON])
def test_opcheck_and_compile(impl):
    args = make([2, 1, 2], [3], [1])
    torch.library.opcheck(torch.ops.stepcredit.information_gain.default, (*args, 3, 3.0, impl))
    compiled = torch.compile(lambda *a: information_gain(*a, impl=impl).gain + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), information_gain(*args, impl=impl).gain + 1)
