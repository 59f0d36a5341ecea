"""`filter_gradient` of `gather_logprobs`: tiles are left out, and what that changes is within the documented bound.

The Triton kernels are interpreted, not run on a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch

from numerics import check_against
from stepcredit import gather_logprobs, reference
from stepcredit.kernels import configs
from stepcredit.ops._gather_logprobs_filter import largest_negligible
from test_gather_logprobs import PLAIN, make, upstream
from triton_under_test import TRITON, WHY_NOT

interpreted = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
Tensor = torch.Tensor
CAPPED = {"softcap": 60.0, "temperature": 1.1}
#: Sizes of the tiles in the kernels.
COLS = 64
#: A logit this much lower makes a token negligible, and leaves it a gradient that the dtype holds.
UNLIKELY = {torch.float32: -30.0, torch.bfloat16: -26.0, torch.float16: -16.0}
#: Rows and tokens of the case below: several blocks of rows, and a last tile that is cut short.
ROWS, VOCABULARY, WIDTH = 200, 300, 20


def peaked(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weights, targets and bias. The second and the last tile of the vocabulary are unlikely for all
    rows, the third for those behind the first block of `rows`. Column 1 is 0 but in the weights of the second tile,
    where it is large: logits do not feel it, the gradient of the hidden states does."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=g)
    weight = 0.3 * torch.randn(VOCABULARY, WIDTH, generator=g)
    bias = 0.3 * torch.randn(VOCABULARY, generator=g)
    late, low = torch.arange(ROWS) >= rows, UNLIKELY[dtype]
    hidden[:, 0], weight[:, 0] = torch.where(late, -1.0, 1.0), 0.0
    hidden[:, 1], weight[:, 1] = 0.0, 0.0
    weight[COLS : 2 * COLS, 1] = 6e4
    weight[2 * COLS : 3 * COLS, 0], bias[2 * COLS : 3 * COLS] = -low / 2, low / 2
    bias[COLS : 2 * COLS], bias[4 * COLS :] = low, low
    targets = torch.randint(COLS, (ROWS, 2), generator=g)
    targets[:, 1] += torch.where(late, 3 * COLS, 2 * COLS)
    return hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)


def gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, grads: tuple[Tensor, Tensor], **options
) -> list[Tensor]:
    inputs = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    chosen = dict(zip(("hidden", "weight", "bias"), inputs, strict=False))
    outputs = gather_logprobs(**chosen, targets=targets, entropy=True, **options)
    return list(torch.autograd.grad(outputs, inputs, grads))


def every_logit(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, grads: tuple[Tensor, Tensor], **options
) -> Tensor:
    """D, the gradient of hidden @ weight.T, float64: that of hidden states whose weights are the identity."""
    products = (hidden.double() @ weight.double().T).requires_grad_()
    identity = torch.eye(len(weight), dtype=torch.float64)
    outputs = reference.gather_logprobs(products, identity, targets, bias, None, **PLAIN | options)
    return torch.autograd.grad(outputs, products, [g.double() for g in grads])[0]


def everywhere(rows: int, targets: int) -> tuple[Tensor, Tensor]:
    """Gradients of log-probs and entropy, 0 in no row."""
    g = torch.Generator().manual_seed(5)
    return torch.rand(rows, targets, generator=g) + 0.5, 0.1 * torch.randn(rows, generator=g)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "chunk", "options"),
    [
        (torch.float32, 128, {}),
        (torch.float32, 4096, CAPPED),
        (torch.bfloat16, 128, CAPPED),
        (torch.bfloat16, 4096, {}),
        (torch.float16, 128, {}),
    ],
)
def test_tiles_are_left_out_within_the_bound(monkeypatch: pytest.MonkeyPatch, dtype, chunk, options) -> None:
    monkeypatch.setattr(configs, "CHUNK", chunk)
    block = configs.GATHER_LOGPROBS_BACKWARD[dtype].blocks["ROWS"]
    given = peaked(dtype, block)
    scale = 1024.0 if dtype == torch.float16 else 1.0  # as a loss is scaled for it
    grads = tuple(scale * g for g in everywhere(ROWS, 2))
    exact = gradients(*given, grads, impl="triton", **options)
    filtered = gradients(*given, grads, impl="triton", filter_gradient=True, **options)

    hidden, weight, targets, bias = (t.double() if t.is_floating_point() else t for t in given)
    gold = every_logit(hidden, weight, targets, bias, grads, **options)
    largest, unit = gold.gather(1, targets).abs().max(), torch.finfo(dtype).eps / 2
    # Which tiles that is, and what is left without them.
    left_out = torch.zeros(ROWS, VOCABULARY, dtype=torch.bool)
    for row in range(0, ROWS, block):
        for token in range(0, VOCABULARY, COLS):
            tile = (slice(row, row + block), slice(token, token + COLS))
            left_out[tile] = bool((gold[tile].abs() <= unit * largest / VOCABULARY).all())
    assert left_out[:, COLS : 2 * COLS].all()
    assert left_out[:, 4 * COLS :].all()
    assert left_out[block:, 2 * COLS : 3 * COLS].all()
    assert not left_out[:block, 2 * COLS : 3 * COLS].any()
    kept = gold.masked_fill(left_out, 0.0)
    for got, wanted in zip(filtered, (kept @ weight, kept.T @ hidden), strict=False):
        check_against(got, wanted, wanted)

    # They are: without them nothing is left of these, and with them there is something.
    unlikely = [*range(COLS, 2 * COLS), *range(4 * COLS, VOCABULARY)]
    assert (filtered[1][unlikely] == 0).all()
    assert (exact[1][unlikely] != 0).any(1).all()
    assert (filtered[0][:, 1] == 0).all()
    assert (exact[0][:, 1] != 0).all()
    early = torch.arange(ROWS) < block
    some = gradients(*given, (grads[0] * early[:, None], grads[1] * early), impl="triton", **options)
    assert torch.equal(filtered[1][2 * COLS : 3 * COLS], some[1][2 * COLS : 3 * COLS])

    # The bound, beside which sums that changed may be rounded to other numbers.
    bounds = (
        unit * largest * weight.abs().mean(0).expand(ROWS, -1),
        unit * largest * (hidden.abs().sum(0) / VOCABULARY).expand(VOCABULARY, -1),
    )
    for got, wanted, bound in zip(filtered, exact, bounds, strict=False):
        wanted = wanted.double()
        rounding = torch.finfo(dtype).eps * wanted.abs() + 2.0**-21 * wanted.abs().max()
        assert ((got.double() - wanted).abs() <= bound + rounding).all()
    assert torch.equal(filtered[2], exact[2])


@interpreted
def test_tiles_that_are_left_out_are_not_multiplied() -> None:
    """They would show: 0 times an infinite weight is NaN."""
    hidden, weight, targets, bias = peaked(torch.float32, 64)
    hidden[:, 1], weight[COLS : 2 * COLS, 1] = 1.0, -math.inf  # these tokens cannot occur
    grads = everywhere(ROWS, 2)
    exact = gradients(hidden, weight, targets, bias, grads, impl="triton")
    filtered = gradients(hidden, weight, targets, bias, grads, impl="triton", filter_gradient=True)
    assert exact[0][:, 1].isnan().all()
    assert filtered[0].isfinite().all()


@interpreted
def test_products_are_of_the_listed_tiles() -> None:
    """Others hold NaN here, in the gradient of logits itself."""
    from stepcredit.kernels._compaction import listed_tiles
    from stepcredit.kernels._gradient_products import hidden_gradient_kernel, weight_gradient_kernel

    config = configs.GATHER_LOGPROBS_BACKWARD[torch.float32]
    rows, length, width, chunk = 150, 170, 20, 192
    large = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.int8)
    kept = large.bool().repeat_interleave(64, 0).repeat_interleave(64, 1)
    gradient = torch.randn(192, chunk) * (torch.arange(192) < rows)[:, None] * (torch.arange(chunk) < length)
    holed = gradient.masked_fill(~kept, math.nan)
    hidden, weight = torch.randn(rows, width), torch.randn(length, width)
    (tiles, num_tiles, tiles_row), (blocks, num_blocks, blocks_row) = listed_tiles(large, 1)
    order, active = torch.arange(rows), torch.tensor([rows])
    options = {"FILTER": True, "UPCAST": True, "PRECISION": "ieee", **config.launch}
    d_hidden, d_weight = torch.zeros(192, width), torch.zeros(length, width)
    hidden_gradient_kernel[(3, 1)](
        holed, weight, d_hidden, active, tiles, num_tiles, 0, length, width, width, chunk, tiles_row,
        EVEN=False, **options,
    )  # fmt: skip
    weight_gradient_kernel[(3, 1)](
        holed, hidden, d_weight, order, active, blocks, num_blocks, 0, length, width, width, chunk, blocks_row,
        **options,
    )  # fmt: skip
    part = gradient.masked_fill(~kept, 0.0)[:rows, :length].double()
    check_against(d_hidden[:rows], part @ weight.double(), part @ weight.double())
    check_against(d_weight, part.T @ hidden.double(), part.T @ hidden.double())


def test_lists_of_tiles() -> None:
    from stepcredit.kernels._compaction import listed_tiles

    large = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]], dtype=torch.int8)
    (tiles, num_tiles, tiles_row), (blocks, num_blocks, blocks_row) = listed_tiles(large, 2)
    assert (num_tiles.tolist(), tiles_row, tiles.stride(0)) == ([[2], [1]], 5, 5)
    assert [row[:n] for row, (n,) in zip(tiles.tolist(), num_tiles.tolist(), strict=True)] == [[1, 4], [3]]
    assert (num_blocks.tolist(), blocks_row, blocks.stride(0)) == ([[1], [1], [1]], 2, 2)
    assert blocks[:, 0].tolist() == [0, 1, 0]


@interpreted
def test_a_tile_with_one_element_above_the_limit_is_kept() -> None:
    hidden, weight, targets, bias = peaked(torch.float32, 64)
    grads = (everywhere(ROWS, 2)[0], torch.zeros(ROWS))  # without the entropy's the gradient is as the probability
    gold = every_logit(hidden, weight, targets, bias.double(), grads)
    limit = torch.finfo(torch.float32).eps / 2 * gold.gather(1, targets).abs().max() / VOCABULARY
    token = 70
    # What it takes for the largest gradient of this token, and so for that alone in its tile, to be 0.9 and 1.1 limits.
    lift = math.log(float(limit / gold[:, token].abs().max()))
    for factor, kept in ((0.9, False), (1.1, True)):
        lifted = bias.clone()
        lifted[token] += lift + math.log(factor)
        d_weight = gradients(hidden, weight, targets, lifted, grads, impl="triton", filter_gradient=True)[1]
        assert (d_weight[COLS : 2 * COLS] != 0).any() == kept


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("options", [PLAIN, {"temperature": 0.7, "softcap": 5.0, "logit_scale": -0.5}])
def test_the_limit_is_a_share_of_the_largest_gradient_at_a_target(options, targets: int, masked: bool) -> None:
    hidden, weight, ids, bias, mask = make(23, 40, targets=targets)
    ids[4] = ids[4, 0]  # the same target again: its gradients add up
    mask = mask if masked else torch.ones_like(mask)
    grads = upstream(23, targets)
    grads[0][~mask] = 100.0  # is not counted
    gold = every_logit(hidden, weight, ids, bias.double(), grads, **options)
    main = grads[0].abs().argmax(1, keepdim=True)
    largest = gold.gather(1, ids.gather(1, main))[mask].abs().max()
    args = (hidden, weight, ids, bias, mask, *options.values(), False, "cpu")
    logprobs, *rest = torch.ops.stepcredit.gather_logprobs(*args)
    for planted in (0.0, math.nan, math.inf):  # a row whose gradient is not finite is not counted either
        grads[0][6] = planted
        limit = largest_negligible(*grads, ids, mask, logprobs, *rest, vocabulary=40, eps=2.0**-7, **options)
        torch.testing.assert_close(limit, (largest * 2.0**-8 / 40).float().view(1), rtol=1e-4, atol=0)


@interpreted
@pytest.mark.parametrize("planted", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_shows(planted: float) -> None:
    """A row whose gradient is not finite lets nothing that is vanish, and does not vanish."""
    given = peaked(torch.float32, 64)
    grads = everywhere(ROWS, 2)
    grads[0][7, 0] = planted
    exact = gradients(*given, grads, impl="triton")
    filtered = gradients(*given, grads, impl="triton", filter_gradient=True)
    for got, wanted in zip(filtered, exact, strict=True):
        assert torch.equal(got.isfinite(), wanted.isfinite())
    assert filtered[0][7].isfinite().all() == math.isfinite(planted)


@pytest.mark.parametrize("impl", ["cpu", TRITON, "reference"])
@pytest.mark.parametrize(("rows", "vocabulary", "targets"), [(0, 17, 1), (1, 1, 1), (4, 17, 0), (70, 200, 2)])
def test_where_there_is_nothing_to_leave_out(impl: str, rows: int, vocabulary: int, targets: int) -> None:
    """Other implementations never do; and here the kernel has no reason to."""
    hidden, weight, ids, bias, _ = make(rows, vocabulary, targets=targets)
    grads = upstream(rows, targets)
    exact = gradients(hidden, weight, ids, bias, grads, impl=impl)
    filtered = gradients(hidden, weight, ids, bias, grads, impl=impl, filter_gradient=True)
    assert all(torch.equal(a, b) for a, b in zip(filtered, exact, strict=True))


@interpreted
def test_repeats_are_bit_equal() -> None:
    given, grads = peaked(torch.bfloat16, 128), everywhere(ROWS, 2)
    first, second = (gradients(*given, grads, impl="triton", filter_gradient=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
