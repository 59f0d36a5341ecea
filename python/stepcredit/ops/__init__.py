"""The public ops. Each module checks its arguments, resolves an implementation and calls one custom op."""

from stepcredit.ops.information_gain import information_gain
from stepcredit.ops.masked_advantages import masked_advantages
from stepcredit.ops.topk_search import topk_search

__all__ = ["information_gain", "masked_advantages", "topk_search"]
