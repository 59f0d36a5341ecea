"""The CPU path of `gather_logprobs`: tiles of matrix products, folded and differentiated by C++."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

#: The one tile of logits that is alive: rows x vocabulary entries.
TILE_ROWS = 512
TILE_COLS = 8192

Tensor = torch.Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and results: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


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


class _Tiles:
    """Computes logits tile by tile in one reused buffer: vocabulary outside, rows inside."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: float | None) -> None:
        self.wide = wide_dtype(hidden.dtype)
        self.narrow = multiplies_bfloat16(hidden.dtype, hidden.shape[1])
        self.factors = torch.bfloat16 if self.narrow else self.wide  # dtype of what is multiplied
        self.hidden = hidden.to(self.factors).contiguous()
        self.weight = weight
        self.bias = None if bias is None else bias.to(self.wide).contiguous()
        self.rows, self.vocabulary = hidden.shape[0], weight.shape[0]
        self.options = options
        self.threads = torch.get_num_threads()
        self.buffer = torch.empty(min(self.rows, TILE_ROWS) * min(self.vocabulary, TILE_COLS), dtype=self.wide)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.vocabulary, TILE_COLS):
            span = slice(start, min(start + TILE_COLS, self.vocabulary))
            yield span, self.weight[span].to(self.factors).contiguous()

    def blocks(self, columns: slice, stripe: Tensor) -> Iterator[tuple[slice, Tensor, dict[str, Any]]]:
        """Rows, their tile of matrix products, and what the kernels need to know of the tile."""
        cols = columns.stop - columns.start
        for start in range(0, self.rows, TILE_ROWS):
            rows = slice(start, min(start + TILE_ROWS, self.rows))
            tile = self.buffer[: (rows.stop - start) * cols].view(-1, cols)
            self.multiply(self.hidden[rows], stripe, tile)
            described = {
                "logits": tile.data_ptr(),
                "bias": 0 if self.bias is None else self.bias[columns].data_ptr(),
                "rows": rows.stop - start,
                "cols": cols,
                "first_col": columns.start,
                "threads": self.threads,
                **self.options,
            }
            yield rows, tile, described

    def multiply(self, hidden: Tensor, stripe: Tensor, out: Tensor) -> None:
        """out = hidden @ stripe.T, summed and left in the wide dtype."""
        if not self.narrow:
            torch.mm(hidden, stripe.T, out=out)
            return
        multiply_bfloat16(hidden, stripe, out)

    def add_product(self, out: Tensor, dz: Tensor, factor: Tensor) -> None:
        """out += dz @ factor, `out` in the wide dtype."""
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
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from stepcredit import _C

    count, wide = hidden.shape[0], wide_dtype(hidden.dtype)
    rows = None if row_mask is None or bool(row_mask.all()) else row_mask.nonzero()[:, 0]
    hidden, targets = _select(rows, hidden, targets)
    kernel = _C.gather_logprobs_fold_cpu_f64 if wide == torch.float64 else _C.gather_logprobs_fold_cpu_f32
    maximum = torch.full(hidden.shape[:1], -torch.inf, dtype=torch.float64)
    total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
    picked = torch.empty(targets.shape, dtype=torch.float64)
    tiles = _Tiles(hidden, weight, bias, temperature=temperature, softcap=softcap or 0.0, scale=logit_scale)
    for columns, stripe in tiles.columns():
        for block, _, tile in tiles.blocks(columns, stripe):
            kernel(
                **tile,
                targets=targets[block].data_ptr(),
                maximum=maximum[block].data_ptr(),
                sum=total[block].data_ptr(),
                weighted=weighted[block].data_ptr(),
                picked=picked[block].data_ptr(),
                num_targets=targets.shape[1],
            )
    log_sum = total.log()
    logprobs = (picked - maximum[:, None]) - log_sum[:, None]
    entropy = log_sum - weighted / total
    results = [t.to(wide) for t in (logprobs, entropy, maximum, log_sum)]
    logprobs, entropy, maximum, log_sum = _spread(rows, count, *results)
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
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from stepcredit import _C

    count, wide = hidden.shape[0], wide_dtype(hidden.dtype)
    active = (grad_logprobs != 0).any(dim=1) | (grad_entropy != 0)
    if weight.shape[0] == 1:  # the only token is certain; recomputed logits would differ from the forward's by rounding
        active.zero_()
    if row_mask is not None:
        active &= row_mask
    rows = None if bool(active.all()) else active.nonzero()[:, 0]
    kept = _select(rows, hidden, targets, grad_logprobs, grad_entropy, entropy, maximum, log_sum)
    chosen, targets, grad_logprobs, grad_entropy, entropy, maximum, log_sum = kept
    tiles = _Tiles(chosen, weight, bias, temperature=temperature, softcap=softcap or 0.0, scale=logit_scale)
    kernel = _C.gather_logprobs_grad_cpu_f64 if wide == torch.float64 else _C.gather_logprobs_grad_cpu_f32
    d_hidden = torch.zeros(chosen.shape, dtype=wide) if needs[0] else None
    d_weight = torch.empty(weight.shape, dtype=weight.dtype) if needs[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=wide) if needs[2] else None
    for columns, stripe in tiles.columns():
        d_stripe = torch.zeros(stripe.shape, dtype=wide) if needs[1] else None
        for block, dz, tile in tiles.blocks(columns, stripe):
            kernel(
                **tile,
                targets=targets[block].data_ptr(),
                grad_logprobs=grad_logprobs[block].data_ptr(),
                grad_entropy=grad_entropy[block].data_ptr(),
                maximum=maximum[block].data_ptr(),
                log_sum=log_sum[block].data_ptr(),
                entropy=entropy[block].data_ptr(),
                num_targets=targets.shape[1],
            )
            if d_hidden is not None:
                tiles.add_product(d_hidden[block], dz, stripe)
            if d_stripe is not None:
                tiles.add_product(d_stripe, dz.T, tiles.hidden[block])
            if d_bias is not None:
                d_bias[columns] += dz.sum(dim=0)
        if d_weight is not None and d_stripe is not None:
            d_weight[columns] = d_stripe  # summed in float32 over all rows, rounded once
    if d_hidden is not None:
        (d_hidden,) = _spread(rows, count, d_hidden.to(hidden.dtype))
    if d_bias is not None and bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return d_hidden, d_weight, d_bias
