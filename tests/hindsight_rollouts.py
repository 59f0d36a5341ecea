"""Two groups of rollouts that searched, with right and wrong answers, and a policy to look back on them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from scripted_rollouts import REFINE, random_policy, write
from stepcredit.batch import RolloutBatch
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer
from tokenizers_under_test import BUILT

TOKENIZER = BUILT["byte_bpe"]()
QUESTIONS = [Question("a", "Which river flows through Lyon?", ("Rhône",)), Question("b", "Capital?", ("Paris",))]


def make(
    family: str = "llama", tokenizer: PreTrainedTokenizerBase = TOKENIZER, **changes: object
) -> tuple[RolloutBatch, PolicyScorer]:
    """Two groups of three: one with a right and two wrong answers, one with right answers alone. The first rollout of a
    group searches twice, the second once in the same words, the third not at all."""
    rollouts = []
    for group, question in enumerate(QUESTIONS):
        for i, answer in enumerate(("is Rhône", "is Paris", "is Rome") if group == 0 else ("Paris",) * 3):
            searches = [("river in Lyon", "Lyon lies on it.", None), (f"more of {group}", "The Seine.", "so")][: 2 - i]
            item = write(tokenizer, question, searches, reward=float(i == group), group=group, answer=answer)
            rollouts.append(item)
    return RolloutBatch.pack(rollouts), PolicyScorer(random_policy(family, tokenizer, **changes), tokenizer, REFINE)
