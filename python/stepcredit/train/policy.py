"""The policy in training: loading it, and the log-probs of what it wrote, with gradients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from stepcredit.assets import resolve_model
from stepcredit.ops import gather_logprobs
from stepcredit.rollout import RolloutBatch
from stepcredit.scorer import head_options

#: What a micro-batch costs beside its tokens (collecting a set of gradients), in tokens; measured with 135M parameters
#: on two CPU cores.
MICRO_BATCH_COST = 64

#: Up to this many tokens a row, eager attention trains faster on the CPU than the fused kernel: forward and backward of
#: 12 x 100 tokens in bfloat16 took 13 ms against 47, of 3 x 400 tokens 44 against 65.
EAGER_LENGTH = 512


def resolve_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"model.device must be a torch device such as 'cpu' or 'cuda:1', got {name!r}") from None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype a model computes in; "auto" is bfloat16 where the device multiplies it natively, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        cpu = Path("/proc/cpuinfo")  # absent on macOS, where torch has no native bfloat16 matmul on the CPU
        native = cpu.exists() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu.read_text()) is not None
    return torch.bfloat16 if native else torch.float32


def load_policy(
    name: str, *, device: torch.device, dtype: torch.dtype, texts: Iterable[str], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in evaluation mode (no dropout anywhere, in training too).

    Args:
        name: "tiny", or what `stepcredit.assets.resolve_model` knows: "smollm2", a directory, a Hub name.
        device, dtype: where and in what the model computes.
        texts: what the tokenizer of "tiny" is trained on; not read otherwise.
        seed: of the random weights of "tiny".
    """
    model: Any
    if name == "tiny":
        model, tokenizer = tiny_policy(texts, seed)
    else:
        source = resolve_model(name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source)
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def tiny_policy(texts: Iterable[str], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama (2 layers, hidden 32) with a byte-level BPE of 1,024 tokens: for tests and code changes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def used_lengths(batch: RolloutBatch, used_T: torch.Tensor) -> list[int]:
    """How many leading tokens of each rollout must be run to reach its last used token; 0 where none is used.

    Args:
        batch: packed rollouts, T tokens in all.
        used_T: bool [T].
    """
    used = used_T.cpu().numpy()
    starts = batch.cu_seqlens.tolist()
    places = [used[start:stop].nonzero()[0] for start, stop in pairwise(starts)]
    return [int(at[-1]) + 1 if len(at) else 0 for at in places]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split rollouts into padded micro-batches at the least cost: padded tokens plus `MICRO_BATCH_COST` for each.

    Args:
        lengths: tokens of each rollout; those of length 0 are in no micro-batch.
        max_tokens: padded tokens of a micro-batch; a longer rollout is alone in one.

    Returns:
        Indices into `lengths`, longest first; deterministic.
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    cost, cut = [0.0], [0]  # of the first `stop` rollouts; where the last of their micro-batches begins
    for stop in range(1, len(order) + 1):
        starts = [k for k in range(stop) if k == stop - 1 or (stop - k) * lengths[order[k]] <= max_tokens]
        best = min(starts, key=lambda k: cost[k] + (stop - k) * lengths[order[k]])
        cost.append(cost[best] + (stop - best) * lengths[order[best]] + MICRO_BATCH_COST)
        cut.append(best)
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[cut[stop] : stop])
        stop = cut[stop]
    return batches[::-1]


@contextmanager
def training_attention(model: PreTrainedModel, longest: int) -> Iterator[None]:
    """Attention as plain matrix products where they are faster than torch's fused kernel: short rows on the CPU."""
    before = model.config._attn_implementation
    eager = model.device.type == "cpu" and before == "sdpa" and longest <= EAGER_LENGTH
    if eager:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if eager:
            model.set_attn_implementation(before)


def policy_logprobs(
    model: PreTrainedModel,
    batch: RolloutBatch,
    used_T: torch.Tensor,
    members: Sequence[int],
    lengths: Sequence[int],
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the used tokens of some rollouts of a batch, by one padded forward.

    Rollouts are padded on the right, where causal attention never looks, so no mask of the padding is needed. The LM
    head runs on the rows that predict a used token, and on no others.

    Args:
        model: a causal language model.
        batch: packed rollouts, T tokens in all.
        used_T: bool [T], the tokens whose log-probs are wanted; never a rollout's first.
        members: indices of the rollouts to run, together.
        lengths: `used_lengths(batch, used_T)`, how many leading tokens of each rollout of the batch to run.
        temperature: the sampling temperature; log-probs are of the distribution at that temperature.

    Returns:
        (positions int64 [N], logprobs float32 [N], differentiable): positions are indices into the packed T tokens.

    Raises:
        FloatingPointError: the policy's hidden states or log-probs are not finite; names the question.
    """
    starts = batch.cu_seqlens.tolist()
    pieces = [batch.tokens[starts[b] : starts[b] + lengths[b]] for b in members]
    hidden_BLH = model.base_model(
        input_ids=torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True), use_cache=False
    ).last_hidden_state
    rows, positions = [], []
    for row, b in enumerate(members):
        at = used_T[starts[b] : starts[b] + lengths[b]].nonzero().squeeze(1)
        rows.append(row * hidden_BLH.shape[1] + at - 1)  # the hidden state before a token predicts it
        positions.append(starts[b] + at)
    position_N = torch.cat(positions)
    hidden_NH = hidden_BLH.flatten(0, 1)[torch.cat(rows)]
    check_finite("hidden states", hidden_NH.detach().sum(-1), batch, position_N)
    head = model.get_output_embeddings()
    options: dict[str, Any] = head_options(model)
    logprobs_N = gather_logprobs(
        hidden_NH,
        head.weight,
        batch.tokens[position_N],
        bias=getattr(head, "bias", None),
        temperature=temperature,
        **options,
    )
    check_finite("log-probs", logprobs_N.detach(), batch, position_N)
    return position_N, logprobs_N


def check_finite(what: str, values_N: torch.Tensor, batch: RolloutBatch, position_N: torch.Tensor) -> None:
    """FloatingPointError naming the question of the first value that is NaN or infinite."""
    bad = (~values_N.isfinite()).nonzero()
    if len(bad):
        b = int(torch.searchsorted(batch.cu_seqlens, position_N[bad[0]], right=True)) - 1
        raise FloatingPointError(
            f"question {batch.rollouts[b].question.id!r}: the policy's {what} are NaN or infinite in training"
        )
