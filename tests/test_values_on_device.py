"""Wrong values in tensors whose values an op does not read, as those of a GPU, and STEPCREDIT_DEBUG=1, which has them
read.

There is no GPU here: tensors of the CPU are treated as theirs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

from stepcredit import gather_logprobs, information_gain, masked_advantages, out_of_range_targets, topk_search
from stepcredit.ops import _checks
from test_gather_logprobs import make
from triton_under_test import TRITON

IMPLS = ["cpu", TRITON, "reference"]
OFFSETS = torch.tensor([0, 2])
MASK = torch.ones(4, dtype=torch.bool)
NAN = torch.tensor([1.0, math.nan])

#: Calls with a value that is refused, by the last check of their op where it makes tensors of its own on its way there.
REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("hidden must be finite, got nan", lambda: gather_logprobs(NAN[:, None], MASK[:3, None].float(), OFFSETS)),
    (
        "bias must be finite or -inf, got inf",
        lambda: gather_logprobs(OFFSETS[:, None].float(), MASK[:3, None].float(), OFFSETS, bias=1 / NAN.new_zeros(3)),
    ),
    ("logprobs must be finite, got nan", lambda: information_gain(NAN, OFFSETS, OFFSETS // 2, OFFSETS // 2)),
    (
        "step 0 lies in several",
        lambda: masked_advantages(OFFSETS.float(), OFFSETS * 0, 2 * OFFSETS.new_tensor([0, 1, 2]), MASK, 0 * MASK, NAN),
    ),
    (
        "ddof=2, but 1 groups",
        lambda: masked_advantages(OFFSETS.float(), OFFSETS * 0, 2 * OFFSETS.new_tensor([0, 1, 2]), MASK, ddof=2),
    ),
    ("queries must not hold NaN", lambda: topk_search(NAN[:, None], MASK[:, None].float(), 1)),
]


def test_values_of_a_gpu_are_read_where_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        there = torch.zeros(1, device="cuda")
    for value, asked in ((None, False), ("0", False), ("1", True)):
        if value is None:
            monkeypatch.delenv("STEPCREDIT_DEBUG", raising=False)
        else:
            monkeypatch.setenv("STEPCREDIT_DEBUG", value)
        assert _checks.reads_values(there) is asked
        assert _checks.reads_values(NAN)


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_every_op_asks_in_one_place(monkeypatch: pytest.MonkeyPatch, message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    asked = []
    monkeypatch.setattr(_checks, "reads_values", asked.append)  # None: no
    call()
    assert asked


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_checks_stay_on_the_device_of_what_they_check(message: str, call: Callable[[], object]) -> None:
    """They make no tensor on the default device, with which those of the arguments could not be combined."""
    original = torch.empty(0).device
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        call()
    assert torch.empty(0).device == original


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    out_of_range_targets("cpu")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filtered", [False, True])
def test_targets_out_of_range_are_nan_without_a_gradient_and_counted(impl: str, filtered: bool) -> None:
    hidden, weight, targets, _, _ = make(6, 40, targets=2)
    mask = torch.arange(6) != 4
    wrong = targets.clone()
    wrong[1, 0], wrong[3, 1], wrong[4] = -1, 40, -100  # the last row is masked
    bad = (wrong != targets) & mask[:, None]

    def run(targets: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = gather_logprobs(*inputs, targets, row_mask=mask, filter_gradient=filtered, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    grad = torch.rand(6, 2) + 0.5
    expected, *gold = run(targets, grad.masked_fill(bad, 0.0))
    assert out_of_range_targets("cpu") == 0
    found, *grads = run(wrong, grad)
    assert torch.equal(found.isnan(), bad)
    assert torch.equal(found[~bad], expected[~bad])
    assert all(torch.equal(a, b) for a, b in zip(grads, gold, strict=True))
    assert out_of_range_targets("cpu") == 2
    assert out_of_range_targets("cpu") == 0


@pytest.mark.usefixtures("unread")
def test_the_count_goes_on_until_it_is_asked_for() -> None:
    hidden, weight, targets, _, _ = make(3, 20)
    with torch.inference_mode():  # as the first call that is counted may be
        gather_logprobs(hidden, weight, targets + 100)
    gather_logprobs(hidden, weight, targets - 100)
    assert out_of_range_targets("cpu") == 6
    assert out_of_range_targets("meta") == 0
