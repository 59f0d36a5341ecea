"""Text to tokens and back, and where each token lies in the text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text of its own: nothing added, and nothing in it read as a special token (but for Unigram
    tokenizers, whose model knows the special tokens as words)."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens included, spaces as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def special_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """A special token of this tokenizer whose text stands in the text; None where there is none."""
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return next((token for token in special if token in text), None)


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What this tokenizer puts before every text: its BOS, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def boundaries(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """Where each token ends in `text = decode(ids)`: n+1 character offsets for n tokens, non-decreasing, by decoding
    every prefix. A token that only completes a character with its successors ends where it starts."""
    offsets = [0]
    for i in range(1, len(ids)):
        prefix = decode(tokenizer, ids[:i])
        at = offsets[-1]
        # What an earlier prefix agreed on may be rewritten (cut characters, spaces before punctuation): never go back.
        if prefix[:at] == text[:at]:
            while at < min(len(prefix), len(text)) and prefix[at] == text[at]:
                at += 1
        offsets.append(at)
    return [*offsets, len(text)] if ids else offsets
