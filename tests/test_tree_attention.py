from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepcredit
from numerics import check
from stepcredit import reference
from stepcredit.ops.tree_attention import OP, TreeLayout, tree_attention

IMPLS = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
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
    segments: list[tuple[int, int, int]] = []
    for i in range(data.draw(st.integers(1, 7))):
        parent = data.draw(st.integers(-1, i - 1))
        at = data.draw(st.integers(0, segments[parent][0])) if parent >= 0 else 0
        segments.append((data.draw(st.integers(0, 6)), parent, at))
    tree = layout(segments)
    q, k, v = qkv(tree.num_tokens)
    window = data.draw(st.sampled_from([None, 1, 3]))
    check(tree_attention(q, k, v, tree, window=window, impl="cpu"), gold(q, k, v, tree, 8**-0.5, None, window), q, k, v)


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


@pytest.mark.parametrize("impl", IMPLS)
def test_long_segment_with_softcap_and_window_spans_several_tiles(impl: str) -> None:
    tree = layout([(600, -1, 0), (300, 0, 500), (3, 0, 500)])
    q, k, v = qkv(tree.num_tokens, 2, 1, 4)
    out = tree_attention(q, k, v, tree, softcap=5.0, window=280, impl=impl)
    check(out, gold(q, k, v, tree, 0.5, 5.0, 280), q, k, v)


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


def test_opcheck_and_compile() -> None:
    tree = layout(SEGMENTS)
    q, k, v = qkv(tree.num_tokens)
    parts = (tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions)
    for impl in IMPLS:
        torch.library.opcheck(torch.ops.stepcredit.tree_attention.default, (q, k, v, *parts, 0.3, None, 3, impl))
    compiled = torch.compile(lambda q, k, v: tree_attention(q, k, v, tree) * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), tree_attention(q, k, v, tree) * 2)


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
    half = (x.half() for x in (q, k, v))
    with pytest.raises(ValueError, match="got float16"):
        tree_attention(*half, tree, impl="cpu")
    assert stepcredit.dispatch.resolve(OP, None, q.half()) == "reference"
