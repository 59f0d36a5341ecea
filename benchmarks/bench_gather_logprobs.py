"""`gather_logprobs` against eager and compiled log_softmax: `pytest benchmarks/bench_gather_logprobs.py`.

Baselines run between the rounds of ours, in the same process; `extra_info` holds their best times and the ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import DEVICE, interleave, peak_bytes, size_bytes
from benchmarks.shapes import SHAPES
from stepcredit import gather_logprobs, reference

#: Share of the rows that have a gradient in backward: half of a batch are zero-advantage groups and clipped tokens.
PASSES = {"forward": 0.0, "training": 1.0, "training, half the rows": 0.5}

#: Elements of a head that is measured in half precision only.
LARGE = 1 << 28


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES["gather_logprobs"])
def test_gather_logprobs(benchmark, shape: str, dtype: torch.dtype, passes: str) -> None:
    size = SHAPES["gather_logprobs"][shape]
    rows, width, vocabulary = size["rows"], size["width"], size["vocabulary"]
    if dtype == torch.float32 and vocabulary * width > LARGE:
        pytest.skip("in float32 a minute a call")
    torch._dynamo.reset()  # else, after a few cases, "compiled" falls back to eager
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    advantages = torch.where(torch.arange(rows) < PASSES[passes] * rows, torch.randn(rows), 0.0).to(DEVICE)

    def step(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            if passes == "forward":
                with torch.no_grad():
                    function(hidden, weight, targets)
            else:
                (function(hidden, weight, targets) * advantages).sum().backward()

        return run

    with torch.no_grad():  # a wrong result has no speed
        gold = reference.gather_logprobs(
            hidden[:64].double(),
            weight.double(),
            targets[:64, None],
            None,
            None,
            temperature=1.0,
            softcap=None,
            logit_scale=1.0,
        )[0][:, 0]
        assert (gather_logprobs(hidden, weight, targets)[:64] - gold).abs().max() < 1e-4

    ours = step(gather_logprobs)
    baselines = {"eager": step(eager), "compiled": step(torch.compile(eager))}
    if DEVICE == "cuda" and passes == "forward":  # the floor: what the product alone takes, its logits kept
        baselines["product"] = lambda: hidden.detach() @ weight.detach().T
    info = benchmark.extra_info
    for name, run in baselines.items():
        run()
        hidden.grad = weight.grad = None  # freed inside, they would be subtracted
        info[f"{name}_peak_bytes"] = peak_bytes(run)
    interleave(benchmark, ours, baselines)
    products = 2 * rows * width * vocabulary
    info["flops"] = products if passes == "forward" else int(products * (1 + 3 * PASSES[passes]))
    info["bytes"] = size_bytes(hidden, weight) * (1 if passes == "forward" else 2)
    hidden.grad = weight.grad = None
    info["peak_bytes"] = peak_bytes(ours)
