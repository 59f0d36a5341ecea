from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import numerics
from stepcredit import gather_logprobs, reference
from stepcredit.ops import _gather_logprobs_cpu as cpu
from triton_under_test import TRITON

IMPLS = ["cpu", TRITON, "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PLAIN = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
SHAPED = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5}


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles from small inputs."""
    monkeypatch.setattr(cpu, "TILE_ROWS", 5)
    monkeypatch.setattr(cpu, "TILE_COLS", 96)


@pytest.fixture(params=["bfloat16 product", "upcast"])
def products(request, monkeypatch):
    """Both ways to multiply bfloat16, whatever this processor prefers."""
    if request.param == "upcast":
        monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda dtype, width: False)
    elif not cpu.multiplies_bfloat16(torch.bfloat16, 2):
        pytest.skip("this processor has no AVX512-BF16")


def make(rows, vocab, width=12, targets=1, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype)
    mask = torch.rand(rows, generator=g) < 0.7
    return hidden, weight, torch.randint(vocab, (rows, targets), generator=g), bias, mask


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def upstream(rows, targets, seed=3):
    """Gradients of log-probs and entropy, exactly 0 for both on every third row."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.arange(rows) % 3 != 0
    return torch.randn(rows, targets, generator=g) * keep[:, None], torch.randn(rows, generator=g) * keep


def results(function, hidden, weight, targets, bias):
    """Log-probs, entropy, and the gradients of hidden, weight and bias (when given)."""
    inputs = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logprobs, entropy = function(*inputs)
    grad_logprobs, grad_entropy = upstream(*targets.shape)
    loss = (logprobs * grad_logprobs).sum() + (entropy * grad_entropy).sum()
    return [logprobs, entropy, *torch.autograd.grad(loss, inputs)]


def verify(hidden, weight, targets, bias=None, mask=None, impl="cpu", device="cpu", **options):
    options = PLAIN | options

    def ours(hidden, weight, bias=None):
        given = (t if t is None else t.to(device) for t in (hidden, weight, targets, bias, mask))
        hidden, weight, ids, bias, rows = given
        out = gather_logprobs(hidden, weight, ids, bias=bias, row_mask=rows, entropy=True, impl=impl, **options)
        return [t.cpu() for t in out]

    def specified(hidden, weight, bias=None):
        return reference.gather_logprobs(hidden, weight, targets, bias, mask, **options)

    out = results(ours, hidden, weight, targets, bias)
    same = results(specified, hidden, weight, targets, bias)
    gold = results(specified, *(t if t is None else t.double() for t in (hidden, weight)), targets, upcast(bias))
    assert [t.dtype for t in out] == [wide(hidden.dtype)] * 2 + [
        t.dtype for t in (hidden, weight, bias) if t is not None
    ]
    for got, expected, budget in zip(out, gold, same, strict=True):
        numerics.check_against(got.detach(), expected.detach(), budget.detach())
    return out


def upcast(tensor):
    return None if tensor is None else tensor.double()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, SHAPED])
@pytest.mark.usefixtures("small_tiles")
def test_values_and_gradients(impl, dtype, options):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel has no float64")
    hidden, weight, targets, bias, mask = make(23, 257, targets=3, dtype=dtype)
    verify(hidden, weight, targets, bias, mask, impl, **options)
    verify(hidden, weight, targets, impl=impl, **options)


@pytest.mark.parametrize(
    ("rows", "vocab", "width"), [(1, 1, 1), (1, 1003, 2), (700, 5000, 34), (13, 64, 7), (6, 65, 576)]
)
@pytest.mark.usefixtures("products")
def test_bfloat16_products(rows, vocab, width):
    """Shapes around the blocks of the kernel: rows by 6, vocabulary by 64, an odd width, more than one real tile."""
    hidden, weight, targets, bias, mask = make(rows, vocab, width, targets=2, dtype=torch.bfloat16)
    verify(hidden, weight / math.sqrt(width), targets, bias, mask)


