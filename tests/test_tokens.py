from __future__ import annotations

import random

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stepcredit.tokens import boundaries, decode, encode
from tokenizers_under_test import BUILT


@pytest.mark.parametrize("name", ["byte_bpe", "wordpiece"])
def test_nothing_is_added_and_no_text_becomes_a_special_token(name):
    tokenizer = BUILT[name]()
    ids = encode(tokenizer, f"a {tokenizer.eos_token} b")
    assert not set(ids) & {tokenizer.eos_token_id, tokenizer.bos_token_id}
    assert (ids[0], ids[-1]) == (encode(tokenizer, "a")[0], encode(tokenizer, " b")[-1])


def test_special_tokens_are_decoded():
    tokenizer = BUILT["byte_bpe"]()
    assert decode(tokenizer, [*encode(tokenizer, "a"), tokenizer.eos_token_id]) == "a<|end|>"


def test_boundaries_of_cut_characters():
    tokenizer = BUILT["byte_bpe"]()
    ids = tokenizer.convert_tokens_to_ids([bytes_to_unicode()[byte] for byte in "a€b".encode()])
    assert boundaries(tokenizer, ids, "a€b") == [0, 1, 1, 1, 2, 3]
    assert boundaries(tokenizer, [], "") == [0]
    cut = decode(tokenizer, ids[:2])  # ends inside a character
    assert boundaries(tokenizer, ids[:2], cut) == [0, 1, 2]


@pytest.mark.parametrize("name", BUILT)
def test_boundaries_never_fall(name):
    """Of any tokens, as an untrained policy draws them: decoders rewrite what a prefix looked like."""
    tokenizer, draw = BUILT[name](), random.Random(0)
    for _ in range(300):
        ids = draw.choices(range(len(tokenizer)), k=8)
        text = decode(tokenizer, ids)
        offsets = boundaries(tokenizer, ids, text)
        assert len(offsets) == len(ids) + 1
        assert offsets == sorted(offsets)
        assert (offsets[0], offsets[-1]) == (0, len(text))
