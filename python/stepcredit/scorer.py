"""`PolicyScorer`: log-probs under a Hugging Face causal language model, one forward pass per bin of token trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import AttentionMaskInterface

from stepcredit.head import head_logprobs
from stepcredit.ops import tree_attention
from stepcredit.ops.tree_attention import TreeLayout
from stepcredit.packing import Bin, TokenTree, pack
from stepcredit.protocol import Protocol, get_protocol
from stepcredit.tokens import decode, encode

#: Name under which the tree attention is registered with transformers.
ATTENTION = "stepcredit_tree"

_SERVED_LAYERS = {"full_attention", "sliding_attention", "attention"}


class _Captured(Exception):
    """A layer was run for its keys and values alone."""


@dataclass(slots=True)
class _Pass:
    """Travels through a forward pass as the keyword `tree`.

    Attributes:
        layout: of the T packed tokens.
        rows: int64 [R], the tokens whose last hidden states are read.
        layers: how many layers used it.
        capture: the next attention keeps its keys and values in `kept` and stops there.
        kept: keys and values of all T tokens, for a layer that is given `rows` alone.
    """

    layout: TreeLayout
    rows: torch.Tensor
    layers: int = 0
    capture: bool = False
    kept: tuple[torch.Tensor, torch.Tensor] | None = None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: _Pass | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """The transformers attention interface: query [1, Hq, T, D], key and value [1, Hkv, T, D], rotary embedding
    applied; returns [1, T, Hq, D]."""
    name = type(module).__name__
    if tree is None:
        raise ValueError(f"{name}: the attention {ATTENTION!r} needs model(..., tree=...); it serves PolicyScorer only")
    if attention_mask is not None or unused.get("s_aux") is not None or unused.get("position_bias") is not None:
        raise ValueError(f"{name}: tree attention has no attention mask, sinks or position bias")
    # Under autocast the rotary embedding may leave query and key wider than value.
    query, key, value = (x[0].transpose(0, 1) for x in (query.to(value.dtype), key.to(value.dtype), value))
    if tree.capture:
        tree.kept = key, value
        raise _Captured
    tree.layers += 1
    if tree.kept is not None:
        key, value = tree.kept
        query = query.new_zeros(len(key), *query.shape[1:]).index_copy_(0, tree.rows, query)
    out = tree_attention(query, key, value, tree.layout, scale=scaling, softcap=softcap, window=sliding_window)
    return (out if tree.kept is None else out[tree.rows])[None], None


def _trim(carrier: _Pass, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-forward hook of the last layer: it is run once for the keys and values of all tokens, up to there, and then
    goes on with the rows that are read. A layer with inputs that are not known here is left alone."""
    known = {"hidden_states", "position_embeddings", "position_ids"}
    per_token = {name: value for name, value in kwargs.items() if name in known and value is not None}
    others = [value for name, value in kwargs.items() if name not in known]
    if len(args) > 1 or any(isinstance(value, (torch.Tensor, tuple, list)) for value in others):
        return None
    carrier.capture = True
    try:
        module.forward(*args, **kwargs)
    except _Captured:
        pass
    finally:
        carrier.capture = False
    if carrier.kept is None:
        return None

    def select(value: Any) -> Any:
        return tuple(map(select, value)) if isinstance(value, tuple) else value[:, carrier.rows]

    return select(args), {**kwargs, **{name: select(value) for name, value in per_token.items()}}


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda **_: None)


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
        tokens_forwarded: tokens run through the model so far.

    Raises:
        ValueError: token trees cannot be scored exactly with this model; the message says why.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: Protocol | str) -> None:
        if (reason := why_not(model)) is not None:
            raise ValueError(f"{type(model).__name__} cannot be scored with token trees: {reason}")
        self.model = model
        self.tokenizer = tokenizer
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.tokens_forwarded = 0

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
            trees: at least one; results do not depend on their order beyond the order of the output.
            max_tokens: tokens of a bin; a larger tree gets a bin of its own.

        Returns:
            float32 [M] on the model's device, nats: tree after tree, read after read, target after target.

        Raises:
            ValueError: a token id is not in the model's vocabulary, or a path is longer than `max_context`.
            FloatingPointError: the policy gives hidden states or log-probs that are not finite; names the tree.
            RuntimeError: some of the model's layers did not use tree attention.
        """
        head = self.model.get_output_embeddings()
        device, vocabulary = head.weight.device, head.weight.shape[0]
        bins = pack(trees, max_tokens)
        out = torch.zeros(sum(b.places.numel() for b in bins), device=device)
        with self._prepared(ATTENTION):
            for item in bins:
                highest = max(int(item.tokens.max()), int(item.targets.max()))
                if highest >= vocabulary:
                    raise ValueError(f"token id {highest} is not in the model's vocabulary of {vocabulary}")
                longest = int(item.layout.positions.max()) + 1
                if self.max_context is not None and longest > self.max_context:
                    name = trees[int(item.row_trees[0])].name
                    raise ValueError(f"a path of {longest} tokens exceeds the {self.max_context} positions ({name})")
                hidden = self._forward(item)
                logprobs = torch.empty(len(item.rows), device=device)
                for temperature in item.temperatures.unique().tolist():
                    at = (item.temperatures == temperature).nonzero().squeeze(1)
                    names = [trees[tree].name for tree in item.row_trees[at].tolist()]
                    logprobs[at.to(device)] = head_logprobs(
                        self.model,
                        hidden[at.to(device)],
                        item.targets[at].to(device),
                        temperature=temperature,
                        name=names.__getitem__,
                    ).float()
                out[item.places.to(device)] = logprobs[item.sources.to(device)]
        return out

    @torch.no_grad()
    def separate_logprobs(self, context: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Log-probs of an answer after a context by a forward pass of its own with the model's eager attention: what
        `logprobs` must equal. [len(answer)], float32, nats."""
        ids = torch.tensor([[*context, *answer]], device=self.model.get_output_embeddings().weight.device)
        with self._prepared("eager"):
            logits = self.model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(-1, ids[0, len(context) :, None])[:, 0]

    def _forward(self, item: Bin) -> torch.Tensor:
        """The last hidden states [N, H] that the reads of a bin need."""
        base = self.model.base_model
        rows, reads = item.rows.unique(return_inverse=True)
        device = self.model.get_output_embeddings().weight.device
        layout = item.layout.to(device)
        carrier = _Pass(layout, rows.to(device))
        stack = getattr(base, "layers", None)
        hook = None
        if isinstance(stack, torch.nn.ModuleList):
            hook = stack[-1].register_forward_pre_hook(partial(_trim, carrier), with_kwargs=True)
        try:
            hidden: torch.Tensor = base(
                input_ids=item.tokens[None].to(device),
                position_ids=layout.positions[None],
                use_cache=False,
                tree=carrier,
            ).last_hidden_state[0]
        finally:
            if hook is not None:
                hook.remove()
        layers = self.model.config.get_text_config().num_hidden_layers
        if carrier.layers != layers:
            raise RuntimeError(
                f"{type(self.model).__name__}: {carrier.layers} of {layers} layers used tree attention; its scores"
                " would be wrong"
            )
        self.tokens_forwarded += item.tokens.numel()
        if carrier.kept is None:
            hidden = hidden[carrier.rows]
        return hidden[reads.to(device)]

    @contextmanager
    def _prepared(self, attention: str) -> Iterator[None]:
        """Evaluation mode and this attention; afterwards what was there before, module by module."""
        training = [module for module in self.model.modules() if module.training]
        before = self.model.config._attn_implementation
        self.model.eval()
        self.model.set_attn_implementation(attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)
            for module in training:
                module.training = True
