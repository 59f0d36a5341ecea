"""`information_gain` in one launch, a program per step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stepcredit.kernels import configs
from stepcredit.kernels._device import on_device
from stepcredit.ops.information_gain import empty_result
from stepcredit.reference import InformationGain


@triton.jit
def information_gain_kernel(
    logprobs: tl.tensor,
    cu_branches: tl.tensor,
    cu_variants: tl.tensor,
    cu_steps: tl.tensor,
    gain: tl.tensor,
    real: tl.tensor,
    baseline: tl.tensor,
    scored: tl.tensor,
    scores: tl.tensor,
    best_variant: tl.tensor,
    head_tokens: tl.int64,
    head_weight: tl.float64,
    BRANCHES: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    step = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logprobs.dtype.element_ty
    best = tl.full([], -1, tl.int64)
    best_real = tl.full([], float("nan"), tl.float64)
    best_baseline = tl.full([], float("nan"), tl.float64)
    for variant in range(tl.load(cu_steps + step), tl.load(cu_steps + step + 1)):
        first, last = tl.load(cu_variants + variant), tl.load(cu_variants + variant + 1)
        candidate = tl.full([], 0.0, tl.float64)
        others = tl.full([], 0.0, tl.float64)
        for start in range(first, last, BRANCHES):
            branch = start + tl.arange(0, BRANCHES)
            inside = branch < last
            low = tl.load(cu_branches + branch, mask=inside, other=0)
            length = tl.load(cu_branches + branch + 1, mask=inside, other=0) - low
            total = tl.zeros([BRANCHES], tl.float64)
            for offset in range(0, tl.max(length), TOKENS):
                token = offset + tl.arange(0, TOKENS)
                here = token[None, :] < length[:, None]
                logprob = tl.load(logprobs + low[:, None] + token[None, :], mask=here, other=0.0).to(tl.float64)
                total += tl.sum(tl.where(token[None, :] < head_tokens, head_weight * logprob, logprob), axis=1)
            head = tl.minimum(length, head_tokens)
            weights = head_weight * head + (length - head)
            # No weighted token, no score.
            score = tl.where(weights > 0, total / tl.where(weights > 0, weights, 1.0), float("nan"))
            tl.store(scores + branch, score.to(dtype), mask=inside)
            candidate += tl.sum(tl.where(branch == first, score, 0.0))
            others += tl.sum(tl.where(inside & (branch > first), score, 0.0))
        # Ties go to the earlier variant; a NaN never wins over a number.
        better = (best < 0) | (candidate > best_real) | ((best_real != best_real) & (candidate == candidate))
        if (first < last) & better:
            best = variant
            best_real = candidate
            best_baseline = tl.full([], float("nan"), tl.float64)
            if last - first > 1:
                best_baseline = others / (last - first - 1)
    difference = best_real - best_baseline
    tl.store(best_variant + step, best)
    tl.store(real + step, best_real.to(dtype))
    tl.store(baseline + step, best_baseline.to(dtype))
    tl.store(gain + step, difference.to(dtype))
    tl.store(scored + step, difference == difference)


def launch(
    logprobs: torch.Tensor,
    cu_branches: torch.Tensor,
    cu_variants: torch.Tensor,
    cu_steps: torch.Tensor,
    *,
    head_tokens: int,
    head_weight: float,
) -> InformationGain:
    """The op, for checked arguments: float32 or float64, computed in float64."""
    steps = cu_steps.numel() - 1
    out = empty_result(logprobs, cu_branches, cu_steps)
    if steps:
        inputs = (t.contiguous() for t in (logprobs, cu_branches, cu_variants, cu_steps))
        with on_device(logprobs):
            information_gain_kernel[(steps,)](
                *inputs, *out, head_tokens, head_weight, **configs.INFORMATION_GAIN[logprobs.dtype].launch
            )
    return out