@pytest.mark.usefixtures("products")
def test_bfloat16_logits_keep_float32_precision():
    hidden, weight, targets, _, _ = make(8, 500, 64, dtype=torch.bfloat16)
    out = gather_logprobs(hidden, weight, targets[:, 0])
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets)[:, 0]
    gold = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets)[:, 0]
    assert (out - gold).abs().max() < 1e-4
    assert (rounded - gold).abs().max() > 1e-3  # what rounding logits to bfloat16 costs


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "targets"), [(0, 1), (0, 3), (1, 1), (4, 0)])
def test_degenerate_sizes(impl, rows, targets):
    hidden, weight, ids, bias, mask = make(rows, 17, targets=targets)
    verify(hidden, weight, ids, bias, mask, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_dimensional_targets(impl):
    hidden, weight, targets, _, _ = make(5, 31)
    out = gather_logprobs(hidden, weight, targets[:, 0], impl=impl)
    assert isinstance(out, torch.Tensor)
    assert out.shape == (5,)
    assert torch.equal(out, gather_logprobs(hidden, weight, targets, impl=impl)[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_tiles")
def test_strided_inputs(dtype):
    hidden, weight, targets, bias, mask = make(14, 202, 24, targets=2, dtype=dtype)
    strided = [hidden[::2, ::2], weight[::2, ::2], targets[::2].flip(1) % 101, bias[::2], mask[::2]]
    assert not strided[0].is_contiguous()
    verify(*strided)
    verify(strided[0].T.contiguous().T, strided[1].T.contiguous().T, *strided[2:])


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_rows_are_zero_and_never_read(impl):
    hidden, weight, targets, _, _ = make(6, 40)
    mask = torch.tensor([True, False, True, False, False, True])
    hidden[~mask], targets[~mask] = math.nan, -100
    hidden.requires_grad_()
    logprobs, entropy = gather_logprobs(hidden, weight, targets, row_mask=mask, entropy=True, impl=impl)
    assert torch.count_nonzero(logprobs[~mask]) == torch.count_nonzero(entropy[~mask]) == 0
    alone = gather_logprobs(hidden.detach()[mask], weight, targets[mask], impl=impl)
    assert torch.allclose(logprobs[mask], alone, rtol=0, atol=1e-5)
    if impl != "reference":
        (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
        assert torch.count_nonzero(grad[~mask]) == 0
        assert grad.isfinite().all()
    nothing = gather_logprobs(hidden.detach(), weight, targets, row_mask=torch.zeros(6, dtype=torch.bool), impl=impl)
    assert torch.equal(nothing, torch.zeros(6, 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("small_tiles")
def test_planted_extremes(impl, dtype):
    """All logits about -1e4, the target in the last column, one enormous logit, and tokens that cannot occur."""
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel has no float64")
    hidden, weight, targets, bias, _ = make(6, 257, dtype=dtype)
    targets[:] = 256
    verify(hidden, weight, targets, bias - 1e4, impl=impl)
    huge = bias.clone()
    huge[100] = 1e6
    out = verify(hidden, weight, targets, huge, impl=impl)
    assert out[1].abs().max() == 0
    never = bias.clone()
    never[:200] = -math.inf  # the first two tiles are wholly impossible
    verify(hidden, weight, targets, never, impl=impl)
    verify(hidden, weight, targets - 256, never, impl=impl)  # their log-prob is -inf
    verify(hidden, weight, targets, never, impl=impl, softcap=4.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_overflow_and_nan_weight_give_nan(impl):
    hidden, weight, targets, _, _ = make(3, 20)
    hidden[1] = 3e38
    logprobs, entropy = gather_logprobs(hidden, weight, targets, entropy=True, impl=impl)
    assert logprobs[1].isnan().all()
    assert entropy[1].isnan()
    assert logprobs[[0, 2]].isfinite().all()
    weight[7] = math.nan
    assert gather_logprobs(hidden, weight, targets, impl=impl).isnan().all()
    nothing = torch.full((20,), -math.inf)
    assert gather_logprobs(hidden, weight, targets, bias=nothing, impl=impl).isnan().all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_constant_added_to_every_logit_changes_nothing(impl):
    hidden, weight, targets, bias, _ = make(9, 300, dtype=torch.float64)
    out = gather_logprobs(hidden, weight, targets, bias=bias, entropy=True, impl=impl)
    moved = gather_logprobs(hidden, weight, targets, bias=bias + 7.5, entropy=True, impl=impl)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(out, moved, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_log_probs_of_all_tokens_sum_to_one(impl):
    hidden, weight, _, bias, _ = make(4, 50)
    out = gather_logprobs(hidden, weight, torch.arange(50).expand(4, 50), bias=bias, softcap=3.0, impl=impl)
    assert torch.allclose(out.exp().sum(-1), torch.ones(4))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_vocabulary_of_one_has_no_gradient(impl):
    hidden, weight = torch.randn(3, 21, requires_grad=True), torch.randn(1, 21, requires_grad=True)
    logprobs = gather_logprobs(hidden, weight, torch.zeros(3, dtype=torch.int64), temperature=0.5, impl=impl)
    (logprobs * torch.tensor([1.0, 0.0, -2.0])).sum().backward()
    assert not logprobs.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_option(data):
    draw = data.draw
    rows, vocab = draw(st.integers(0, 14)), draw(st.integers(1, 300))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    width, targets = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    hidden, weight, ids, bias, mask = make(rows, vocab, width, targets, dtype, draw(st.integers(0, 99)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_ROWS", draw(st.integers(1, 9)))
        patch.setattr(cpu, "TILE_COLS", draw(st.integers(1, 130)))
        verify(
            hidden,
            weight,
            ids,
            draw(st.sampled_from([None, bias])),
            draw(st.sampled_from([None, mask])),
            temperature=draw(st.sampled_from([1.0, 0.5, 2.0])),
            softcap=draw(st.sampled_from([None, 1.0, 30.0])),
            logit_scale=draw(st.sampled_from([1.0, -0.25])),
        )


# --- what is never computed or held -----------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Shapes of the tiles of logits, in order."""
    shapes: list[tuple[int, int]] = []
    original = cpu._Tiles.multiply

    def spy(self, hidden, stripe, out):
        shapes.append(tuple(out.shape))
        original(self, hidden, stripe, out)

    monkeypatch.setattr(cpu._Tiles, "multiply", spy)
    return shapes


def test_rows_without_influence_are_never_multiplied(computed):
    hidden, weight, targets, _, _ = make(50, 100)
    mask = torch.arange(50) < 20
    hidden.requires_grad_()
    logprobs, entropy = gather_logprobs(hidden, weight, targets, row_mask=mask, entropy=True)
    assert computed == [(20, 100)]
    coefficients = torch.zeros(50, 1)
    coefficients[[3, 8, 30]] = 1.0  # row 30 is masked
    loss = (logprobs * coefficients).sum() + entropy[5]
    loss.backward()
    assert computed[1:] == [(3, 100)]  # rows 3 and 8, and row 5 for its entropy
    assert hidden.grad.abs().sum(1).nonzero()[:, 0].tolist() == [3, 5, 8]
    gather_logprobs(hidden, weight, targets).mul(0.0).sum().backward()
    assert computed[2:] == [(50, 100)]  # a forward, and nothing in backward


def test_one_tile_of_logits_is_alive(monkeypatch, computed):
    """No allocation of the op reaches the size of two tiles, in forward or backward."""
    monkeypatch.setattr(cpu, "TILE_ROWS", 16)
    monkeypatch.setattr(cpu, "TILE_COLS", 128)
    hidden, weight, targets, _, _ = make(64, 1024, 4)
    hidden.requires_grad_()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gather_logprobs(hidden, weight, targets).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert len(computed) == 2 * 4 * 8
    assert 16 * 128 * 4 <= largest < 2 * 16 * 128 * 4


def test_only_needed_gradients_are_computed(monkeypatch):
    products = []
    original = cpu._Tiles.add_product
    monkeypatch.setattr(cpu._Tiles, "add_product", lambda *args: (products.append(args), original(*args)))
    hidden, weight, targets, bias, _ = make(4, 30)
    for needed, expected in ((hidden, 1), (weight, 1), (bias, 0)):
        products.clear()
        tensors = [t.detach().requires_grad_(t is needed) for t in (hidden, weight, bias)]
        gather_logprobs(tensors[0], tensors[1], targets, bias=tensors[2]).sum().backward()
        assert len(products) == expected
        assert [t.grad is not None for t in tensors] == [t is needed for t in (hidden, weight, bias)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_are_bit_equal(dtype):
    hidden, weight, targets, bias, mask = make(200, 5000, 16, dtype=dtype)
    first = verify(hidden, weight, targets, bias, mask)
    second = verify(hidden, weight, targets, bias, mask)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- torch around it --------------------------------------------------------------------------------------


def test_opcheck():
    hidden, weight, targets, bias, mask = make(5, 40, targets=2)
    options = (0.9, 5.0, 1.1)  # temperature, soft cap, scale of logits
    args = (hidden.requires_grad_(), weight.requires_grad_(), targets, bias.requires_grad_(), mask, *options, True)
    opcheck(torch.ops.stepcredit.gather_logprobs.default, (*args, "cpu"))
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    opcheck(torch.ops.stepcredit.gather_logprobs.default, (*detached, "reference"))
    # Not the backward of the reference: torch.func inside an op and opcheck's tracing exclude each other.
    logprobs, *saved = torch.ops.stepcredit.gather_logprobs(*detached, "cpu")
    grads = (torch.randn(5, 2), torch.randn(5))
    backward = torch.ops.stepcredit.gather_logprobs_backward.default
    opcheck(backward, (*grads, *detached[:5], *saved, logprobs, *options, "cpu", True, False, True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_compiles_whole(impl):
    hidden, weight, targets, _, mask = make(8, 60)

    def loss(hidden, weight):
        logprobs, entropy = gather_logprobs(hidden, weight, targets, row_mask=mask, entropy=True, impl=impl)
        return (logprobs.sum() + entropy.sum()) * 2

    inputs = [t.detach().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_no_grad_inference_mode_and_autocast():
    hidden, weight, targets, _, _ = make(6, 70)
    expected = gather_logprobs(hidden, weight, targets)
    with torch.no_grad():
        assert torch.equal(gather_logprobs(hidden.clone().requires_grad_(), weight, targets), expected)
    with torch.inference_mode():
        assert torch.equal(gather_logprobs(hidden, weight, targets), expected)
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # changes nothing: a float32 head stays one
        assert torch.equal(gather_logprobs(hidden, weight, targets), expected)
        gather_logprobs(leaf, weight, targets).sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_mixed_dtypes_are_widened():
    hidden, weight, targets, _, _ = make(6, 70)
    low = hidden.bfloat16().requires_grad_()
    out = gather_logprobs(low, weight, targets)
    assert torch.equal(out, gather_logprobs(low.detach().float(), weight, targets))
    out.sum().backward()
    assert low.grad.dtype == torch.bfloat16


def test_gradients_agree_with_finite_differences():
    hidden, weight, targets, bias, mask = make(3, 7, 3, 2, torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def function(hidden, weight, bias):
        return gather_logprobs(hidden, weight, targets, bias=bias, row_mask=mask, entropy=True, **SHAPED)

    assert torch.autograd.gradcheck(function, leaves)


BAD = [
    ({"hidden": [[0.0]]}, TypeError, "hidden must be a tensor, got list"),
    ({"hidden": torch.zeros(3, 5)}, ValueError, "hidden has width 5, weight has width 4"),
    ({"hidden": torch.zeros(3)}, ValueError, r"hidden must have \(2,\) dimensions"),
    ({"weight": torch.zeros(0, 4)}, ValueError, "weight must have at least one row"),
    ({"targets": torch.tensor([0, 1])}, ValueError, "targets has 2 entries, expected 3"),
    ({"targets": torch.tensor([0, 1, 9])}, ValueError, r"targets must lie in \[0, 9\), got 9 in row 2"),
    ({"targets": torch.tensor([0, -100, 1])}, ValueError, "got -100 in row 1"),
    ({"targets": torch.zeros(3)}, ValueError, "targets must have int64"),
    ({"hidden": torch.full((3, 4), math.nan)}, ValueError, "hidden must be finite, got nan in row 0"),
    ({"bias": torch.zeros(8)}, ValueError, "bias has 8 entries, expected 9"),
    ({"bias": torch.full((9,), math.inf)}, ValueError, "bias must be finite or -inf, got inf"),
    ({"row_mask": torch.ones(2, dtype=torch.bool)}, ValueError, "row_mask has 2 entries, expected 3"),
    ({"row_mask": torch.ones(3)}, ValueError, "row_mask must have bool"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    ({"softcap": -1.0}, ValueError, "softcap must be positive or None, got -1.0"),
    ({"logit_scale": math.nan}, ValueError, "logit_scale must be in"),
    ({"impl": "cuda"}, ValueError, "impl='cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "targets": torch.tensor([0, 1, 2])} | change
    with pytest.raises(error, match=message):
        gather_logprobs(**arguments)
