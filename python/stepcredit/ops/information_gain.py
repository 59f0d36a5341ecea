"""`information_gain`: how much the retrieved passages raised the log-prob of the gold answer."""

from __future__ import annotations

import torch

from stepcredit import dispatch, reference
from stepcredit.ops import _checks as check
from stepcredit.reference import InformationGain

OP = "information_gain"
dispatch.register(OP, "reference", dispatch.always)(reference.information_gain)


def empty_result(logprobs: torch.Tensor, cu_branches: torch.Tensor, cu_steps: torch.Tensor) -> InformationGain:
    """For an implementation to fill."""
    steps = cu_steps.shape[0] - 1
    return InformationGain(
        gain=logprobs.new_empty(steps),
        real=logprobs.new_empty(steps),
        baseline=logprobs.new_empty(steps),
        scored=logprobs.new_empty(steps, dtype=torch.bool),
        scores=logprobs.new_empty(cu_branches.shape[0] - 1),
        best_variant=logprobs.new_empty(steps, dtype=torch.int64),
    )


@dispatch.register(OP, "cuda", dispatch.native_cuda(torch.float32, torch.float64))
@dispatch.register(OP, "cpu", dispatch.native(torch.float32, torch.float64))
def _native(
    logprobs: torch.Tensor,
    cu_branches: torch.Tensor,
    cu_variants: torch.Tensor,
    cu_steps: torch.Tensor,
    *,
    head_tokens: int,
    head_weight: float,
) -> InformationGain:
    from stepcredit import _C

    kernel = _C.information_gain_f64 if logprobs.dtype == torch.float64 else _C.information_gain_f32
    logprobs, cu_branches, cu_variants, cu_steps = (
        t.contiguous() for t in (logprobs, cu_branches, cu_variants, cu_steps)
    )
    branches, variants, steps = (t.numel() - 1 for t in (cu_branches, cu_variants, cu_steps))
    out = empty_result(logprobs, cu_branches, cu_steps)
    kernel(
        logprobs=logprobs.data_ptr(),
        cu_branches=cu_branches.data_ptr(),
        cu_variants=cu_variants.data_ptr(),
        cu_steps=cu_steps.data_ptr(),
        **{name: t.data_ptr() for name, t in out._asdict().items()},
        num_branches=branches,
        num_variants=variants,
        num_steps=steps,
        head_tokens=head_tokens,
        head_weight=head_weight,
        threads=torch.get_num_threads(),
        on_cuda=logprobs.is_cuda,
        stream=torch.cuda.current_stream(logprobs.device).cuda_stream if logprobs.is_cuda else 0,
    )
    return out


dispatch.register(OP, "triton", dispatch.triton(torch.float32, torch.float64))(dispatch.triton_kernel(OP))


@torch.library.custom_op("stepcredit::information_gain", mutates_args=())
def _op(
    logprobs: torch.Tensor,
    cu_branches: torch.Tensor,
    cu_variants: torch.Tensor,
    cu_steps: torch.Tensor,
    head_tokens: int,
    head_weight: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if check.reads_values(logprobs):
        check.finite(OP, "logprobs", logprobs)
        check.offsets(OP, "cu_branches", cu_branches, logprobs.numel())
        check.offsets(OP, "cu_variants", cu_variants, cu_branches.numel() - 1)
        check.offsets(OP, "cu_steps", cu_steps, cu_variants.numel() - 1)
    result = dispatch.function(OP, impl)(
        logprobs, cu_branches, cu_variants, cu_steps, head_tokens=head_tokens, head_weight=head_weight
    )
    return tuple(result)


@_op.register_fake
def _(
    logprobs: torch.Tensor, cu_branches: torch.Tensor, cu_variants: torch.Tensor, cu_steps: torch.Tensor, *_: object
) -> tuple[torch.Tensor, ...]:
    return tuple(empty_result(logprobs, cu_branches, cu_steps))


def information_gain(
    logprobs: torch.Tensor,
    cu_branches: torch.Tensor,
    cu_variants: torch.Tensor,
    cu_steps: torch.Tensor,
    *,
    head_tokens: int = 0,
    head_weight: float = 1.0,
    impl: str | None = None,
) -> InformationGain:
    """Per search step, the score of the gold answer under the real passages minus the mean under counterfactual ones.

    Equivalent, with nested offsets (steps own variants, variants own branches, branches own log-probs)::

        w          = [head_weight] * head_tokens + [1, 1, ...]
        score(br)  = sum(w * lp) / sum(w)                      # nats per token
        v*         = argmax over the step's variants of score(first branch of v)
        gain       = score(first branch of v*) - mean(score(other branches of v*))

    Not differentiable. Deterministic.

    Args:
        logprobs: float [M], log-probs of answer tokens, branch after branch, nats, finite.
        cu_branches: int64 [R+1], offsets of the branches in `logprobs`.
        cu_variants: int64 [V+1], offsets of the gold variants in the branches; a variant's first branch is the real
            one, the others are its counterfactuals.
        cu_steps: int64 [S+1], offsets of the steps in the variants.
        head_tokens: the first this many answer tokens weigh `head_weight` (IG-Search's released code: 3).
        head_weight: their weight, >= 0 (released code: 3.0; the paper's equation is a plain mean, 1.0).
        impl: "cuda", "triton", "cpu" or "reference"; None picks the first that can run.

    Returns:
        InformationGain(gain[S], real[S], baseline[S], scored[S] bool, scores[R], best_variant[S] int64). A step
        without a counterfactual, or whose best answer has no weighted token, has gain NaN and scored False;
        best_variant is -1 for a step without variants.

    Raises:
        ValueError: a shape, dtype, device or option is wrong; offsets fall or do not end where the next level begins; a
            log-prob is not finite (values are checked for CPU tensors, and with STEPCREDIT_DEBUG=1 for all).

    Source: IG-Search (arXiv 2604.15148), equations 2 and 3, and its released `ig_reward.py` for the head weights and
    for taking the gold variant with the highest real score.
    """
    check.tensor(OP, "logprobs", logprobs, 1, "f")
    for name, offsets in (("cu_branches", cu_branches), ("cu_variants", cu_variants), ("cu_steps", cu_steps)):
        check.tensor(OP, name, offsets, 1, "i")
        check.require(offsets.shape[0] > 0, f"{OP}: {name} is empty; offsets hold at least the leading 0")
    check.same_device(OP, logprobs=logprobs, cu_branches=cu_branches, cu_variants=cu_variants, cu_steps=cu_steps)
    check.in_range(OP, "head_tokens", head_tokens, 0, 2**31)
    check.in_range(OP, "head_weight", head_weight, 0.0, 1e6)
    name = dispatch.resolve(OP, impl, logprobs, cu_branches, cu_variants, cu_steps)
    return InformationGain(
        *_op(logprobs.detach(), cu_branches, cu_variants, cu_steps, head_tokens, float(head_weight), name)
    )
