"""StepCredit: step-level credit for reinforcement learning of search agents."""

from typing import TYPE_CHECKING

from stepcredit.batch import RolloutBatch
from stepcredit.ops import (
    TreeLayout,
    gather_logprobs,
    information_gain,
    masked_advantages,
    out_of_range_targets,
    topk_search,
    tree_attention,
)
from stepcredit.rollout import Question, Rollout, Search, Span, SpanKind

if TYPE_CHECKING:
    from stepcredit.scoring import score_information_gain
else:

    def __getattr__(name: str) -> object:
        # Scoring imports transformers, which takes seconds that users of the ops alone should not wait for.
        if name == "score_information_gain":
            from stepcredit.scoring import score_information_gain

            return score_information_gain
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "out_of_range_targets",
    "score_information_gain",
    "topk_search",
    "tree_attention",
]
