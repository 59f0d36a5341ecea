from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import stepcredit
from numerics import check
from stepcredit import dispatch, reference
from stepcredit.ops import _tree_attention_cpu, _tree_attention_flex
from stepcredit.ops.tree_attention import OP, TreeLayout, tree_attention
from triton_under_test import TRITON

# On the CPU flex runs uncompiled, which torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

IMPLS = ("cpu", "flex", TRITON, "reference")
#: Triton's other dtypes are in test_triton_attention.py, as are its blocks and ragged trees.
IMPLS_AND_DTYPES = (
    *itertools.product(("cpu", "flex", "reference"), (torch.float32, torch.bfloat16, torch.float64)),
    ("cpu", torch.float16),
    pytest.param("triton", torch.float32, marks=TRITON.marks),
)

#: A trunk and leaves of several tiles and blocks, siblings that share a tile and siblings that do not.
LONG = [(600, -1, 0), (60, 0, 500), (50, 0, 500), (90, 0, 500), (300, 0, 500), (3, 0, 500), (40, 4, 300), (140, -1, 0)]

#: (lengths, parent, tokens of the parent that are seen): a trunk with two equal leaves and one other at one fork, a
#: leaf of a leaf, a leaf elsewhere, an empty segment, and a second tree.
SEGMENTS = [(9, -1, 0), (4, 0, 5), (4, 0, 5), (3, 0, 5), (2, 2, 3), (1, 0, 9), (0, 0, 2), (7, -1, 0), (5, 7, 7)]


def layout(segments: list[tuple[int, int, int]]) -> TreeLayout:
    starts = [sum(n for n, _, _ in segments[:i]) for i in range(len(segments))]
    ranges: list[list[tuple[int, int]]] = []
    for _, parent, at in segments:
        ranges.append([*ranges[parent], (starts[parent], starts[parent] + at)] if parent >= 0 and at else [])
    return TreeLayout.build([n for n, _, _ in segments], ranges)


def paths(segments: list[tuple[int, int, int]]) -> list[list[int]]:
    """Packed token indices of each segment's whole path, found by walking up: what a separate sequence would hold."""
    starts = [sum(n for n, _, _ in segments[:i]) for i in range(len(segments))]

    def walk(segment: int, count: int) -> list[int]:
        _, parent, at = segments[segment]
        return (walk(parent, at) if parent >= 0 else []) + list(range(starts[segment], starts[segment] + count))

    return [walk(i, n) for i, (n, _, _) in enumerate(segments)]


def qkv(tokens: int, heads: int = 4, kv_heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float32):
    return (torch.randn(tokens, h, width).to(dtype) for h in (heads, kv_heads, kv_heads))


def gold(q, k, v, tree: TreeLayout, scale: float, softcap: float | None, window: int | None):
    parts = (tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions)
    return lambda q, k, v: reference.tree_attention(q, k, v, *parts, scale=scale, softcap=softcap, window=window)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS_AND_DTYPES)
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 3), (2.0, 4), (None, 99)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (9, 3)])
def test_values(
    impl: str, dtype: torch.dtype, softcap: float | None, window: int | None, heads: tuple[int, int]
) -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens, *heads, dtype=dtype)
    out = tree_attention(q, k, v, tree, scale=0.5, softcap=softcap, window=window, impl=impl)
    assert out.dtype == dtype
    assert out.is_contiguous()
    check(out, gold(q, k, v, tree, 0.5, softcap, window), q, k, v)


@pytest.mark.parametrize("window", [None, 4])
def test_every_path_is_a_sequence_of_its_own(window: int | None) -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    out = tree_attention(q, k, v, tree, window=window)
    for (length, _, _), path in zip(SEGMENTS, paths(SEGMENTS), strict=True):
        if not length:
            continue
        n = len(path)
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            mask &= torch.ones(n, n, dtype=torch.bool).triu(1 - window)
        separate = torch.nn.functional.scaled_dot_product_attention(
            *(x[path].transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(out[path[-length:]], separate[0].transpose(0, 1)[-length:], atol=2e-6, rtol=0)
        assert tree.positions[path].tolist() == list(range(n))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_ragged_trees(data: st.DataObject) -> None:
    verify_ragged_tree(data, "cpu")


def ragged_tree(data: st.DataObject) -> TreeLayout:
    segments: list[tuple[int, int, int]] = []
    for i in range(data.draw(st.integers(1, 7))):
        parent = data.draw(st.integers(-1, i - 1))
        at = data.draw(st.integers(0, segments[parent][0])) if parent >= 0 else 0
        segments.append((data.draw(st.integers(0, 6)), parent, at))
    return layout(segments)


def verify_ragged_tree(data: st.DataObject, impl: str) -> None:
    tree = ragged_tree(data)
    q, k, v = qkv(tree.num_tokens)
    window = data.draw(st.sampled_from([None, 1, 3]))
    check(tree_attention(q, k, v, tree, window=window, impl=impl), gold(q, k, v, tree, 8**-0.5, None, window), q, k, v)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views(impl: str) -> None:
    tree = layout(SEGMENTS)
    T = tree.num_tokens
    q = torch.randn(4, T, 8).transpose(0, 1)
    k, v = torch.randn(2, 2, T, 8).transpose(1, 2)
    v = v.flip(-1).as_strided(v.shape, v.stride())
    last = torch.randn(T, 2, 16)[..., ::2]  # width is not the fastest dimension
    for keys in (k, last):
        out = tree_attention(q, keys, v, tree, impl=impl)
        check(out, gold(q, keys, v, tree, 8**-0.5, None, None), q, keys, v)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[], [0], [1]])
