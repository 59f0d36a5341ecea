"""`tree_attention` on the trees of counterfactual scoring against SDPA: `pytest benchmarks/bench_tree_attention.py`.

Baselines are the other implementations that can run here, which rank as dispatch takes them, and two ways without the
op: scaled_dot_product_attention of the same packed tokens under a dense mask, made beforehand; and of every context as
a sequence of its own, those of one search padded to a batch, as IG-Search's released code runs them.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import numerics
from benchmarks.measure import DEVICE, interleave, record_peaks, size_bytes
from benchmarks.shapes import SHAPES
from stepcredit import dispatch, reference
from stepcredit.ops.tree_attention import OP, TreeLayout, tree_attention

#: The reference holds all scores, so it checks the first segments, of about this many tokens; dense checks the rest.
CHECKED_TOKENS = 2048

Path = list[tuple[int, int]]


def forest(size: dict[str, int]) -> tuple[list[int], list[Path], list[list[int]]]:
    """Lengths and ranges of the segments, and the contexts of each search as indices of leaves.

    A tree is a prompt, rollouts that go on after it, and leaves on them: where the passages of a search begin its
    counterfactual ones, where they end the real one. Lengths vary by a quarter.
    """
    draw = random.Random(0)
    lengths: list[int] = []
    ranges: list[Path] = []
    searches: list[list[int]] = []

    def add(length: int, path: Path) -> Path:
        start = sum(lengths)
        lengths.append(length)
        ranges.append(path)
        return [*path, (start, start + length)]

    def varied(length: int) -> int:
        return round(length * draw.uniform(0.75, 1.25))

    for _ in range(size["trees"]):
        prompt = add(varied(size["prompt"]), [])
        rollouts = [add(varied(size["rollout"]), prompt) for _ in range(size["rollouts"])]
        for *path, (start, stop) in rollouts:
            every = (stop - start) // size["searches"]
            for search in range(size["searches"]):
                fork, end = start + search * every + every // 4, start + (search + 1) * every
                first = len(lengths)
                for _ in range(size["counterfactuals"]):
                    add(varied(size["leaf"]), [*path, (start, fork)])
                add(size["probe"], [*path, (start, end)])
                searches.append(list(range(first, len(lengths))))
    return lengths, ranges, searches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES["tree_attention"])
def test_tree_attention(benchmark: Any, shape: str, dtype: torch.dtype) -> None:
    size = SHAPES["tree_attention"][shape]
    lengths, ranges, searches = forest(size)
    tree = TreeLayout.build(lengths, ranges, DEVICE)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(tree.num_tokens, heads, size["width"]).to(DEVICE, dtype)
        for heads in (size["heads"], size["kv_heads"], size["kv_heads"])
    )
    mask = reference.tree_mask(tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions, None)
    paths = [
        torch.cat([torch.arange(*r) for r in [*path, (at, at + n)]])
        for path, at, n in zip(ranges, tree.cu_segments.tolist(), lengths, strict=False)
    ]
    # Right padding is hidden by causality, and what these tokens are does not matter to the time: no mask, no copies.
    batches = [
        torch.nn.utils.rnn.pad_sequence([paths[leaf] for leaf in leaves], batch_first=True).to(DEVICE)
        for leaves in searches
    ]
    padded = [tuple(x[batch].transpose(1, 2) for x in (q, k, v)) for batch in batches]

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return tree_attention(q, k, v, tree)

    @torch.no_grad()
    def dense() -> torch.Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    @torch.no_grad()
    def separate() -> list[torch.Tensor]:
        return [F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True) for batch in padded]

    # A wrong result has no speed.
    out = ours()
    checked = next((i for i, end in enumerate(tree.cu_segments.tolist()) if end > CHECKED_TOKENS), len(lengths) + 1) - 1
    part = TreeLayout.build(lengths[:checked], ranges[:checked], DEVICE)
    layout = (part.cu_segments, part.cu_ranges, part.ranges, part.positions)
    numerics.check(
        out[: part.num_tokens],
        lambda q, k, v: reference.tree_attention(
            q, k, v, *layout, scale=size["width"] ** -0.5, softcap=None, window=None
        ),
        *(x[: part.num_tokens] for x in (q, k, v)),
    )
    allowed = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(dense(), out, atol=allowed, rtol=0)
    for leaves, result in zip(searches, separate(), strict=True):
        for leaf, context in zip(leaves, result, strict=True):
            own = paths[leaf][-lengths[leaf] :].to(DEVICE)
            context = context.transpose(0, 1)[len(paths[leaf]) - lengths[leaf] : len(paths[leaf])]
            torch.testing.assert_close(context, out[own], atol=allowed, rtol=0)

    info = benchmark.extra_info
    info["tokens"] = tree.num_tokens
    info["separate_tokens"] = sum(batch.numel() for batch in batches)
    info["flops"] = 4 * size["heads"] * size["width"] * int(mask.sum())
    info["bytes"] = size_bytes(q, k, v, out)
    # On a CPU Triton's interpreter and uncompiled FlexAttention only prove what is meant for a GPU.
    left_out = {dispatch.resolve(OP, None, q, k, v), *(("triton", "flex") if DEVICE == "cpu" else ())}
    able = [name for name, why in dispatch.reasons(OP, q, k, v).items() if why is None and name not in left_out]
    others = {name: partial(tree_attention, q, k, v, tree, impl=name) for name in able}
    baselines = {"dense": dense, "separate": separate, **others}
    interleave(benchmark, ours, baselines)
    record_peaks(benchmark, ours, baselines)
