"""StepCredit: step-level credit for reinforcement learning of search agents."""

from stepcredit.ops import TreeLayout, gather_logprobs, information_gain, masked_advantages, topk_search, tree_attention
from stepcredit.rollout import Question, Rollout, RolloutBatch, Search, Span, SpanKind

__all__ = [
    "Question",
    "Rollout",
    "RolloutBatch",
    "Search",
    "Span",
    "SpanKind",
    "TreeLayout",
    "gather_logprobs",
    "information_gain",
    "masked_advantages",
    "topk_search",
    "tree_attention",
]
