"""Rollouts written by hand, with spans from the transcript code that engines use, and small random policies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from stepcredit.batch import RolloutBatch
from stepcredit.credit import Credit
from stepcredit.environments import Response
from stepcredit.protocol import Protocol, get_protocol
from stepcredit.retrieval import Passage
from stepcredit.rollout import Question, Rollout, Search, SpanKind
from stepcredit.train.engine.transcript import Transcript

REFINE = get_protocol("refine")
SEARCH_R1 = get_protocol("search_r1")
#: Soft caps and sliding windows at the size of `random_policy`.
GEMMA2 = {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}


def write(
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    searches: Sequence[tuple[str, str | None, str | None]],
    *,
    protocol: Protocol = REFINE,
    reward: float = 0.0,
    group: int = 0,
    answer: str = "is Paris",
) -> Rollout:
    """A rollout of these searches: (query, passage or None for a failed retrieval, refinement or None)."""
    t = Transcript(question, protocol.prompt(question, tokenizer), tokenizer, protocol)

    def policy(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        t.add_policy(ids, [-1.0] * len(ids))

    turn = "<think>hm, first</think>\n"
    for step, (query, passage, refinement) in enumerate(searches):
        policy(f"{turn}<search>{query}</search>")
        search = Search(step, query, () if passage is None else (f"p{step}",), failed=passage is None)
        if passage is None:
            t.add_response(Response(protocol.failed_notice, SpanKind.NOTICE, search), room=10**6)
        else:
            text = protocol.documents([Passage(f"p{step}", "City", passage)])
            t.add_response(Response(text, SpanKind.DOCUMENTS, search), room=10**6)
        turn = f"<think>then</think>{'' if refinement is None else f'<refine>{refinement}</refine>'}"
    policy(f"{turn}<answer>{answer}</answer>")
    rollout = t.finish("answered", answer, group)
    rollout.rewards["total"] = reward
    return rollout


def random_policy(family: str, tokenizer: PreTrainedTokenizerBase, **changes: object) -> PreTrainedModel:
    """A random model with grouped-query attention whose logits are far from flat."""
    config = CONFIG_MAPPING[family](
        **{
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **changes,
        }
    )
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def by_rollout(credit: Credit, batch: RolloutBatch) -> list[float]:
    """The advantage of each rollout, which all tokens of its policy share; environment tokens have none."""
    assert not credit.advantages[~batch.policy_mask].any()
    sizes = batch.cu_seqlens.diff().tolist()
    pairs = zip(credit.advantages.split(sizes), batch.policy_mask.split(sizes), strict=True)
    values = [tokens[mask] for tokens, mask in pairs]
    assert all(len(v.unique()) == 1 for v in values)
    return [float(v[0]) for v in values]


def relative(values: Sequence[float], eps: float = 1e-4) -> list[float]:
    """The values less their mean, over their standard deviation (ddof 1) and eps."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / (deviation + eps) for v in values]