def test_empty_and_one(impl: str, lengths: list[int]) -> None:
    tree = TreeLayout.build(lengths, [[] for _ in lengths])
    q, k, v = qkv(tree.num_tokens)
    out = tree_attention(q, k, v, tree, impl=impl)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("impl", ["cpu", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (None, 280), (5.0, 280)])
def test_several_tiles(impl: str, dtype: torch.dtype, softcap: float | None, window: int | None) -> None:
    tree = layout(LONG)
    q, k, v = qkv(tree.num_tokens, 2, 1, 4, dtype)
    out = tree_attention(q, k, v, tree, softcap=softcap, window=window, impl=impl)
    check(out, gold(q, k, v, tree, 0.5, softcap, window), q, k, v)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("missing", ["product", "room"])
def test_bfloat16_where_rows_of_scores_do_not_serve(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, missing: str
) -> None:
    if missing == "product":
        monkeypatch.setattr(_tree_attention_cpu, "multiplies_bfloat16", lambda *_: False)
    else:
        monkeypatch.setattr(_tree_attention_cpu, "SCORES", 0)
    tree = layout(LONG)
    q, k, v = qkv(tree.num_tokens, 2, 1, 4, torch.bfloat16)
    out = tree_attention(q, k, v, tree, softcap=softcap, impl="cpu")
    check(out, gold(q, k, v, tree, 0.5, softcap, None), q, k, v)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_scores_are_not_rounded(impl: str) -> None:
    # Scores of 256 and 257 are the same number in bfloat16, and their softmax is not 1/2.
    tree = TreeLayout.build([2], [[]])
    q = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).bfloat16()[:, None]
    k = torch.tensor([[256.0, 0.0], [256.0, 1.0]]).bfloat16()[:, None]
    v = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).bfloat16()[:, None]
    out = tree_attention(q, k, v, tree, scale=1.0, impl=impl)
    assert out[1, 0, 0].item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=4e-3)


def test_tiles_cover_every_row_once_and_see_its_path() -> None:
    for segments in (SEGMENTS, LONG):
        tree = layout(segments)
        values = (t.numpy().tobytes() for t in (tree.cu_segments, tree.cu_ranges, tree.ranges))
        mask = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.bool)
        end = 0
        for tile in _tree_attention_cpu.plan(*values, None):
            assert tile.start == end
            assert tile.stop - tile.start <= _tree_attention_cpu.ROWS
            assert all(a[1] != b[0] for a, b in zip(tile.keys, tile.keys[1:], strict=False))
            end = tile.stop
            for start, stop in tile.keys:
                mask[tile.start : tile.stop, start:stop] = True
            mask[tile.start : tile.stop, tile.start : tile.stop] = tile.own == 0
        assert end == tree.num_tokens
        parts = (tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions)
        assert torch.equal(mask, reference.tree_mask(*parts, None))


def test_a_layout_that_changes_in_place_gets_its_own_plan() -> None:
    tree, other = layout([(5, -1, 0), (4, 0, 5)]), layout([(5, -1, 0), (4, 0, 2)])
    q, k, v = qkv(9)
    before = tree_attention(q, k, v, tree, impl="cpu")
    tree.ranges.copy_(other.ranges)
    tree.positions.copy_(other.positions)
    after = tree_attention(q, k, v, tree, impl="cpu")
    assert not torch.isclose(after[5:], before[5:]).all()
    check(after, gold(q, k, v, other, 8**-0.5, None, None), q, k, v)


