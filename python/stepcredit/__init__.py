"""StepCredit: step-level credit for reinforcement learning of search agents."""

from stepcredit.ops import information_gain, masked_advantages, topk_search
from stepcredit.rollout import Question, Rollout, RolloutBatch, Search, Span, SpanKind

__all__ = [
    "Question",
    "Rollout",
    "RolloutBatch",
    "Search",
    "Span",
    "SpanKind",
    "information_gain",
    "masked_advantages",
    "topk_search",
]
