"""`tree_attention` by torch's FlexAttention: compiled on a GPU; on a CPU uncompiled and dense, for tests alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Tensor = torch.Tensor

#: Rows and keys of a block whose mask is looked up as a whole; FlexAttention's default.
BLOCK = 128

# The CPU dtypes are some of the `cpu` implementation's, which comes first: flex is never a CPU tensor's default.
_DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
}


def why_not(*tensors: Tensor, **_: object) -> str | None:
    """Why FlexAttention cannot run for these arguments of the op; None when it can."""
    for tensor in tensors:
        device = tensor.device.type
        if device not in _DTYPES:
            return f"it serves CUDA and CPU tensors, got one on {tensor.device}"
        if device == "cuda" and importlib.util.find_spec("triton") is None:
            return "FlexAttention compiles with Triton, which is not installed"
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in _DTYPES[device]:
            served = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[device])
            return f"on {device.upper()} it serves {served}, got {str(tensor.dtype).removeprefix('torch.')}"
        if device == "cuda" and tensor.shape[-1] < 16:
            return f"FlexAttention on CUDA needs a head size of at least 16, got {tensor.shape[-1]}"
    return None


@cache
def _compiled() -> Callable[..., Any]:
    """One for the process: shapes are dynamic, so bins of any size share it."""
    return torch.compile(flex_attention, dynamic=True)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_segments: Tensor,
    cu_ranges: Tensor,
    ranges: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """The op. No value of the layout crosses to the host but the number of its pieces."""
    if not len(q):
        return q.clone()
    mask = block_mask(cu_segments, cu_ranges, ranges, positions, window)
    score_mod = None
    if softcap is not None:
        bound = torch.full((), softcap, device=q.device)  # a captured number would be compiled in

        def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return bound * torch.tanh(score / bound)

    # Uncompiled, the scores of bfloat16 inputs would be rounded to bfloat16.
    wide = q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32)
    run = _compiled() if q.is_cuda else cast("Callable[..., Any]", flex_attention)
    heads_first = (x.to(wide).transpose(0, 1)[None] for x in (q, k, v))
    out: Tensor = run(*heads_first, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).to(q.dtype)


def block_mask(
    cu_segments: Tensor, cu_ranges: Tensor, ranges: Tensor, positions: Tensor, window: int | None
) -> BlockMask:
    """Who sees whom, from the layout: which segment sees which piece. A piece is a run of keys that lies in one segment
    and that every range holds or leaves out as a whole. Never a [T, T] tensor."""
    device, tokens = positions.device, len(positions)
    at = torch.arange(tokens, device=device)
    bounds = torch.cat([cu_segments, ranges.flatten()]).unique()
    piece = torch.searchsorted(bounds, at, right=True) - 1
    segment = torch.searchsorted(cu_segments, at, right=True) - 1
    # Ranges of a path do not overlap, so sums of their +1 and -1 are 1 within them and 0 elsewhere.
    index = torch.arange(len(cu_ranges) - 1, device=device)
    owner = torch.repeat_interleave(index, cu_ranges.diff(), output_size=len(ranges))
    edges = torch.zeros(len(index), len(bounds), device=device)
    first, last = torch.searchsorted(bounds, ranges).unbind(1)
    edges.index_put_((owner, first), edges.new_ones(()), accumulate=True)
    edges.index_put_((owner, last), -edges.new_ones(()), accumulate=True)
    sees = edges.cumsum(1)
    visible = sees > 0.5
    nearest = positions - (window if window is not None else tokens)  # keys must be beyond it

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = (segment[row] == segment[key]) & (key <= row)
        return (own | visible[segment[row], piece[key]]) & (positions[key] > nearest[row])

    # Pairs of a row and a key that see each other, by block pair; float32 counts them exactly.
    blocks = (tokens + BLOCK - 1) // BLOCK
    segments, pieces = (
        torch.zeros(blocks, size, device=device).index_put_((at // BLOCK, of), edges.new_ones(()), accumulate=True)
        for of, size in ((segment, len(index)), (piece, len(bounds)))
    )
    counts = segments @ (sees @ pieces.T) + (segments @ segments.T).tril(-1)
    some = (counts > 0) | torch.eye(blocks, dtype=torch.bool, device=device)
    full = counts == BLOCK * BLOCK
    if window is not None:
        low, high = (
            torch.full((blocks,), start, device=device).scatter_reduce_(0, at // BLOCK, positions, how)
            for start, how in ((tokens, "amin"), (-1, "amax"))
        )
        some &= low[:, None] - high < window
        full &= high[:, None] - low < window
    (part_count, part_index), (full_count, full_index) = (
        (
            chosen.sum(1, dtype=torch.int32)[None, None],
            chosen.int().argsort(dim=1, descending=True, stable=True).int()[None, None],
        )
        for chosen in (some & ~full, full)
    )
    return BlockMask.from_kv_blocks(
        part_count,
        part_index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(tokens, tokens),
    )
