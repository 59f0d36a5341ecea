"""`PolicyScorer`: log-probs under a Hugging Face causal language model, one forward pass per bin of token trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stepcredit._attention import running_attention
from stepcredit.branches.packing import Bin, TokenTree, pack
from stepcredit.ops.topk_search import MAX_K
from stepcredit.protocol import Protocol, get_protocol
from stepcredit.tokens import decode, encode

if TYPE_CHECKING:
    from stepcredit.branches.tree_reads import TopTokens

_SERVED_LAYERS = {"full_attention", "sliding_attention", "attention"}


def why_not(model: PreTrainedModel) -> str | None:
    """Why token trees cannot be scored exactly with this model; None when they can."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) | set(getattr(config, "layers_block_type", None) or [])
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through the transformers attention interface"
    if config.is_encoder_decoder or getattr(config, "use_bidirectional_attention", False):
        return "it is not a causal decoder"
    if unknown := sorted(map(str, kinds - _SERVED_LAYERS)):
        return f"it has layers of type {', '.join(unknown)}; served are full and sliding-window attention"
    if sinks := [name for name, _ in model.named_parameters() if "sink" in name.rpartition(".")[2]]:
        return f"it has attention sinks ({sinks[0]})"
    nope, rope, value = (getattr(config, f"{name}_head_dim", None) for name in ("qk_nope", "qk_rope", "v"))
    if value is not None and nope is not None and rope is not None and nope + rope != value:
        return f"its keys are not as wide as its values ({nope + rope} and {value})"
    # RoBERTa and its kin keep the first positions for padding.
    if any(hasattr(m, "position_embeddings") and getattr(m, "padding_idx", None) is not None for m in model.modules()):
        return "its positions do not count from 0"
    if model.get_output_embeddings() is None or model.base_model is model:
        return "it has no language-model head on a base model"
    return None


