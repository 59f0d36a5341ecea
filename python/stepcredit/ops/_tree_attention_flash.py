"""`tree_attention` by the package flash-attn (version 2): a call over every segment's own keys, and one for each
further range of its path; their results are merged by log-sum-exp.

Never run with the package itself: the tests put a plain function of its signature and layout in its place.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator

import torch

Tensor = torch.Tensor


def _installed() -> tuple[int, int] | None:
    """Version of the package, which is not imported: that would load its CUDA libraries."""
    try:
        major, minor = importlib.metadata.version("flash-attn").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


INSTALLED = _installed()

#: Its sequences are the second axis of a grid, and ranges take two of them a segment.
MAX_SEGMENTS = 65_535 // 2


def why_not(*tensors: Tensor, window: int | None = None) -> str | None:
    """Why flash-attn cannot run for these arguments of the op; None when it can."""
    if INSTALLED is None:
        return "the package flash-attn is not installed (pip install flash-attn)"
    if not (2, 6) <= INSTALLED < (3, 0):  # before, there were no soft caps and log-sum-exps were padded
        return f"it needs flash-attn 2.6 or a later version 2, got {'.'.join(map(str, INSTALLED))}"
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"it serves CUDA tensors, got one on {tensor.device}"
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in (torch.bfloat16, torch.float16):
            return f"it serves bfloat16, float16, got {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.shape[-1] > 256:
            return f"it serves head sizes up to 256, got {tensor.shape[-1]}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return f"it needs compute capability 8.0, {torch.cuda.get_device_name(tensor.device)} has less"
    if len(tensors) > 3 and len(tensors[3]) - 1 > MAX_SEGMENTS:
        return f"it serves {MAX_SEGMENTS} segments, got {len(tensors[3]) - 1}"
    # Its window is a diagonal from where a sequence's queries and keys both end, the same one for all sequences. Where
    # the edge of ours crosses a range depends on the lengths of what lies between.
    if window is not None and len(tensors[0]) > window:
        return f"its window cannot follow a path over several ranges, got window={window} for {len(tensors[0])} tokens"
    return None


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
    """The op. Keys are read where they are packed. `window` is at least the number of tokens, so it hides nothing. How
    many ranges a path has and how long segments are, the host must know: it waits for the device once."""
    if not len(q):
        return q.clone()
    from flash_attn import flash_attn_varlen_func

    depths = cu_ranges.diff()
    longest, levels = torch.stack([cu_segments.diff().max(), depths.max()]).tolist()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if scale < 0:  # the package takes the largest product for the largest score
        q, scale = -q, -scale

    def part(cu_queries: Tensor, cu_keys: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, log_sums, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_queries.to(torch.int32),
            cu_keys.to(torch.int32),
            max(longest, 2),  # 1 is a case of its own there, in which every sequence has a query
            len(k),
            softmax_scale=scale,
            causal=causal,
            softcap=softcap or 0.0,
            return_attn_probs=True,
        )
        return out, log_sums

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        # A sequence's keys lie between two neighbours in cu_keys. Ranges overlap, so from the end of one to the start
        # of the next there is a sequence without queries, which the kernel leaves before it looks at keys.
        cu_queries = cu_segments.repeat_interleave(2)[1:-1]
        for level in range(levels):
            there = depths > level
            chosen = ranges[torch.where(there, cu_ranges[:-1] + level, 0)]
            yield part(cu_queries, torch.where(there[:, None], chosen, 0).flatten(), False)
        yield part(cu_segments, cu_segments, True)

    return merge(parts(), q)


def merge(parts: Iterable[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Attention over all keys, as `like` [T, Hq, D], from attention over parts of them [T, Hq, D] and the log-sum-exp
    of their scores [Hq, T], where flash-attn writes +inf for a row that saw none."""
    result = like.new_zeros(like.shape, dtype=torch.float32)
    total = result.new_zeros(*like.shape[:2], 1)
    highest = torch.full_like(total, -torch.inf)
    for out, log_sums in parts:
        here = log_sums.T[..., None]
        here = here.masked_fill(here.isposinf(), -torch.inf)
        above = torch.maximum(highest, here)
        # A row that has seen nothing yet keeps its zeros: -inf - -inf would be NaN.
        reference = above.masked_fill(above.isneginf(), 0.0)
        before, now = (highest - reference).exp(), (here - reference).exp()
        result = result * before + out * now
        total = total * before + now
        highest = above
    return (result / total).to(like.dtype)
