"""The public ops. Each module checks its arguments, resolves an implementation and calls one custom op."""

from stepcredit.ops.gather_logprobs import gather_logprobs, out_of_range_targets
from stepcredit.ops.information_gain import information_gain
from stepcredit.ops.masked_advantages import masked_advantages
from stepcredit.ops.topk_search import topk_search
from stepcredit.ops.tree_attention import TreeLayout, tree_attention

__all__ = [
    "TreeLayout",
    "gather_logprobs",
    "information_gain",
    "masked_advantages",
    "out_of_range_targets",
    "topk_search",
    "tree_attention",
]
