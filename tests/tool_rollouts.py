"""A tiny chat policy that calls tools: real sampling, in a form that a random model would never find by itself."""

from __future__ import annotations

import functools

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scripted_rollouts import random_policy
from stepcredit.retrieval import Hits, Passage, RetrievalError
from stepcredit.tokens import encode

CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "'
CLOSE = '"}}\n</tool_call>'
#: What the policy is free to write, each a token of its own.
WORDS = [" river", " mayor", " Lyon", " Paris", " Rome", " bridge", " tower", " lake"]


def chat_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE with Qwen's control tokens; what a chat template writes is few tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([template, CALL, CLOSE, *WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tags = ("tool_call", "tool_response", "think")
    tokenizer.add_tokens([*(f"<{s}{tag}>" for tag in tags for s in ("", "/")), *WORDS])
    tokenizer.chat_template = template
    tokenizer.padding_side = "left"
    return tokenizer


def tool_caller(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random Llama that searches for two words of `WORDS`, after that searches again or answers with one, and answers
    in the end. What it may choose from, it samples."""
    words = tokenizer.convert_tokens_to_ids(WORDS)
    start, response, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<tool_response>", "<|im_end|>"])
    header = [start, *encode(tokenizer, "assistant\n")]
    call = [*encode(tokenizer, CALL)]
    search = [*([token] for token in call), words, words, *([token] for token in encode(tokenizer, CLOSE)), [end]]

    def allowed(_, ids):
        ids = ids.tolist()
        at = len(ids) - 1 - ids[::-1].index(start)
        assert ids[at : at + len(header)] == header
        turn, round_ = ids[at + len(header) :], ids.count(response)
        if not turn:
            return [[call[0]], [call[0], *words], words][min(round_, 2)]
        if turn[0] == call[0]:
            return search[min(len(turn), len(search) - 1)]
        return [end]

    model = random_policy("llama", tokenizer, max_position_embeddings=2048, eos_token_id=end)
    model.generate = functools.partial(model.generate, prefix_allowed_tokens_fn=allowed)
    return model


class Corpus:
    """Finds a passage for every word of a query; every `fails`-th search raises."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.searches = fails, 0

    def search(self, queries, k):
        self.searches += 1
        if self.fails and self.searches % self.fails == 0:
            raise RetrievalError("the index is down")
        rows = [[Passage(w, w, f"Of the {w} much is written, and it is old.") for w in q.split()[:k]] for q in queries]
        return Hits(np.zeros((len(rows), k), np.float32), [[p.id for p in row] for row in rows], rows)
