"""The numerics policy (one rule, no table of tolerances).

`gold` is the reference in float64 on upcast inputs; `budget` is the error of the same reference in the output dtype;
a kernel passes if max|out - gold| <= budget + 32 * eps(out.dtype) * max(1, max|gold|). Positions of inf and NaN are
compared before values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def upcast(x: Any) -> Any:
    """Floating tensors to float64; everything else unchanged."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _to(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(out: torch.Tensor, reference: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> None:
    """Assert that `out` is `reference(*args, **kwargs)` up to the policy's bound."""
    gold = reference(*map(upcast, args), **{k: upcast(v) for k, v in kwargs.items()})
    if not out.is_floating_point():
        check_against(out, gold, gold)
        return
    same = reference(*(_to(a, out.dtype) for a in args), **{k: _to(v, out.dtype) for k, v in kwargs.items()})
    check_against(out, gold, same.to(out.dtype))


def check_against(out: torch.Tensor, gold: torch.Tensor, same_dtype: torch.Tensor) -> None:
    """The bound itself, for callers that hold gold and the reference's own result in the output dtype."""
    assert out.shape == gold.shape, f"shape {tuple(out.shape)}, expected {tuple(gold.shape)}"
    if not out.is_floating_point():
        assert torch.equal(out, gold.to(out.dtype))
        return
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        assert torch.equal(test(out), test(gold)), f"{name} in other places than the reference"
    finite = gold.isfinite()
    if not finite.any():
        return
    gold, got, same = gold[finite], out[finite].double(), same_dtype[finite].double()
    budget = (same - gold).abs().nan_to_num(0.0).max()
    allowed = float(budget + 32 * torch.finfo(out.dtype).eps * gold.abs().max().clamp(min=1))
    error = float((got - gold).abs().max())
    assert error <= allowed, f"max error {error:.3e} exceeds {allowed:.3e} (reference itself: {float(budget):.3e})"
