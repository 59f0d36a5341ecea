"""Which implementation of an op runs: the one place where that is decided.

Order: `cuda`, `triton`, `cpu`, `flash`, `flex`, `reference`, the first that can run for these tensors, unless `FIRST`
says otherwise of an op. On a CPU the rows of `benchmarks/results/` rank them so; no GPU has ranked any yet: there the
order is a guess. `impl=` on a call, or the environment variable `STEPCREDIT_IMPL` for every call, names one explicitly;
if that one cannot run, a ValueError says why. Nothing here catches an exception of a kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

ORDER = ("cuda", "triton", "cpu", "flash", "flex", "reference")

#: What an op tries before `ORDER`. Triton's `gather_logprobs` leaves out rows that cannot matter; the products of
#: `cuda` have sizes that the host knows, and so cannot.
FIRST = {"gather_logprobs": ("triton",)}

#: Found, not imported: importing Triton takes time that users of the CPU should not wait for.
HAS_TRITON = importlib.util.find_spec("triton") is not None

#: Says in one sentence why an implementation cannot run for these tensors and options; None when it can.
WhyNot = Callable[..., "str | None"]


@dataclass(frozen=True, slots=True)
class Implementation:
    function: Callable[..., Any]
    why_not: WhyNot


_registry: dict[str, dict[str, Implementation]] = {}
_warned: set[str] = set()


def register(op: str, impl: str, why_not: WhyNot) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as implementation `impl` of `op`; `why_not(*tensors, **options)` guards it."""
    if impl not in ORDER:
        raise ValueError(f"impl must be one of {ORDER}, got {impl!r}")

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _registry.setdefault(op, {})[impl] = Implementation(function, why_not)
        return function

    return add


def resolve(op: str, impl: str | None, *tensors: torch.Tensor, **options: object) -> str:
    """Name of the implementation of `op` that runs for `tensors`; `impl` (or STEPCREDIT_IMPL) forces one. `options` are
    those of the call that decide who can serve it."""
    known = _registry[op]
    forced = impl or os.environ.get("STEPCREDIT_IMPL")
    if forced:
        source = "impl" if impl else "STEPCREDIT_IMPL"
        if forced not in known:
            raise ValueError(f"{op}: {source}={forced!r} does not exist; there are {', '.join(known)}")
        reason = known[forced].why_not(*tensors, **options)
        if reason is not None:
            raise ValueError(f"{op}: {source}={forced!r} cannot run: {reason}")
        return forced
    for name in (*FIRST.get(op, ()), *ORDER):
        if name == "triton" and any(t.device.type == "cpu" for t in tensors):
            continue  # Triton's interpreter proves kernels and is slow: only for who names it
        if name in known and known[name].why_not(*tensors, **options) is None:
            if name == "reference" and any(t.is_cuda for t in tensors) and op not in _warned:
                _warned.add(op)
                warnings.warn(f"{op}: no kernel can run for these CUDA tensors; using the reference", stacklevel=3)
            return name
    raise ValueError(f"{op}: nothing can run: {reasons(op, *tensors, **options)}")


def function(op: str, impl: str) -> Callable[..., Any]:
    """The registered function of a resolved implementation."""
    return _registry[op][impl].function


def reasons(op: str, *tensors: torch.Tensor, **options: object) -> dict[str, str | None]:
    """For each implementation of `op`, why it cannot run for `tensors` and `options` (None when it can)."""
    return {name: _registry[op][name].why_not(*tensors, **options) for name in ORDER if name in _registry[op]}


def ops() -> list[str]:
    """Names of all registered ops."""
    return sorted(_registry)


def always(*_: torch.Tensor, **__: object) -> None:
    """Guard of the reference: it runs anywhere."""


def native(*dtypes: torch.dtype) -> WhyNot:
    """Guard of a C++ CPU kernel: the extension is built, tensors are on the CPU, floating ones of a served dtype."""
    return partial(_why_not_native, "cpu", dtypes)


def native_cuda(*dtypes: torch.dtype) -> WhyNot:
    """Guard of a CUDA C++ kernel: the extension was built with CUDA, tensors are on a GPU and of a served dtype."""
    return partial(_why_not_native, "cuda", dtypes)


def triton(*dtypes: torch.dtype) -> WhyNot:
    """Guard of a Triton kernel: Triton is installed, tensors are on a GPU and floating ones of a served dtype; with
    TRITON_INTERPRET=1 in the environment also on the CPU, where Triton interprets the kernel."""
    return partial(_why_not_triton, dtypes)


def triton_kernel(op: str) -> Callable[..., Any]:
    """The launcher of an op's Triton kernel, imported, and Triton with it, when it is first called."""

    def launch(*tensors: torch.Tensor, **options: Any) -> Any:
        return importlib.import_module(f"stepcredit.kernels.{op}").launch(*tensors, **options)

    return launch


def _why_not_triton(dtypes: tuple[torch.dtype, ...], *tensors: torch.Tensor, **_: object) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for tensor in tensors:
        device = tensor.device.type
        if device == "cpu" and not interpreted:
            return "it serves CUDA tensors, got one on cpu (Triton's interpreter, TRITON_INTERPRET=1, runs it there)"
        if device not in ("cuda", "cpu"):
            return f"it serves CUDA tensors, got one on {tensor.device}"
        if (reason := _not_served(dtypes, tensor)) is not None:
            return reason
    return None


def _not_served(dtypes: tuple[torch.dtype, ...], tensor: torch.Tensor) -> str | None:
    if not tensor.is_floating_point() or tensor.dtype in dtypes:
        return None
    served = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    return f"it serves {served}, got {str(tensor.dtype).removeprefix('torch.')}"


def _why_not_native(device: str, dtypes: tuple[torch.dtype, ...], *tensors: torch.Tensor, **_: object) -> str | None:
    try:
        from stepcredit import _C
    except ImportError as error:
        return f"the C++ extension stepcredit._C is not importable ({error})"
    if device == "cuda" and not _C.has_cuda:
        return "stepcredit._C was built without CUDA (no nvcc was found, or STEPCREDIT_CUDA=OFF)"
    for tensor in tensors:
        if tensor.device.type != device:
            return f"it serves {device.upper()} tensors, got one on {tensor.device}"
        if (reason := _not_served(dtypes, tensor)) is not None:
            return reason
    return None
