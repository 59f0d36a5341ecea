"""The walk over tiles of logits that the `cpu` and `cuda` implementations of `gather_logprobs` share: a product by
torch or by us, then C++ or CUDA that folds the tile, or turns it into its gradient in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Tensor = torch.Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and results: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Tiles:
    """Computes logits tile by tile in one reused buffer: vocabulary outside, rows inside. A subclass multiplies.

    Args:
        hidden, weight, bias: as the op has them.
        active: bool [N], rows that are folded and have a gradient; None: all.
        factors: dtype of what is multiplied.
        size: most rows and columns of a tile.
        options: temperature, softcap (None: none) and logit_scale of the op.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        active: Tensor | None,
        *,
        factors: torch.dtype,
        size: tuple[int, int],
        temperature: float,
        softcap: float | None,
        logit_scale: float,
    ) -> None:
        self.wide = wide_dtype(hidden.dtype)
        self.factors = factors
        self.hidden = hidden.to(factors).contiguous()
        self.weight = weight
        self.bias = None if bias is None else bias.to(self.wide).contiguous()
        self.active = active
        self.rows, self.vocabulary = hidden.shape[0], weight.shape[0]
        self.most_rows, self.most_cols = min(self.rows, size[0]), min(self.vocabulary, size[1])
        self.buffer = torch.empty(self.most_rows * self.most_cols, dtype=self.wide, device=hidden.device)
        self.launch = {
            "temperature": temperature,
            "softcap": softcap or 0.0,
            "scale": logit_scale,
            "threads": torch.get_num_threads(),
            "on_cuda": hidden.is_cuda,
            "stream": torch.cuda.current_stream(hidden.device).cuda_stream if hidden.is_cuda else 0,
        }

    def multiply(self, hidden: Tensor, stripe: Tensor, out: Tensor) -> None:
        """out = hidden @ stripe.T, summed and left in the wide dtype."""
        raise NotImplementedError

    def add_product(self, out: Tensor, dz: Tensor, factor: Tensor) -> None:
        """out += dz @ factor, `out` and `dz` in the wide dtype."""
        raise NotImplementedError

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.vocabulary if self.rows else 0, self.most_cols):
            span = slice(start, min(start + self.most_cols, self.vocabulary))
            yield span, self.weight[span].to(self.factors).contiguous()

    def blocks(self, columns: slice, stripe: Tensor) -> Iterator[tuple[slice, Tensor, dict[str, Any]]]:
        """Rows, their tile of matrix products, and what the kernels need to know of the tile."""
        cols = columns.stop - columns.start
        for start in range(0, self.rows, self.most_rows):
            rows = slice(start, min(start + self.most_rows, self.rows))
            tile = self.buffer[: (rows.stop - start) * cols].view(-1, cols)
            self.multiply(self.hidden[rows], stripe, tile)
            described = {
                "logits": tile.data_ptr(),
                "bias": 0 if self.bias is None else self.bias[columns].data_ptr(),
                "active": 0 if self.active is None else self.active[rows].data_ptr(),
                "rows": rows.stop - start,
                "cols": cols,
                "first_col": columns.start,
                **self.launch,
            }
            yield rows, tile, described


def fold(tiles: Tiles, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [N, K], NaN for a target outside of the vocabulary, entropy, maximum and log-sum-exp above it [N]."""
    from stepcredit import _C

    kernel = _C.gather_logprobs_fold_f64 if tiles.wide == torch.float64 else _C.gather_logprobs_fold_f32
    maximum = torch.full((tiles.rows,), -torch.inf, dtype=torch.float64, device=targets.device)
    total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
    picked = torch.full(targets.shape, torch.nan, dtype=torch.float64, device=targets.device)
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
    logprobs, entropy, maximum, log_sum = (t.to(tiles.wide) for t in (logprobs, entropy, maximum, log_sum))
    return logprobs, entropy, maximum, log_sum


def differentiate(
    tiles: Tiles,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden and bias, in the wide dtype, and of weight, in its own: those that `needs` asks for."""
    from stepcredit import _C

    kernel = _C.gather_logprobs_grad_f64 if tiles.wide == torch.float64 else _C.gather_logprobs_grad_f32
    hidden, weight = tiles.hidden, tiles.weight
    d_hidden = torch.zeros(hidden.shape, dtype=tiles.wide, device=hidden.device) if needs[0] else None
    d_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device) if needs[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=tiles.wide, device=weight.device) if needs[2] else None
    for columns, stripe in tiles.columns():
        d_stripe = torch.zeros(stripe.shape, dtype=tiles.wide, device=stripe.device) if needs[1] else None
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
                tiles.add_product(d_stripe, dz.T, hidden[block])
            if d_bias is not None:
                d_bias[columns] += dz.sum(dim=0)
        if d_weight is not None and d_stripe is not None:
            d_weight[columns] = d_stripe  # summed in float32 over all rows, rounded once
    return d_hidden, d_weight, d_bias
