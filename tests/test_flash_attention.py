"""The `flash` implementation of `tree_attention`, with a plain function in the place of the package flash-attn.

What is tested is how the op is laid out for it and merged. The package itself was never run.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from numerics import check
from stepcredit import dispatch
from stepcredit.ops import _tree_attention_flash as flash
from stepcredit.ops.tree_attention import OP, TreeLayout, tree_attention
from test_tree_attention import LONG, SEGMENTS, gold, layout, qkv, ragged_tree

Tensor = torch.Tensor


class Package(ModuleType):
    """`flash_attn` version 2 as far as the op uses it, from its documentation and its kernels: queries and keys of a
    sequence end together, rows that see no key give 0 and a log-sum-exp of +inf, sequences without queries are left
    before anything else of them is looked at. Also takes float32, to tell the layout's errors from rounding."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None]:
        assert (dropout_p, window_size, alibi_slopes, block_table) == (0.0, (-1, -1), None, None)
        assert return_attn_probs
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert len(cu_seqlens_q) == len(cu_seqlens_k) >= 2
        assert all(x.is_contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert softmax_scale is not None
        assert softmax_scale >= 0  # row_max(scores) * scale is taken for row_max(scores * scale)
        assert max_seqlen_q > 1  # with 1 it would view q as [sequences, ...]
        self.calls.append({"keys": k.data_ptr(), "causal": causal})
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        log_sums = torch.full((q.shape[1], len(q)), torch.nan)
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for at in range(len(queries) - 1):
            rows, seen = slice(queries[at], queries[at + 1]), slice(keys[at], keys[at + 1])
            count, length = rows.stop - rows.start, seen.stop - seen.start
            assert 0 <= count <= max_seqlen_q
            if count == 0:
                continue
            assert 0 <= seen.start <= seen.stop <= len(k)
            assert length <= max_seqlen_k
            group = q.shape[1] // k.shape[1]
            key, value = (x[seen].float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            scores = q[rows].float().transpose(0, 1) @ key.mT * softmax_scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if causal:
                hidden = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
                scores = scores.masked_fill(hidden, -math.inf)
            top = scores.amax(-1, keepdim=True) if length else scores.new_full((*scores.shape[:2], 1), -math.inf)
            weights = (scores - top.masked_fill(top.isneginf(), 0.0)).exp()
            total = weights.sum(-1, keepdim=True)
            nothing = (total == 0) | total.isnan()
            out[rows] = ((weights @ value) / total.masked_fill(nothing, 1.0)).transpose(0, 1).to(q.dtype)
            log_sums[:, rows] = (top + total.log()).masked_fill(nothing, math.inf)[..., 0]
        return out, log_sums, None


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    package = Package()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return package


def attend(q: Tensor, k: Tensor, v: Tensor, tree: TreeLayout, scale: float, softcap: float | None = None) -> Tensor:
    parts = (tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions)
    return flash.attend(q, k, v, *parts, scale=scale, softcap=softcap, window=None)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (9, 3)])
@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_values(dtype: torch.dtype, softcap: float | None, heads: tuple[int, int], scale: float) -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens, *heads, dtype=dtype)
    out = attend(q, k, v, tree, scale, softcap)
    assert out.dtype == dtype
    check(out, gold(q, k, v, tree, scale, softcap, None), q, k, v)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_long_segments(softcap: float | None) -> None:
    tree = layout(LONG)
    q, k, v = qkv(tree.num_tokens, 2, 1, 4)
    check(attend(q, k, v, tree, 0.5, softcap), gold(q, k, v, tree, 0.5, softcap, None), q, k, v)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_ragged_trees(data: st.DataObject) -> None:
    tree = ragged_tree(data)
    q, k, v = qkv(tree.num_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", Package())
        check(attend(q, k, v, tree, 8**-0.5), gold(q, k, v, tree, 8**-0.5, None, None), q, k, v)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("lengths", [[], [0], [1], [1, 1, 0, 1]])
def test_empty_and_single_tokens(lengths: list[int]) -> None:
    tree = TreeLayout.build(lengths, [[] for _ in lengths])
    q, k, v = qkv(tree.num_tokens)
    torch.testing.assert_close(attend(q, k, v, tree, 1.0), v.repeat_interleave(2, dim=1))


def test_keys_are_read_where_they_are_once_a_level(package: Package) -> None:
    """SEGMENTS has paths of up to two ranges."""
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    attend(q, k, v, tree, 1.0)
    assert package.calls == [{"keys": k.data_ptr(), "causal": causal} for causal in (False, False, True)]


@pytest.mark.usefixtures("package")
def test_strided_views() -> None:
    tree = layout(SEGMENTS)
    q = torch.randn(4, tree.num_tokens, 8).transpose(0, 1)
    k, v = torch.randn(2, 2, tree.num_tokens, 8).transpose(1, 2)
    last = torch.randn(tree.num_tokens, 2, 16)[..., ::2]  # width is not the fastest dimension
    for keys in (k, last):
        check(attend(q, keys, v, tree, 0.3), gold(q, keys, v, tree, 0.3, None, None), q, keys, v)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("planted", [300.0, -300.0, math.inf, math.nan])
def test_planted_extremes(planted: float) -> None:
    """Where a range's scores dwarf the others' nothing of those is left; infinities and NaN stay where they are."""
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    k[3] *= planted
    check(attend(q, k, v, tree, 8**-0.5), gold(q, k, v, tree, 8**-0.5, None, None), q, k, v)


@pytest.mark.usefixtures("package")
def test_a_row_whose_scores_are_all_minus_infinity_is_nan() -> None:
    tree = layout([(3, -1, 0), (2, 0, 2)])
    q, k, v = torch.ones(5, 1, 8), torch.full((5, 1, 8), -math.inf), torch.ones(5, 1, 8)
    check(attend(q, k, v, tree, 1.0), gold(q, k, v, tree, 1.0, None, None), q, k, v)


def test_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    monkeypatch.setattr(flash, "INSTALLED", None)
    with pytest.raises(ValueError, match=r"impl='flash' cannot run: .*pip install flash-attn"):
        tree_attention(q, k, v, tree, impl="flash")
    for old in ((2, 5), (3, 0)):
        monkeypatch.setattr(flash, "INSTALLED", old)
        with pytest.raises(ValueError, match=rf"needs flash-attn 2\.6 or a later version 2, got {old[0]}\.{old[1]}"):
            tree_attention(q, k, v, tree, impl="flash")
    monkeypatch.setattr(flash, "INSTALLED", (2, 8))
    with pytest.raises(ValueError, match="it serves CUDA tensors, got one on cpu"):
        tree_attention(q, k, v, tree, impl="flash")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)  # else its kernel comes first
    with FakeTensorMode():
        half = [torch.zeros(35, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        parts = [torch.zeros(n, dtype=torch.int64, device="cuda") for n in (10, 10, 8, 35)]
        for window in (None, 35, 99):
            assert dispatch.resolve(OP, None, *half, *parts, window=window) == "flash"
        for message, tensors, window in (
            ("serves bfloat16, float16, got float32", [x.float() for x in half], None),
            ("serves head sizes up to 256, got 320", [x.repeat(1, 1, 5) for x in half], None),
            ("serves 32767 segments, got 40000", [*half, parts[0].new_zeros(40_001)], None),
            ("cannot follow a path over several ranges, got window=34 for 35 tokens", [*half, *parts], 34),
        ):
            with pytest.raises(ValueError, match=message):
                dispatch.resolve(OP, "flash", *tensors, window=window)
            assert dispatch.resolve(OP, None, *tensors, window=window) != "flash"
