"""The `triton` implementation in the grids of the ops' own tests: run by Triton's interpreter, on the CPU."""

from __future__ import annotations

import os

import pytest

from stepcredit import dispatch

#: Why the kernels cannot be interpreted here; None when they can. conftest.py asks for the interpreter.
WHY_NOT = (
    "Triton is not installed"
    if not dispatch.HAS_TRITON
    else "TRITON_INTERPRET is not 1"
    if os.environ.get("TRITON_INTERPRET") != "1"
    else None
)

#: One more value for a parameter `impl`.
TRITON = pytest.param("triton", marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)))
