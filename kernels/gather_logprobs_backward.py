"""`gather_logprobs` backward: the gradient of a chunk of logits is recomputed, kept, and multiplied into those of
hidden states and weights, chunk after chunk of the vocabulary. It is kept in the dtype of the inputs; for float16, in
whose range most probabilities are 0, in float32 and multiplied as TF32, which holds every float16 exactly.

Rows whose incoming gradients are all 0 are sorted behind the others on the device first: no program works on them.
Every sum is float32, by one program in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepcredit.kernels import configs
from stepcredit.kernels._device import on_device
from stepcredit.kernels._logits import tile_of_logits
from stepcredit.kernels.gather_logprobs import compacted


@triton.jit
def logits_gradient_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    targets: tl.tensor,
    grad_logprobs: tl.tensor,
    grad_entropy: tl.tensor,
    entropy: tl.tensor,
    maximum: tl.tensor,
    log_sum: tl.tensor,
    order: tl.tensor,
    active: tl.tensor,
    gradient: tl.tensor,
    sums: tl.tensor,
    chunk: tl.tensor,
    num_targets: tl.tensor,
    width: tl.tensor,
    vocabulary: tl.tensor,
    hidden_row: tl.tensor,
    weight_row: tl.tensor,
    gradient_row: tl.int64,
    scale: tl.float32,
    softcap: tl.float32,
    cooling: tl.float32,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """gradient[i, j]: of the logit, before scale and soft cap, of the i-th active row and token chunk + j.

    With p = exp(z - logsumexp(z)), H the entropy and g the incoming gradients, by a tempered logit z_j:
    d logp_t / d z_j = [j == t] - p_j, and d H / d z_j = -p_j (log p_j + H).
    """
    count = tl.load(active)
    first = tl.program_id(0) * ROWS
    if first >= count:
        return
    one = tl.arange(0, COLS)
    place = first + tl.arange(0, ROWS)
    inside = place < count
    row = tl.load(order + place, mask=inside, other=tl.load(order))
    begin = chunk + tl.program_id(1) * COLS
    z, slope = tile_of_logits(
        hidden + row * hidden_row, weight, bias, begin, width, vocabulary, weight_row,
        scale, softcap, cooling, ROWS, COLS, DEPTH, BIAS, SOFTCAP, EVEN, UPCAST,
    )  # fmt: skip
    logp = z - tl.load(maximum + row)[:, None] - tl.load(log_sum + row)[:, None]
    p = tl.exp(logp)
    by_entropy = tl.load(grad_entropy + row)[:, None] * (logp + tl.load(entropy + row)[:, None])
    # p = 0 has no part in the entropy, though its logarithm is -inf.
    dz = tl.where(p > 0, -p * by_entropy, p * 0.0)
    for k in range(num_targets):
        at = tl.load(targets + row * num_targets + k)
        g = tl.load(grad_logprobs + row * num_targets + k)
        dz += g[:, None] * (tl.where(one[None, :] == (at - begin)[:, None], 1.0, 0.0) - p)
    dz = tl.where(inside[:, None] & (one < vocabulary - begin)[None, :], dz * slope, 0.0)
    out = gradient + place.to(tl.int64)[:, None] * gradient_row + (begin - chunk + one)[None, :]
    tl.store(out, dz.to(gradient.dtype.element_ty))
    if BIAS:
        tl.store(sums + tl.program_id(0) * gradient_row + begin - chunk + one, tl.sum(dz, axis=0))


@triton.jit
def hidden_gradient_kernel(
    gradient: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    active: tl.tensor,
    chunk: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    weight_row: tl.tensor,
    gradient_row: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out[i] += gradient[i] @ weight[chunk : chunk + length], float32, for the active rows i."""
    count = tl.load(active)
    first = tl.program_id(0) * ROWS
    if first >= count:
        return
    place, depth = first + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (column < width)[None, :]
    at = out + place.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.load(at, mask=inside, other=0.0)
    left_at = gradient + place.to(tl.int64)[:, None] * gradient_row + depth[None, :]
    stripe = weight + tl.cast(chunk, tl.int64) * weight_row
    for start in range(0, length, DEPTH):
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
    chunk: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    hidden_row: tl.tensor,
    gradient_row: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out[chunk + j] = sum over active rows i of gradient[i, j] * hidden[row i]; in float32, rounded once."""
    count = tl.load(active).to(tl.int32)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH)
    inside = (column < width)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, count, DEPTH):
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


def launch(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    entropy: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias, those that `needs` asks for, in their dtypes."""
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    hidden, weight = (x if x.stride(1) == 1 and x.stride(0) < 2**23 else x.contiguous() for x in (hidden, weight))
    config = configs.GATHER_LOGPROBS_BACKWARD[hidden.dtype]
    ROWS, COLS, chunk = config.blocks["ROWS"], config.blocks["COLS"], configs.CHUNK
    blocks = triton.cdiv(rows, ROWS)
    kept = (grad_logprobs != 0).any(dim=1) | (grad_entropy != 0)
    if vocabulary == 1:  # the only token is certain; recomputed logits would differ from the forward's by rounding
        kept = torch.zeros_like(kept)
    order, active = compacted(kept if row_mask is None else kept & row_mask)
    d_hidden = torch.zeros(blocks * ROWS, width, dtype=torch.float32, device=hidden.device) if needs[0] else None
    d_weight = weight.new_zeros(weight.shape) if needs[1] else None
    d_bias = torch.zeros(vocabulary, dtype=torch.float32, device=hidden.device) if needs[2] else None
    half = hidden.dtype == torch.float16
    gradient = hidden.new_empty((blocks * ROWS, chunk), dtype=torch.float32 if half else hidden.dtype)
    precision = "tf32" if half else "ieee"
    sums = torch.zeros(blocks if bias is not None else 0, chunk, dtype=torch.float32, device=hidden.device)
    even = width % config.blocks["DEPTH"] == 0
    upcast = triton.knobs.runtime.interpret
    with on_device(hidden):
        for start in range(0, vocabulary if rows else 0, chunk):
            length = min(chunk, vocabulary - start)
            logits_gradient_kernel[(blocks, triton.cdiv(length, COLS))](
                hidden,
                weight,
                bias if bias is None else bias.contiguous(),
                targets.contiguous(),
                grad_logprobs.contiguous(),
                grad_entropy.contiguous(),
                entropy,
                maximum,
                log_sum,
                order,
                active,
                gradient,
                sums,
                start,
                targets.shape[1],
                width,
                vocabulary,
                hidden.stride(0),
                weight.stride(0),
                chunk,
                logit_scale,
                softcap or 0.0,
                1 / temperature,
                BIAS=bias is not None,
                SOFTCAP=softcap is not None,
                EVEN=even,
                UPCAST=upcast,
                **config.launch,
            )
            if d_hidden is not None:
                hidden_gradient_kernel[(blocks, triton.cdiv(width, COLS))](
                    gradient,
                    weight,
                    d_hidden,
                    active,
                    start,
                    length,
                    width,
                    weight.stride(0),
                    chunk,
                    EVEN=width % COLS == 0,
                    UPCAST=upcast,
                    PRECISION=precision,
                    **config.launch,
                )
            if d_weight is not None:
                weight_gradient_kernel[(triton.cdiv(length, ROWS), triton.cdiv(width, COLS))](
                    gradient,
                    hidden,
                    d_weight,
                    order,
                    active,
                    start,
                    length,
                    width,
                    hidden.stride(0),
                    chunk,
                    UPCAST=upcast,
                    PRECISION=precision,
                    **config.launch,
                )
            if d_bias is not None:
                d_bias[start : start + length] = sums[:, :length].sum(dim=0)
    if d_hidden is not None:
        d_hidden = torch.empty_like(hidden).index_copy_(0, order, d_hidden[:rows].to(hidden.dtype))
    return d_hidden, d_weight, d_bias if d_bias is None or bias is None else d_bias.to(bias.dtype)
