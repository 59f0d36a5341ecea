"""The products of `gather_logprobs` backward: a chunk of the logits' gradient with weights, and with hidden states."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hidden_gradient_kernel(
    gradient: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    active: tl.tensor,
    tiles: tl.tensor,
    num_tiles: tl.tensor,
    chunk: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    weight_row: tl.tensor,
    gradient_row: tl.int64,
    tiles_row: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    FILTER: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out[i] += gradient[i] @ weight[chunk : chunk + length], float32, for the active rows i. FILTER: over the first
    `num_tiles` of `tiles`, of COLS tokens, of the block of rows."""
    block = tl.program_id(0)
    count = tl.load(active)
    first = block * ROWS
    if first >= count:
        return
    stop = length
    if FILTER:
        stop = tl.load(num_tiles + block).to(tl.int32) * COLS
    place, depth = first + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (column < width)[None, :]
    at = out + place.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.load(at, mask=inside, other=0.0)
    left_at = gradient + place.to(tl.int64)[:, None] * gradient_row + depth[None, :]
    stripe = weight + tl.cast(chunk, tl.int64) * weight_row
    for step in range(0, stop, DEPTH):
        start = step
        if FILTER:
            start = tl.load(tiles + block * tiles_row + step // COLS).to(tl.int32) * COLS + step % COLS
        left = tl.load(left_at + start)
        # Past the chunk's end the gradient is 0, and its last row is read again.
        token = tl.minimum(start + depth, length - 1)
        right_at = stripe + token.to(tl.int64)[:, None] * weight_row + column[None, :]
        right = tl.load(right_at) if EVEN else tl.load(right_at, mask=inside, other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
        total = tl.dot(left, right.to(left.dtype), total, input_precision=PRECISION)
    tl.store(at, total, mask=inside & (place < count)[:, None])


@triton.jit
def weight_gradient_kernel(
    gradient: tl.tensor,
    hidden: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    active: tl.tensor,
    blocks: tl.tensor,
    num_blocks: tl.tensor,
    chunk: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    hidden_row: tl.tensor,
    gradient_row: tl.int64,
    blocks_row: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    FILTER: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out[chunk + j] = sum over active rows i of gradient[i, j] * hidden[row i]; in float32, rounded once. FILTER: over
    the first `num_blocks` of `blocks`, of ROWS rows, of the block of tokens."""
    block = tl.program_id(0)
    count = tl.load(active).to(tl.int32)
    stop = count
    if FILTER:
        stop = tl.load(num_blocks + block).to(tl.int32) * ROWS
    token = block * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH)
    inside = (column < width)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for step in range(0, stop, DEPTH):
        start = step
        if FILTER:
            start = tl.load(blocks + block * blocks_row + step // ROWS).to(tl.int32) * ROWS + step % ROWS
        place = start + depth
        there = place < count
        left = tl.load(gradient + place.to(tl.int64)[:, None] * gradient_row + token[None, :])
        row = tl.load(order + place, mask=there, other=0)
        right_at = hidden + row[:, None] * hidden_row + column[None, :]
        right = tl.load(right_at, mask=there[:, None] & inside, other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
        total = tl.dot(tl.trans(left), right.to(left.dtype), total, input_precision=PRECISION)
    at = out + (chunk + token).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(token < length)[:, None] & inside)
