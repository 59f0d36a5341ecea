"""The public ops. Each module checks its arguments, resolves an implementation and calls one custom op."""

from stepcredit.ops.information_gain import information_gain
from stepcredit.ops.masked_advantages import masked_advantages

__all__ = ["information_gain", "masked_advantages"]
