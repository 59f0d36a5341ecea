"""Argument checks shared by the public ops. Each raises a sentence that names the argument and what it held."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def tensor(op: str, name: str, value: object, ndim: int | tuple[int, ...], kinds: str) -> torch.Tensor:
    """Check type, number of dimensions and kind of dtype: `kinds` holds letters of f(loat), i(nt64), b(ool)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    require(value.ndim in allowed, f"{op}: {name} must have {allowed} dimensions, got shape {tuple(value.shape)}")
    kind = "f" if value.is_floating_point() else {torch.int64: "i", torch.bool: "b"}.get(value.dtype, "?")
    wanted = {"f": "a floating dtype", "i": "int64", "b": "bool"}
    require(kind in kinds, f"{op}: {name} must have {' or '.join(wanted[k] for k in kinds)}, got {value.dtype}")
    return value


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    require(len(set(devices.values())) <= 1, f"{op}: arguments are on different devices: {devices}")


def length(op: str, name: str, value: torch.Tensor, expected: int, why: str) -> None:
    require(value.shape[0] == expected, f"{op}: {name} has {value.shape[0]} entries, expected {expected} ({why})")


def choice(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    require(value in allowed, f"{op}: {name} must be one of {tuple(allowed)}, got {value!r}")


def in_range(op: str, name: str, value: float, low: float, high: float) -> None:
    """low <= value <= high; NaN fails."""
    require(low <= value <= high, f"{op}: {name} must be in [{low}, {high}], got {value!r}")


# The checks below read values. They run inside the custom ops, where `reads_values` lets them.


def reads_values(tensor: torch.Tensor) -> bool:
    """Whether an op checks the values of arguments that are where `tensor` is. On a GPU the host would wait for them,
    so only STEPCREDIT_DEBUG=1 in the environment has them checked there."""
    return not tensor.is_cuda or os.environ.get("STEPCREDIT_DEBUG") == "1"


def offsets(op: str, name: str, value: torch.Tensor, end: int) -> None:
    """Offsets start at 0, never fall, and end at `end`."""
    require(value.numel() > 0, f"{op}: {name} is empty; offsets hold at least the leading 0")
    first, last = int(value[0]), int(value[-1])
    require(first == 0 and last == end, f"{op}: {name} must run from 0 to {end}, got {first} to {last}")
    if value.numel() > 1 and bool((value.diff() < 0).any()):
        at = int((value.diff() < 0).nonzero()[0])
        raise ValueError(f"{op}: {name} must not fall, got {int(value[at])} then {int(value[at + 1])} at {at}")


def indices(op: str, name: str, value: torch.Tensor, low: int, high: int) -> None:
    """Every entry is in [low, high)."""
    if value.numel():
        least, most = (int(x) for x in value.aminmax())
        require(low <= least and most < high, f"{op}: {name} must lie in [{low}, {high}), got {least} to {most}")


def finite(op: str, name: str, value: torch.Tensor) -> None:
    bad = ~value.isfinite()
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{op}: {name} must be finite, got {float(value[at])} at {at if len(at) > 1 else at[0]}")