@pytest.mark.parametrize("window", [None, 1, 200, 5000])
def test_flex_block_mask(window: int | None) -> None:
    """The mask is the reference's; a block is full where all of it is seen, and none that is seen is left out."""
    tree = layout(LONG)
    parts = (tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions)
    mask = reference.tree_mask(*parts, window)
    blocks = _tree_attention_flex.block_mask(*parts, window)
    at = torch.arange(tree.num_tokens)
    assert torch.equal(blocks.mask_mod(0, 0, at[:, None], at), mask)
    size = _tree_attention_flex.BLOCK
    n = -(-tree.num_tokens // size)
    padded = torch.nn.functional.pad(mask, [0, n * size - tree.num_tokens] * 2)
    pairs = padded.view(n, size, n, size).transpose(1, 2).flatten(2)
    part, full = torch.zeros(2, n, n, dtype=torch.bool)
    for row in range(n):
        part[row, blocks.kv_indices[0, 0, row, : blocks.kv_num_blocks[0, 0, row]].long()] = True
        full[row, blocks.full_kv_indices[0, 0, row, : blocks.full_kv_num_blocks[0, 0, row]].long()] = True
    assert torch.equal(full, pairs.all(-1))
    assert not (part & full).any()
    assert ((part | full) >= pairs.any(-1)).all()
    if window is None:
        assert torch.equal(part | full, pairs.any(-1))


def test_flex_serves_cuda_tensors_and_no_cpu_tensor_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPCREDIT_IMPL", raising=False)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert dispatch.resolve(OP, None, torch.zeros(1, 1, 64, dtype=dtype)) in ("cpu", "reference")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)  # else its kernel comes first
    with FakeTensorMode():
        small, large, double = (
            torch.zeros(1, 1, width, dtype=dtype, device="cuda")
            for width, dtype in ((8, torch.float32), (64, torch.bfloat16), (64, torch.float64))
        )
        assert dispatch.resolve(OP, None, large) == "flex"
        with pytest.raises(ValueError, match="head size of at least 16, got 8"):
            dispatch.resolve(OP, "flex", small)
        with pytest.raises(ValueError, match="on CUDA it serves float32, bfloat16, float16, got float64"):
            dispatch.resolve(OP, "flex", double)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ValueError, match="Triton, which is not installed"):
            dispatch.resolve(OP, "flex", large)
    with pytest.raises(ValueError, match="got one on meta"):
        dispatch.resolve(OP, "flex", torch.zeros(1, 1, 64, device="meta"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [300.0, -300.0])
def test_planted_extreme(impl: str, size: float) -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    k[3] *= size
    check(tree_attention(q, k, v, tree, impl=impl), gold(q, k, v, tree, 8**-0.5, None, None), q, k, v)


@pytest.mark.parametrize("impl", IMPLS)
def test_siblings_do_not_see_each_other(impl: str) -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    before = tree_attention(q, k, v, tree, impl=impl)
    k[9:13], v[9:13] = torch.randn(2, 4, 2, 8)  # the first leaf
    after = tree_attention(q, k, v, tree, impl=impl)
    assert not torch.isclose(after[9:13], before[9:13]).any(-1).all()
    torch.testing.assert_close(after[13:], before[13:])
    torch.testing.assert_close(after[:9], before[:9])


# opcheck reads storages, which the vmap inside FlexAttention does not have.
@pytest.mark.parametrize("impl", ["cpu", TRITON, "reference"])
def test_opcheck_and_compile(impl: str) -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    parts = (tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions)
    torch.library.opcheck(torch.ops.stepcredit.tree_attention.default, (q, k, v, *parts, 0.3, None, 3, impl))
    compiled = torch.compile(
        lambda q, k, v: tree_attention(q, k, v, tree, impl=impl) * 2, fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(q, k, v), tree_attention(q, k, v, tree, impl=impl) * 2)


def test_forward_only() -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    with pytest.raises(ValueError, match="forward only"):
        tree_attention(q, k.requires_grad_(), v, tree)
    with torch.no_grad():
        tree_attention(q, k, v, tree)


def test_layout_moves() -> None:
    tree = layout(SEGMENTS).to("meta")
    assert tree.positions.device.type == "meta"
    assert tree.num_tokens == sum(n for n, _, _ in SEGMENTS)


@pytest.mark.parametrize(
    ("lengths", "ranges", "message"),
    [
        ([3, 2], [[], [(0, 4)]], r"range \[0, 4\] of segment 1 must be non-empty and end before"),
        ([3, 2], [[], [(2, 2)]], "non-empty"),
        ([3, 2], [[(3, 5)], []], "end before the segment"),
        ([3, 2, 2], [[], [(0, 2)], [(0, 2), (2, 4)]], r"positions of tokens \[2, 4\) on the path of segment 2"),
        ([3, 2, 2], [[], [(0, 2)], [(3, 5)]], "count up from 0"),
        ([3, 2], [[]], "2 lengths for 1 ranges"),
    ],
)
def test_bad_layouts(lengths: list[int], ranges: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeLayout.build(lengths, ranges)


def test_bad_layout_tensors() -> None:
    def make(cu_segments=(0, 2, 3), cu_ranges=(0, 0, 1), ranges=((0, 2),), positions=(0, 1, 2)):
        return TreeLayout(*(torch.tensor(x) for x in (cu_segments, cu_ranges, ranges, positions)))

    make()
    with pytest.raises(ValueError, match="cu_segments must not fall"):
        make(cu_segments=(0, 4, 3))
    with pytest.raises(ValueError, match="cu_ranges must run from 0 to 1"):
        make(cu_ranges=(0, 0, 2))
    with pytest.raises(ValueError, match="cu_ranges has 2 entries, expected 3"):
        make(cu_ranges=(0, 1))
    with pytest.raises(ValueError, match=r"ranges must be \[A, 2\]"):
        make(ranges=((0, 2, 3),))
    with pytest.raises(ValueError, match=r"positions .* count up from 2, got \[0\]"):
        make(positions=(0, 1, 0))
    with pytest.raises(ValueError, match="positions must have int64"):
        make(positions=(0.0, 1.0, 2.0))


def test_bad_arguments() -> None:
    tree = layout([(3, -1, 0)])
    q, k, v = qkv(3)
    bad = [
        (dict(q=q[0]), "q must have"),
        (dict(k=k.double()), "k is torch.float64"),
        (dict(q=q[:2]), "q has 2 entries, expected 3"),
        (dict(k=k[:2], v=v[:2]), "k has 2 entries"),
        (dict(v=v[:, :1]), "must be equal"),
        (dict(q=q[:, :3]), "2 heads must divide q's 3 heads"),
        (dict(q=q[..., :4]), "width 4"),
        (dict(scale=float("nan")), "scale must be finite"),
        (dict(softcap=0.0), "softcap must be positive"),
        (dict(window=0), "window must be positive"),
        (dict(impl="tritn"), "does not exist"),
        (dict(q=q.to("meta")), "different devices"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            tree_attention(**{"q": q, "k": k, "v": v, "tree": tree, **change})
    with pytest.raises(TypeError, match="tree must be a TreeLayout, got tuple"):
        tree_attention(q, k, v, (3,))


def test_no_dtype_of_the_cpu_takes_the_dense_reference() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert stepcredit.dispatch.resolve(OP, None, torch.zeros(1, 1, 2, dtype=dtype)) == "cpu"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_laid_side_by_side_are_those_of_the_ranges(data):
    """Whatever the calls have in common; and what neighbours share is copied once."""
    edges = st.lists(st.integers(0, 12), min_size=2, max_size=6, unique=True).map(sorted)
    calls = data.draw(st.lists(edges.map(lambda e: tuple(zip(e[::2], e[1::2], strict=False))), min_size=1, max_size=5))
    sources = [torch.randn(2, 12, 3), torch.randn(1, 12, 5)]
    seen = _tree_attention_cpu.SideBySide(sources, room=12)
    for ranges in calls:
        for source, laid in zip(sources, seen.of(ranges), strict=True):
            assert torch.equal(laid, torch.cat([source[:, a:b] for a, b in ranges], 1))


def test_leaves_of_one_fork_share_a_tile():
    tree = layout([(100, -1, 0), *[(30, 0, 80)] * 6, (30, 0, 90)])
    values = (t.numpy().tobytes() for t in (tree.cu_segments, tree.cu_ranges, tree.ranges))
    rows = [(tile.start, tile.stop) for tile in _tree_attention_cpu.plan(*values, None)]
    assert rows == [(0, 100), (100, 220), (220, 280), (280, 310)]  # as many whole leaves as ROWS has room for


def test_leaves_of_one_fork_share_a_copy_of_their_trunk():
    source = torch.randn(1, 100, 2)
    seen = _tree_attention_cpu.SideBySide([source], room=80)
    first = seen.of(((0, 60), (70, 80)))[0]
    source[:, :60] = torch.nan  # what is copied again would show
    assert torch.equal(seen.of(((0, 60), (80, 90)))[0][:, :60], first[:, :60])
    assert not first[:, :60].isnan().any()
    assert seen.of(((0, 50), (80, 90)))[0][:, :50].isfinite().all()
    assert seen.of(((1, 50), (80, 90)))[0][:, :49].isnan().all()