class PolicyScorer:
    """Scores token trees with a policy, and leaves the policy as it found it.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: the model's.
        protocol: tag grammar in which the policy's rollouts are written, or its name.

    Attributes:
        name: the model's class.
        tokens_forwarded: tokens run through the model so far.
        compute_dtype: of the last pass's hidden states, which under FSDP2's mixed precision is not that of the weights.

    Raises:
        ValueError: token trees cannot be scored exactly with this model; the message says why.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: Protocol | str) -> None:
        if (reason := why_not(model)) is not None:
            raise ValueError(f"{type(model).__name__} cannot be scored with token trees: {reason}")
        self.model = model
        self.name = type(model).__name__
        self.tokenizer = tokenizer
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.tokens_forwarded = 0
        self.compute_dtype: torch.dtype = model.dtype

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self.model.device

    @property
    def max_context(self) -> int | None:
        """Positions of a context that can be scored exactly; None when the model's configuration does not say.

        Those the model has, but for rotary embeddings whose frequencies depend on how long the context is (dynamic
        NTK, LongRoPE): contexts of different lengths share no prefix there, so it is the length up to which they do.
        """
        config = self.model.config.get_text_config()
        limits = [getattr(config, "max_position_embeddings", None)]
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        for parameters in rope.values() if all(isinstance(p, dict) for p in rope.values()) else [rope]:
            if parameters.get("rope_type") in ("dynamic", "longrope"):
                limits.append(parameters.get("original_max_position_embeddings"))
        return min((int(limit) for limit in limits if limit is not None), default=None)

    def encode(self, text: str) -> list[int]:
        """`tokens.encode` with the policy's tokenizer."""
        return encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """`tokens.decode` with the policy's tokenizer."""
        return decode(self.tokenizer, ids)

    @torch.no_grad()
    def logprobs(self, trees: Sequence[TokenTree], *, max_tokens: int = 16384) -> torch.Tensor:
        """Log-probs of everything the trees ask to read: one forward pass per bin, the head on those rows only.

        Args:
            trees: results do not depend on their order beyond the order of the output.
            max_tokens: tokens of a bin; a larger tree gets a bin of its own.

        Returns:
            float32 [M] on the model's device, nats: tree after tree, read after read, target after target.

        Raises:
            ValueError: a token id is not in the model's vocabulary, or a path is longer than `max_context`.
            FloatingPointError: the policy gives hidden states or log-probs that are not finite; names the tree.
            RuntimeError: some of the model's layers did not use tree attention.
        """
        # Here and not above: a scorer that runs no model itself does without the transformers that this needs.
        from stepcredit.branches.tree_reads import tree_logprobs

        bins = pack(trees, max_tokens)
        device = self.model.get_output_embeddings().weight.device
        out = torch.zeros(sum(b.places.numel() for b in bins), device=device)

        def read(item: Bin, name: Callable[[int], str]) -> torch.dtype:
            logprobs, dtype = tree_logprobs(self.model, item, name)
            out[item.places.to(device)] = logprobs[item.sources.to(device)]
            return dtype

        self._forward(trees, bins, read)
        return out

    @torch.no_grad()
    def top_tokens(self, trees: Sequence[TokenTree], k: int, *, max_tokens: int = 16384) -> TopTokens:
        """The likeliest tokens wherever the trees ask to read, at temperature 1: one forward pass per bin, no logits of
        all rows at a time. The targets of the reads say where, and nothing else.

        Args:
            trees, max_tokens: as in `logprobs`.
            k: tokens a place, at most 1024; all of the vocabulary where that has fewer.

        Returns:
            M places on the model's device: tree after tree, read after read, target after target.

        Raises:
            ValueError, FloatingPointError, RuntimeError: as `logprobs`.
        """
        from stepcredit.branches.tree_reads import TopTokens, tree_top_tokens

        if not 1 <= k <= MAX_K:
            raise ValueError(f"k must be in [1, {MAX_K}], got {k!r}")
        bins = pack(trees, max_tokens)
        weight = self.model.get_output_embeddings().weight
        parts = [TopTokens.nothing(min(k, weight.shape[0]), weight.device)]
        order = [torch.zeros(0, dtype=torch.int64)]

        def read(item: Bin, name: Callable[[int], str]) -> torch.dtype:
            top, dtype = tree_top_tokens(self.model, item, k, name)
            parts.append(top.at(item.sources.to(weight.device)))
            order.append(item.places)
            return dtype

        self._forward(trees, bins, read)
        together = TopTokens(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return together.at(torch.cat(order).argsort().to(weight.device))

    def _forward(
        self, trees: Sequence[TokenTree], bins: Sequence[Bin], read: Callable[[Bin, Callable[[int], str]], torch.dtype]
    ) -> None:
        """A pass for each bin: `read(bin, names of its log-probs' trees)` makes it and gives its dtype."""
        from stepcredit.branches.tree_forward import ATTENTION

        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        with self._together(len(bins)):
            for item in bins:
                self._check(item, trees, vocabulary)
        failed: FloatingPointError | None = None
        with self._prepared(ATTENTION):
            for item in bins:
                names = [trees[tree].name for tree in item.row_trees.tolist()]
                try:
                    with self._one_pass():
                        self.compute_dtype = read(item, names.__getitem__)
                except FloatingPointError as error:  # the passes to come are passes of the other ranks too
                    failed = failed or error
                self.tokens_forwarded += item.tokens.numel()
        with self._together(0):
            if failed is not None:
                raise failed

    def _check(self, item: Bin, trees: Sequence[TokenTree], vocabulary: int) -> None:
        highest = max(int(item.tokens.max()), int(item.targets.max()))
        if highest >= vocabulary:
            raise ValueError(f"token id {highest} is not in the model's vocabulary of {vocabulary}")
        longest = int(item.layout.positions.max()) + 1
        if self.max_context is not None and longest > self.max_context:
            name = trees[int(item.row_trees[0])].name
            raise ValueError(f"a path of {longest} tokens exceeds the {self.max_context} positions ({name})")

    @torch.no_grad()
    def separate_logprobs(self, contexts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
        """Log-probs of answers after contexts, each by a forward pass of its own with the model's eager attention:
        what `logprobs` must equal.

        Args:
            contexts: (tokens of a context, tokens of the answer).

        Returns:
            For each, float32 [answer tokens], nats.
        """
        found, device = [], self.model.get_output_embeddings().weight.device
        with self._together(len(contexts)):
            pass
        with self._prepared("eager"):
            for context, answer in contexts:
                ids = torch.tensor([[*context, *answer]], device=device)
                with self._one_pass():
                    logits = self.model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
                found.append(logits.log_softmax(-1).gather(-1, ids[0, len(context) :, None])[:, 0])
        return found

    @contextmanager
    def _together(self, forwards: int) -> Iterator[None]:
        """Wraps the checks before `forwards` passes of the model. When FSDP2 shards it, every rank takes part in every
        pass of the others: one that fails its checks fails all, and ranks with fewer passes run the difference over a
        single token first."""
        groups = _sharding_groups(self.model)
        if not groups:  # nobody to agree with, so nothing to wait for on a GPU either
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        state = torch.tensor([forwards, error is not None], device=self.model.get_output_embeddings().weight.device)
        for group in groups:
            torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX, group=group)
        if error is not None:
            raise error
        if int(state[1]):
            raise RuntimeError("another rank that holds a shard of the model could not score its rollouts")
        with self._prepared("eager"), torch.no_grad():
            for _ in range(int(state[0]) - forwards):
                with self._one_pass():
                    self.model(torch.zeros(1, 1, dtype=torch.int64, device=state.device), use_cache=False)

    @contextmanager
    def _prepared(self, attention: str) -> Iterator[None]:
        """Evaluation mode and this attention; afterwards what was there before, module by module."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            with running_attention(self.model, attention):
                yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _one_pass(self) -> Iterator[None]:
        """FSDP2 keeps the root's parameters whole after a forward pass, for a backward that here does not come."""
        try:
            yield
        finally:
            for module in self.model.modules():
                if (reshard := getattr(module, "reshard", None)) is not None:
                    reshard()


def _sharding_groups(model: PreTrainedModel) -> list[Any]:
    """The process groups over which FSDP2 shards or replicates a model; none for a whole one."""
    for parameter in model.parameters():
        if (mesh := getattr(parameter, "device_mesh", None)) is not None:
            return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    return []
