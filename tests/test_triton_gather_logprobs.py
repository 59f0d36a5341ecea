"""What only the Triton kernels of `gather_logprobs` have: splits of the vocabulary, chunks of it, blocks of rows.

The op's own grid is in test_gather_logprobs.py, which runs these kernels too. All of it is interpreted, not run on a
GPU.
"""

from __future__ import annotations

import pytest
import torch

from stepcredit import dispatch, gather_logprobs
from stepcredit.kernels import configs
from stepcredit.ops.gather_logprobs import OP
from test_gather_logprobs import PLAIN, SHAPED, make, results, verify
from triton_under_test import WHY_NOT

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Sets how many multiprocessors the launcher believes in, and with them the splits."""
    from stepcredit.kernels import gather_logprobs as kernel

    def believe(count: int) -> None:
        monkeypatch.setattr(kernel, "processors", lambda device: count)

    return believe


@pytest.mark.parametrize("options", [PLAIN, SHAPED])
@pytest.mark.parametrize("count", [1, 2, 100])
def test_splits_of_the_vocabulary(processors, count, options) -> None:
    """One stripe, uneven ones, and one a tile; in every one of them something is the maximum of some row."""
    processors(count)
    verify(*make(70, 333, targets=2), impl="triton", **options)


def test_a_split_that_holds_only_impossible_tokens(processors) -> None:
    processors(100)
    hidden, weight, targets, bias, mask = make(9, 200, targets=2)
    for impossible in (slice(0, 64), slice(64, 128), slice(100, 200)):
        never = bias.clone()
        never[impossible] = -torch.inf
        verify(hidden, weight, targets, never, mask, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_gradient(monkeypatch: pytest.MonkeyPatch, dtype) -> None:
    monkeypatch.setattr(configs, "CHUNK", 128)
    verify(*make(150, 300, 70, 3, dtype), impl="triton", **SHAPED)
    verify(*make(150, 256, 128, 1, dtype)[:3], impl="triton")


def test_a_target_out_of_range_is_nan_where_it_stands() -> None:
    hidden, weight, targets, _, _ = make(5, 40, targets=2)
    wrong = targets.clone()
    wrong[1, 0], wrong[3, 1] = -1, 40
    expected = gather_logprobs(hidden, weight, targets, impl="triton")
    # The op checks CPU tensors, the kernel is what serves those of a GPU.
    found = dispatch.function(OP, "triton")(hidden, weight, wrong, None, None, **PLAIN)[0]
    assert found.isnan().nonzero().tolist() == [[1, 0], [3, 1]]
    assert torch.equal(found[~found.isnan()], expected[~found.isnan()])


def test_rows_without_influence_are_not_worked_on() -> None:
    """Their hidden states are never read: NaN there would spread through any product."""
    hidden, weight, targets, _, _ = make(200, 90)
    mask = torch.arange(200) % 7 == 3
    gold = gather_logprobs(hidden, weight, targets, row_mask=mask, impl="triton")
    hidden[~mask] = torch.nan
    assert torch.equal(gather_logprobs(hidden, weight, targets, row_mask=mask, impl="triton"), gold)
    few = torch.arange(200) == 10
    given = [t.requires_grad_() for t in (hidden, weight)]
    logprobs = gather_logprobs(*given, targets, row_mask=mask, impl="triton")
    d_hidden, d_weight = torch.autograd.grad(logprobs, given, few[:, None].float())
    assert d_hidden.abs().sum(1).nonzero()[:, 0].tolist() == [10]
    assert d_weight.isfinite().all()


def test_repeats_are_bit_equal() -> None:
    def run(hidden, weight, bias):
        return gather_logprobs(hidden, weight, targets, bias=bias, row_mask=mask, entropy=True, impl="triton")

    hidden, weight, targets, bias, mask = make(100, 300, dtype=torch.bfloat16)
    first, second = (results(run, hidden, weight, targets, bias) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepcredit.kernels import gather_logprobs_backward as kernels

    launched = []
    for name in ("hidden_gradient_kernel", "weight_gradient_kernel"):
        kernel = getattr(kernels, name)

        class Spy:
            def __getitem__(self, grid, name=name, kernel=kernel):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(kernels, name, Spy())
    hidden, weight, targets, bias, _ = make(4, 30)
    for needed in (hidden, weight, bias):
        tensors = [t.detach().requires_grad_(t is needed) for t in (hidden, weight, bias)]
        gather_logprobs(tensors[0], tensors[1], targets, bias=tensors[2], impl="triton").sum().backward()
        assert [t.grad is not None for t in tensors] == [t is needed for t in (hidden, weight, bias)]
    assert launched == ["hidden_gradient_kernel", "weight_gradient_kernel"]


def test_what_is_not_served() -> None:
    with pytest.raises(ValueError, match="it serves float32, bfloat16, float16, got float64"):
        dispatch.resolve(OP, "triton", torch.zeros(1, 1, dtype=torch.float64))
