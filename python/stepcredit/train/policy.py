"""The policy in training: loading it, and the log-probs of what it wrote, with gradients. U counts distinct tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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

from stepcredit._attention import running_attention
from stepcredit.assets import resolve_model
from stepcredit.batch import RolloutBatch
from stepcredit.head import head_distribution, head_logprobs
from stepcredit.train.rows import EAGER_LENGTH, Row, row_inputs

Indices = NDArray[np.integer[Any]]


def resolve_device(name: str, field: str = "model.device") -> torch.device:
    """ "auto" is the GPU where there is one, else the CPU; `field` is what errors call it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{field} must be a torch device such as 'cpu' or 'cuda:1', got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{field} is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


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


def policy_logprobs(
    model: PreTrainedModel, batch: RolloutBatch, used_T: torch.Tensor, rows: Sequence[Row], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Forward(model, batch, rows).logprobs(used_T, temperature)`."""
    return Forward(model, batch, rows).logprobs(used_T, temperature)


class Forward:
    """One padded forward over some rollouts of a batch, with gradients, and what the LM head makes of its states.

    A prefix that rollouts share is run once, and what it computes is theirs in forward and backward alike. Rows are
    padded on the right, where causal attention never looks. The LM head runs on rows that are asked for, and on no
    others.

    Args:
        model: a causal language model.
        batch: packed rollouts, T tokens in all.
        rows: the rollouts to run, from `pack_rows(batch, used_lengths(batch, used_T), ...)`.
    """

    def __init__(self, model: PreTrainedModel, batch: RolloutBatch, rows: Sequence[Row]) -> None:
        inputs = {name: value.to(batch.tokens.device) for name, value in row_inputs(rows, model.dtype).items()}
        hidden_BLH = model.base_model(use_cache=False, **inputs).last_hidden_state
        self._model, self._batch, self._rows = model, batch, rows
        self._width = hidden_BLH.shape[1]
        self._hidden_MH = hidden_BLH.flatten(0, 1)
        self._starts: list[int] = batch.cu_seqlens.tolist()

    def logprobs(self, used_T: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the used tokens of these rollouts.

        Args:
            used_T: bool [T], the tokens whose log-probs are wanted; never a rollout's first.
            temperature: the sampling temperature; log-probs are of the distribution at that temperature.

        Returns:
            (positions int64 [N], logprobs float32 [N], differentiable): positions are indices into the packed T tokens.

        Raises:
            FloatingPointError: the policy's hidden states or log-probs are not finite; names the question.
        """
        position_N, place_N, before_N = self._places(used_T)
        _, first, shared = np.unique(place_N, return_index=True, return_inverse=True)
        position_U = self._put(position_N[first])
        logprobs_U = head_logprobs(
            self._model,
            self._hidden_MH[self._put(before_N[first])],
            self._batch.tokens[position_U],
            temperature=temperature,
            name=lambda row: self._question(position_U[row]),
        )
        return self._put(position_N), logprobs_U[self._put(shared)]

    def candidates(
        self, positions_R: torch.Tensor, candidates_RK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs at temperature 1 of candidates for tokens of these rollouts; those of other rollouts are left out.

        Args:
            positions_R: int64 [R], ascending indices into the packed T tokens; never a rollout's first.
            candidates_RK: int64 [R, K], token ids.

        Returns:
            (which int64 [N], logprobs float32 [N, K], differentiable, entropies [N] without gradient): `which` are
            indices into R.

        Raises:
            FloatingPointError: as `logprobs`.
        """
        asked_T = torch.zeros_like(self._batch.tokens, dtype=torch.bool)
        asked_T[positions_R] = True
        position_N, _, before_N = self._places(asked_T)
        which_N = torch.searchsorted(positions_R, self._put(position_N))
        # Rollouts that share their tokens so far share the state, but not always the candidates.
        wanted_N = torch.cat([self._put(before_N)[:, None], candidates_RK[which_N]], dim=1)
        wanted_U, shared = wanted_N.unique(dim=0, return_inverse=True)
        logprobs_UK, entropy_U = head_distribution(
            self._model,
            self._hidden_MH[wanted_U[:, 0]],
            wanted_U[:, 1:],
            temperature=1.0,
            name=lambda row: self._question(positions_R[which_N[int((shared == row).nonzero()[0])]]),
        )
        return which_N, logprobs_UK[shared], entropy_U.detach()[shared]

    def _places(self, used_T: torch.Tensor) -> tuple[Indices, Indices, Indices]:
        """Of the used tokens of these rollouts: positions in the batch, where their states are, and the states before,
        which predict them. Tokens that rollouts share have one state."""
        used = used_T.cpu().numpy()
        position, place, before = [], [], []
        for number, row in enumerate(self._rows):
            for b, nodes in row.nodes.items():
                at = used[self._starts[b] : self._starts[b] + len(nodes)].nonzero()[0]
                position.append(self._starts[b] + at)
                place.append(number * self._width + nodes[at])
                before.append(number * self._width + nodes[at - 1])
        return np.concatenate(position), np.concatenate(place), np.concatenate(before)

    def _put(self, values: Indices) -> torch.Tensor:
        return torch.from_numpy(values).to(self._batch.tokens.device)

    def _question(self, position: torch.Tensor) -> str:
        b = int(torch.searchsorted(self._batch.cu_seqlens, position, right=True)) - 1
        return f"question {self._batch.rollouts[b].question.id!r} in training"


def row_limit(model: PreTrainedModel, max_tokens: int) -> int:
    """Tokens of a row that rollouts may share: within a sliding window, every ancestor is visible."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return min(max_tokens, EAGER_LENGTH, window or EAGER_LENGTH)


@contextmanager
def training_attention(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[None]:
    """Attention as plain matrix products where torch's fused kernel is slower (short rows on the CPU) or cannot do it
    (soft-capped scores)."""
    fused = model.config._attn_implementation == "sdpa"
    short = model.device.type == "cpu" and all(len(row.tokens) <= EAGER_LENGTH for row in rows)
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    with running_attention(model, "eager") if fused and (short or capped) else nullcontext():
        yield
