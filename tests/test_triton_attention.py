"""What only the Triton kernel of `tree_attention` has: head sizes that are padded, blocks of heads, its dtypes.

The op's own grid is in test_tree_attention.py, which runs this kernel too. All of it is interpreted, not run on a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numerics import check
from stepcredit import dispatch
from stepcredit.ops.tree_attention import OP, tree_attention
from test_tree_attention import SEGMENTS, gold, layout, qkv, verify_ragged_tree
from triton_under_test import WHY_NOT

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

#: A trunk, leaves and a leaf of a leaf of several blocks, and siblings that share none.
BLOCKS = [(90, -1, 0), (40, 0, 70), (35, 0, 20), (3, 0, 70), (25, 1, 33), (0, 0, 5), (40, -1, 0)]


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_ragged_trees(data: st.DataObject) -> None:
    verify_ragged_tree(data, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (None, 47), (5.0, 47)])
def test_several_blocks(dtype: torch.dtype, softcap: float | None, window: int | None) -> None:
    tree = layout(BLOCKS)
    q, k, v = qkv(tree.num_tokens, 4, 1, 16, dtype)
    out = tree_attention(q, k, v, tree, scale=1.0, softcap=softcap, window=window, impl="triton")
    check(out, gold(q, k, v, tree, 1.0, softcap, window), q, k, v)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *((torch.float32, width) for width in (1, 64, 80, 256)),
        *((torch.bfloat16, width) for width in (64, 96, 200)),
        *((torch.float16, width) for width in (16, 128, 256)),
    ],
)
def test_head_sizes(dtype: torch.dtype, width: int) -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens, 2, 1, width, dtype)
    out = tree_attention(q, k, v, tree, softcap=20.0, window=6, impl="triton")
    assert out.dtype == dtype
    check(out, gold(q, k, v, tree, width**-0.5, 20.0, 6), q, k, v)


def test_head_sizes_that_are_not_served() -> None:
    with pytest.raises(ValueError, match="impl='triton' cannot run: it serves head sizes up to 256, got 257"):
        dispatch.resolve(OP, "triton", torch.zeros(1, 1, 257))
    with pytest.raises(ValueError, match="it serves float32, bfloat16, float16, got float64"):
        dispatch.resolve(OP, "triton", torch.zeros(1, 1, 64, dtype=torch.float64))


@pytest.mark.parametrize("heads", [(7, 1), (28, 4), (150, 2)])
def test_query_heads_that_do_not_fill_or_overflow_a_block(heads: tuple[int, int]) -> None:
    tree = layout([(5, -1, 0), (4, 0, 3)])
    q, k, v = qkv(tree.num_tokens, *heads)
    check(tree_attention(q, k, v, tree, impl="triton"), gold(q, k, v, tree, 8**-0.5, None, None), q, k, v)


def test_infinite_and_missing_scores_stay_where_they_are() -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    q[2] = math.nan
    k[4, 0, 0] = math.inf  # every later row of the trunk, and what forks behind it, holds inf - inf or exp(-inf)
    out = tree_attention(q, k, v, tree, impl="triton")
    check(out, gold(q, k, v, tree, 8**-0.5, None, None), q, k, v)
    assert out[2].isnan().all()
    assert out[:2].isfinite().all()


def test_a_row_whose_scores_are_all_minus_infinity_is_nan() -> None:
    tree = layout([(3, -1, 0)])
    q, k, v = torch.ones(3, 1, 8), torch.full((3, 1, 8), -math.inf), torch.ones(3, 1, 8)
    check(tree_attention(q, k, v, tree, impl="triton"), gold(q, k, v, tree, 8**-0.5, None, None), q, k, v)


def test_keys_of_strangers_are_not_read() -> None:
    """Neither past the end of a range, within a block of keys, nor of segments that are on no path."""
    tree = layout([(5, -1, 0), (6, -1, 0), (4, 0, 3)])
    q, k, v = qkv(tree.num_tokens)
    expected = tree_attention(q, k, v, tree, impl="triton")
    k[3:11], v[3:11] = math.nan, math.nan  # the end of the first trunk, and the second tree
    assert torch.equal(tree_attention(q, k, v, tree, impl="triton")[11:], expected[11:])
