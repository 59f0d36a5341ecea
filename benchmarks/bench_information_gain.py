"""`information_gain` against eager lines and a loop over steps: `pytest benchmarks/bench_information_gain.py`.

The loop does what IG-Search's released code does, a Python loop over steps, gold variants and contexts.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import numerics
from benchmarks.measure import DEVICE, interleave, record_peaks, size_bytes
from benchmarks.shapes import SHAPES
from stepcredit import information_gain, reference

#: Head weights of the released code.
HEAD: dict[str, Any] = dict(head_tokens=3, head_weight=3.0)
#: The reference takes a dozen calls of torch a branch, so it checks the first steps; the eager lines check all.
CHECKED_STEPS = 64


def eager(
    logprobs: torch.Tensor, cu_branches: torch.Tensor, cu_variants: torch.Tensor, cu_steps: torch.Tensor
) -> torch.Tensor:
    """Gain of each step; every step has a variant, and every variant a counterfactual."""
    tokens, branches, variants = logprobs.numel(), cu_branches.numel() - 1, cu_variants.numel() - 1
    index = torch.arange(tokens, device=logprobs.device)
    branch = index[:branches].repeat_interleave(cu_branches.diff(), output_size=tokens)
    weight = torch.where(index - cu_branches[branch] < HEAD["head_tokens"], HEAD["head_weight"], 1.0)
    weight = weight.to(logprobs.dtype)
    none = logprobs.new_zeros(branches)
    scores = none.index_add(0, branch, weight * logprobs) / none.index_add(0, branch, weight)

    real = scores[cu_variants[:-1]]
    variant = index[:variants].repeat_interleave(cu_variants.diff(), output_size=branches)
    others = scores.index_fill(0, cu_variants[:-1], 0)
    baseline = logprobs.new_zeros(variants).index_add(0, variant, others) / (cu_variants.diff() - 1)

    steps = cu_steps.numel() - 1
    step = index[:steps].repeat_interleave(cu_steps.diff(), output_size=variants)
    highest = logprobs.new_full((steps,), -math.inf).scatter_reduce(0, step, real, "amax")
    candidate = torch.where(real == highest[step], index[:variants], variants)
    best = torch.full_like(cu_steps[1:], variants).scatter_reduce(0, step, candidate, "amin")
    return real[best] - baseline[best]


def per_step_loop(
    logprobs: torch.Tensor, cu_branches: list[int], cu_variants: list[int], cu_steps: list[int]
) -> list[float]:
    """The same a context at a time, offsets being on the host already."""

    def score(branch: int) -> float:
        answer = logprobs[cu_branches[branch] : cu_branches[branch + 1]]
        weight = torch.ones_like(answer)
        weight[: HEAD["head_tokens"]] = HEAD["head_weight"]
        return ((weight / weight.mean() * answer).sum() / answer.numel()).item()

    gains = []
    for first_variant, last_variant in itertools.pairwise(cu_steps):
        best_real, best_baselines = -math.inf, [math.nan]
        for variant in range(first_variant, last_variant):
            real, *baselines = (score(b) for b in range(cu_variants[variant], cu_variants[variant + 1]))
            if real > best_real:
                best_real, best_baselines = real, baselines
        gains.append(best_real - sum(best_baselines) / len(best_baselines))
    return gains


def make(steps: int, variants: int, branches: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Answers of 1 to `tokens` tokens; the branches of a variant score the same answer."""
    torch.manual_seed(0)
    lengths = torch.randint(1, tokens + 1, (steps * variants,)).repeat_interleave(branches)
    cu_branches = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logprobs = -5 * torch.rand(int(cu_branches[-1]), dtype=torch.float64)
    cu_variants = torch.arange(steps * variants + 1) * branches
    layout = (logprobs.to(dtype), cu_branches, cu_variants, torch.arange(steps + 1) * variants)
    return tuple(t.to(DEVICE) for t in layout)


def first_steps(layout: tuple[torch.Tensor, ...], steps: int) -> tuple[torch.Tensor, ...]:
    logprobs, cu_branches, cu_variants, cu_steps = layout
    variants = int(cu_steps[steps])
    branches = int(cu_variants[variants])
    offsets = (cu_branches[: branches + 1], cu_variants[: variants + 1], cu_steps[: steps + 1])
    return logprobs[: int(cu_branches[branches])], *offsets


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("shape", SHAPES["information_gain"])
def test_information_gain(benchmark: Any, shape: str, dtype: torch.dtype) -> None:
    size = SHAPES["information_gain"][shape]
    layout = make(**size, dtype=dtype)
    host = [t.tolist() for t in layout[1:]]

    result = information_gain(*layout, **HEAD)  # a wrong result has no speed
    few = first_steps(layout, min(CHECKED_STEPS, size["steps"]))
    gain = result.gain[: few[3].numel() - 1]
    numerics.check(gain, lambda *x: reference.information_gain(*x, **HEAD).gain, *few)
    numerics.check(result.gain, eager, *layout)
    looped = torch.tensor(per_step_loop(layout[0], *host), dtype=dtype, device=DEVICE)
    numerics.check(looped, eager, *layout)

    compiled = torch.compile(eager)
    vectorised = {"eager": lambda: eager(*layout), "compiled": lambda: compiled(*layout)}
    info = benchmark.extra_info
    info["flops"] = 2 * layout[0].numel() + 2 * (layout[1].numel() - 1)  # weighted sums, then means
    info["bytes"] = size_bytes(*layout, *result)

    def ours() -> reference.InformationGain:
        return information_gain(*layout, **HEAD)

    interleave(benchmark, ours, {**vectorised, "per_step_loop": lambda: per_step_loop(layout[0], *host)})
    record_peaks(benchmark, ours, vectorised)  # the loop holds one context at a time
