"""Functions that `triton.language` lacks and that its interpreter could not run from libdevice."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Accurate relative to the result, as math libraries are, in the dtype of x."""
    # Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))) where 1 - 2 / (e^2x + 1) would cancel;
    # numerator and denominator of its convergents by their recurrence, so that there is one division.
    square = x * x
    before, top = square * 0.0, square * 0.0 + 1.0
    under, bottom = top, top
    for n in tl.static_range(3, 17, 2):
        before, top = top, n * top + square * before
        under, bottom = bottom, n * bottom + square * under
    return tl.where(tl.abs(x) < 0.5, x * top / bottom, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
