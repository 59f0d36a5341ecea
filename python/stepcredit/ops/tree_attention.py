"""`tree_attention`: attention of packed tokens over the path from their root, so that branches share their trunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch

from stepcredit import dispatch, reference
from stepcredit.ops import _checks as check
from stepcredit.ops._tree_layout import TreeLayout

OP = "tree_attention"
dispatch.register(OP, "reference", dispatch.always)(reference.tree_attention)

#: Query rows whose scores are alive at once where they must be materialised (soft cap, active window).
ROWS = 256


def _cpu_why_not(*tensors: torch.Tensor) -> str | None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it serves CPU tensors, got one on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            return f"it serves float32, float64, bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


@dispatch.register(OP, "cpu", _cpu_why_not)
def _cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_segments: torch.Tensor,
    cu_ranges: torch.Tensor,
    ranges: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    deepest = int(positions.max()) if positions.numel() else 0
    materialise = softcap is not None or (window is not None and deepest >= window)
    for offsets, keys in _blocks(cu_segments.tolist(), cu_ranges.tolist(), ranges.tolist()):
        if materialise:
            for start, stop in pairwise(offsets):
                _masked(out, q, k, v, positions, keys, start, stop, scale, softcap, window)
        else:
            _block(out, q, k, v, keys, offsets, scale)
    return out


def _blocks(
    cu_segments: list[int], cu_ranges: list[int], ranges: list[list[int]]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Runs of consecutive non-empty segments that see the same ranges: (their token offsets, the ranges)."""
    offsets: list[int] = []
    seen: list[list[int]] = []
    for segment, (start, stop) in enumerate(pairwise(cu_segments)):
        if start == stop:
            continue
        keys = ranges[cu_ranges[segment] : cu_ranges[segment + 1]]
        if offsets and keys == seen:
            offsets.append(stop)
            continue
        if offsets:
            yield offsets, seen
        offsets, seen = [start, stop], keys
    if offsets:
        yield offsets, seen


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [b, l, h, d] and log-sum-exp [b, l, h] of [b, l, h, d] tensors; fewer key heads than query heads are
    shared without being repeated. This is the kernel behind scaled_dot_product_attention, which keeps the second
    result to itself."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _block(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: list[list[int]],
    offsets: list[int],
    scale: float,
) -> None:
    """Segments that see the same ranges: one call for all their queries per range, causal calls for their own tokens
    (segments of equal length batched), merged by log-sum-exp. No mask, and no key is copied."""
    begin, end = offsets[0], offsets[-1]
    own, lse = out[begin:end], torch.empty(end - begin, q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    lengths = [stop - start for start, stop in pairwise(offsets)]
    at = 0
    while at < len(lengths):
        n = 1
        while at + n < len(lengths) and lengths[at + n] == lengths[at]:
            n += 1
        rows = slice(offsets[at], offsets[at + n])
        query, key, value = (x[rows].unflatten(0, (n, lengths[at])) for x in (q, k, v))
        part, part_lse = _attend(query, key, value, causal=True, scale=scale)
        local = slice(rows.start - begin, rows.stop - begin)
        own[local].copy_(part.flatten(0, 1))
        lse[local].copy_(part_lse.flatten(0, 1))
        at += n
    for start, stop in keys:
        part, part_lse = _attend(
            q[None, begin:end], k[None, start:stop], v[None, start:stop], causal=False, scale=scale
        )
        weight = torch.sigmoid(part_lse[0] - lse).unsqueeze(-1)
        own.copy_(torch.lerp(own.to(weight.dtype), part[0].to(weight.dtype), weight))
        lse = torch.logaddexp(lse, part_lse[0])


def _masked(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    keys: list[list[int]],
    start: int,
    stop: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    """One segment with scores in hand, ROWS queries at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = k.shape[1]
    for low in range(start, stop, ROWS):
        high = min(low + ROWS, stop)
        index = torch.cat([torch.arange(a, b) for a, b in [*keys, [start, high]]])
        if window is not None:
            index = index[positions[index] > positions[low] - window]
        # [heads, group * rows, d]: the query heads of one key head are rows of one product
        query = q[low:high].to(wide).unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        scores = query.flatten(1, 2) @ k[index].to(wide).permute(1, 2, 0) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows = torch.arange(low, high)[:, None]
        visible = index <= rows
        if window is not None:
            visible &= positions[rows] - positions[index] < window
        scores = scores.unflatten(1, (-1, high - low)).masked_fill(~visible, -math.inf).softmax(-1)
        result = scores.flatten(1, 2) @ v[index].to(wide).transpose(0, 1)
        out[low:high] = result.unflatten(1, (-1, high - low)).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)


@torch.library.custom_op("stepcredit::tree_attention", mutates_args=())
def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_segments: torch.Tensor,
    cu_ranges: torch.Tensor,
    ranges: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    impl: str,
) -> torch.Tensor:
    result: torch.Tensor = dispatch.function(OP, impl)(
        q, k, v, cu_segments, cu_ranges, ranges, positions, scale=scale, softcap=softcap, window=window
    )
    return result.contiguous()


@_op.register_fake
def _(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape)


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tree: TreeLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention of packed tokens over their own segment (causally) and over the path that leads to it.

    Equivalent, with `mask = reference.tree_mask(...)` [T, T] and the heads of k and v repeated::

        scores = einsum("thd,shd->hts", q, k) * scale
        scores = softcap * tanh(scores / softcap)                # when softcap is given
        out    = einsum("hts,shd->thd", scores.masked_fill(~mask, -inf).softmax(-1), v)

    so that every branch of a tree of tokens gets what it would get as a sequence of its own. Forward only: it raises
    when a gradient is asked for. Scores are accumulated in float32 (float64 inputs: float64). Deterministic.

    Args:
        q: float [T, Hq, D]; may be a strided view, as k and v may.
        k: [T, Hkv, D], dtype of q; Hkv divides Hq, and query heads `[i * Hq / Hkv, (i + 1) * Hq / Hkv)` share head i.
        v: [T, Hkv, D], dtype of q.
        tree: layout of the T tokens, on the device of q.
        scale: factor on q @ k, default 1 / sqrt(D).
        softcap: bound of the scores through tanh (Gemma-2); None switches it off.
        window: a token sees keys fewer than `window` positions back on its path, itself included; None: all of them.
        impl: "cpu" or "reference"; None picks the first that can run.

    Returns:
        out [T, Hq, D], contiguous, dtype of q.

    Raises:
        TypeError: an argument is not a tensor, or tree is not a TreeLayout.
        ValueError: a shape, dtype, device or option is wrong, or an argument requires a gradient in grad mode.

    Source: prefix sharing by log-sum-exp as in Hydragen (arXiv 2402.05099), for trees of any depth.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        check.tensor(OP, name, value, 3, "f")
        check.require(value.dtype == q.dtype, f"{OP}: {name} is {value.dtype}, q is {q.dtype}; they must be equal")
    if not isinstance(tree, TreeLayout):
        raise TypeError(f"{OP}: tree must be a TreeLayout, got {type(tree).__name__}")
    check.same_device(OP, q=q, k=k, v=v, tree=tree.positions)
    check.length(OP, "q", q, tree.num_tokens, "tokens of the tree")
    check.require(k.shape == v.shape, f"{OP}: k is {tuple(k.shape)}, v is {tuple(v.shape)}; they must be equal")
    check.length(OP, "k", k, tree.num_tokens, "tokens of the tree")
    (_, heads, width), (_, kv_heads, kv_width) = q.shape, k.shape
    check.require(width == kv_width and width > 0, f"{OP}: q has width {width}, k has {kv_width}; equal and positive")
    check.require(kv_heads > 0 and heads % kv_heads == 0, f"{OP}: k's {kv_heads} heads must divide q's {heads} heads")
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    check.require(math.isfinite(scale), f"{OP}: scale must be finite, got {scale!r}")
    check.require(softcap is None or 0 < softcap < math.inf, f"{OP}: softcap must be positive, got {softcap!r}")
    check.require(window is None or window > 0, f"{OP}: window must be positive, got {window!r}")
    check.require(
        not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)),
        f"{OP}: forward only, but q, k or v requires a gradient; call it under torch.no_grad()",
    )
    layout = (tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions)
    name = dispatch.resolve(OP, impl, q, k, v, *layout)
    return _op(q, k, v, *layout, scale, None if softcap is None else float(softcap), window, name)
