"""The CPU path of `gather_logprobs`: tiles of matrix products, folded and differentiated by C++."""

from __future__ import annotations

from typing import Any

import torch

from stepcredit.ops import _gather_logprobs_tiles as tiled

#: The one tile of logits that is alive: rows x vocabulary entries.
TILE_ROWS = 512
TILE_COLS = 8192

Tensor = torch.Tensor


def multiplies_bfloat16(dtype: torch.dtype, width: int) -> bool:
    """Whether our own product (bfloat16 in, float32 out) serves; it needs AVX512-BF16 and an even width."""
    from stepcredit import _C

    return dtype == torch.bfloat16 and _C.has_bf16_product and width % 2 == 0


def multiply_bfloat16(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right.T; contiguous, bfloat16 in and float32 out, where `multiplies_bfloat16` says so."""
    from stepcredit import _C

    _C.bf16_product_cpu(
        left=left.data_ptr(),
        right=right.data_ptr(),
        out=out.data_ptr(),
        rows=left.shape[0],
        cols=right.shape[0],
        depth=left.shape[1],
        threads=torch.get_num_threads(),
    )


class _Tiles(tiled.Tiles):
    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> None:
        self.narrow = multiplies_bfloat16(hidden.dtype, hidden.shape[1])
        factors = torch.bfloat16 if self.narrow else tiled.wide_dtype(hidden.dtype)
        super().__init__(hidden, weight, bias, None, factors=factors, size=(TILE_ROWS, TILE_COLS), **options)

    def multiply(self, hidden: Tensor, stripe: Tensor, out: Tensor) -> None:
        if not self.narrow:
            torch.mm(hidden, stripe.T, out=out)
            return
        multiply_bfloat16(hidden, stripe, out)

    def add_product(self, out: Tensor, dz: Tensor, factor: Tensor) -> None:
        if self.narrow:
            out += torch.mm(dz.to(torch.bfloat16), factor)
        else:
            out.addmm_(dz, factor)


def _select(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() if rows is None else t.index_select(0, rows) for t in tensors]


def _spread(rows: Tensor | None, count: int, *tensors: Tensor) -> list[Tensor]:
    """Put selected rows back among `count`; the others are 0."""
    if rows is None:
        return list(tensors)
    return [t.new_zeros(count, *t.shape[1:]).index_copy_(0, rows, t) for t in tensors]


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, maximum and log-sum-exp above it; rows that are masked out are not selected."""
    rows = None if row_mask is None or bool(row_mask.all()) else row_mask.nonzero()[:, 0]
    chosen, targets = _select(rows, hidden, targets)
    results = tiled.fold(_Tiles(chosen, weight, bias, **options), targets)
    logprobs, entropy, maximum, log_sum = _spread(rows, hidden.shape[0], *results)
    return logprobs, entropy, maximum, log_sum


def backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    filter_by: Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    **options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that `needs` asks for; exact with `filter_by` too."""
    active = (grad_logprobs != 0).any(dim=1) | (grad_entropy != 0)
    if weight.shape[0] == 1:  # the only token is certain; recomputed logits would differ from the forward's by rounding
        active.zero_()
    if row_mask is not None:
        active &= row_mask
    rows = None if bool(active.all()) else active.nonzero()[:, 0]
    chosen, *kept = _select(rows, hidden, targets, grad_logprobs, grad_entropy, entropy, maximum, log_sum)
    tiles = _Tiles(chosen, weight, bias, **options)
    d_hidden, d_weight, d_bias = tiled.differentiate(tiles, *kept, needs=needs)
    if d_hidden is not None:
        (d_hidden,) = _spread(rows, hidden.shape[0], d_hidden.to(hidden.dtype))
    if d_bias is not None and bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return d_hidden, d_weight, d_bias
