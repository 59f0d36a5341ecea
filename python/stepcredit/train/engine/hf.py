"""Rollouts with a Hugging Face model: a plain batched decode loop whose KV cache is kept across turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stepcredit._attention import running_attention
from stepcredit.environments import Environment
from stepcredit.protocol import PromptStyle, Protocol
from stepcredit.rollout import Question, Rollout
from stepcredit.tokens import decode
from stepcredit.train.engine.cache import SlotCache, attention_mask
from stepcredit.train.engine.sampling import Sampling, Uniforms, draw
from stepcredit.train.engine.transcript import Transcript

#: Tokens that are decoded to see whether a tag has just closed; a tag spelt byte by byte fits.
_TAIL = 24


@dataclass(slots=True)
class _Row:
    """One rollout under way. `length` tokens are in the cache, `pending` are known but not forwarded yet."""

    index: int
    group: int
    transcript: Transcript
    length: int
    pending: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of the turn under way
    logprobs: list[float] = field(default_factory=list)
    sampled: int = 0
    faults: int = 0
    forced: bool = False
    full: bool = False  # the context is spent
    rollout: Rollout | None = None


class HFEngine:
    """Samples rollouts from a causal language model.

    Turns are synchronous: all rollouts of a batch decode until each has closed its tag or spent its budget, then one
    retriever call answers all of them, then one padded forward reads the replies into the same cache. The prompt of a
    group is forwarded once, and no token is ever forwarded twice.

    `Rollout.finish` is one of

    * "answered": the rollout, or the last episode of one with several, ended with a closed answer;
    * "unclosed": it ended without one (a turn that spends its budget or samples an end-of-sequence token is an
      invalid turn, which the environment may answer);
    * "context": the next token, or the environment's reply, would not fit the model's context; what was generated
      is kept.

    Args:
        model: a causal LM with a KV cache (full or sliding-window attention). It runs in eval mode without
            gradients, in its own dtype, on its own device; its training flags are restored.
        tokenizer: must not have ids beyond the model's embedding.
        protocol: the tag grammar.
        prompt_style: see `Protocol.prompt`.
        max_batch: rollouts decoded at once. A group is never split, so a batch holds at least one group.

    Attributes:
        tokens_forwarded: tokens run through the model since construction, padding not counted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        *,
        prompt_style: PromptStyle = "plain",
        max_batch: int = 64,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        config = model.config.get_text_config()
        rows = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
        vocabulary = tokenizer.get_vocab()
        if max(vocabulary.values()) >= rows:
            raise ValueError(
                f"vocabulary mismatch: tokenizer has ids up to {max(vocabulary.values())}, "
                f"the model embeds only ids below {rows}"
            )
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ValueError(f"model has layers of type {sorted(kinds)}, whose state is not a KV cache of all tokens")
        self.model = model
        self.tokenizer = tokenizer
        self.protocol = protocol
        self.prompt_style: PromptStyle = prompt_style
        self.max_batch = max_batch
        self.max_context = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
        self.tokens_forwarded = 0
        self._config = config
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # Only these tokens can close a tag; byte-level, byte-fallback and WordPiece spellings of ">" are among them.
        self._closers = {i for token, i in vocabulary.items() if ">" in token}

    def rollout(
        self,
        questions: Sequence[Question],
        environment: Environment,
        sampling: Sampling,
        *,
        group_size: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Sample `group_size` rollouts of every question.

        Args:
            questions: Q questions.
            environment: answers the turns; its protocol must be the engine's.
            sampling: how; the same seed gives the same rollouts.
            group_size: rollouts per question.
            progress: called with the number of rollouts that have just finished.

        Returns:
            Q * group_size rollouts, question by question, `group` 0 to Q - 1.

        Raises:
            ValueError: a prompt does not fit the context, or protocols differ.
            FloatingPointError: the logits of a rollout hold NaN or infinity.
        """
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        if environment.protocol != self.protocol:
            raise ValueError(
                f"environment speaks protocol {environment.protocol.name!r}, the engine {self.protocol.name!r}"
            )
        prompts = [self.protocol.prompt(q, self.tokenizer, self.prompt_style) for q in questions]
        for question, prompt in zip(questions, prompts, strict=True):
            if len(prompt) >= self.max_context:
                raise ValueError(
                    f"question {question.id!r}: its prompt has {len(prompt)} tokens, which leaves nothing of the "
                    f"model's context of {self.max_context}"
                )
        uniforms = None if sampling.greedy else Uniforms(len(questions) * group_size, sampling.seed)
        step = max(1, self.max_batch // group_size)
        rollouts: list[Rollout] = []
        with self._inference():
            for first in range(0, len(questions), step):
                rows = [
                    _Row(g * group_size + i, g, Transcript(questions[g], prompts[g], self.tokenizer, self.protocol), 0)
                    for g in range(first, min(first + step, len(questions)))
                    for i in range(group_size)
                ]
                rollouts += self._batch(rows, environment, sampling, uniforms, group_size, progress)
        return rollouts

    def _batch(
        self,
        rows: list[_Row],
        environment: Environment,
        sampling: Sampling,
        uniforms: Uniforms | None,
        group_size: int,
        progress: Callable[[int], None] | None,
    ) -> list[Rollout]:
        """Run rows to their end. `rows[i]` is row i of the cache throughout; those still running come first."""
        ordered = list(rows)
        cache = SlotCache(len(rows))
        leaders = rows[::group_size]
        for leader in leaders:
            leader.pending = list(leader.transcript.tokens)
        logits = self._forward(cache, leaders)
        cache.repeat(len(leaders), group_size, max(r.length for r in leaders))
        for row in rows:
            row.length = len(row.transcript.tokens)
        logits = logits.repeat_interleave(group_size, 0)
        running = len(rows)
        while running:
            self._turn(cache, rows, running, logits, sampling, uniforms)
            self._respond(rows[:running], environment)
            finished = [i for i in range(running) if rows[i].rollout is not None]
            running = _retire(cache, rows, running, finished)
            if progress is not None and finished:
                progress(len(finished))
            if running:
                logits = self._forward(cache, rows[:running])
        return [row.rollout for row in ordered if row.rollout is not None]

    def _turn(
        self,
        cache: SlotCache,
        rows: list[_Row],
        running: int,
        logits: torch.Tensor,
        sampling: Sampling,
        uniforms: Uniforms | None,
    ) -> None:
        """Decode the first `running` rows until each has ended its turn; rows that have are left out of the batch."""
        for row in rows[:running]:
            row.ids, row.logprobs = [], []
        while True:
            active = rows[:running]
            u = None if uniforms is None else uniforms([r.index for r in active], [r.sampled for r in active])
            tokens, logprobs = draw(logits, sampling, u)
            for row, token, logprob, good in zip(
                active, tokens.tolist(), logprobs.tolist(), torch.isfinite(logprobs).tolist(), strict=True
            ):
                if not good:
                    raise FloatingPointError(
                        f"question {row.transcript.question.id!r}: the model's logits after "
                        f"{row.length} tokens hold NaN or infinity"
                    )
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.pending.append(token)
                row.sampled += 1
            running = _retire(cache, rows, running, [i for i in range(running) if self._ended(rows[i], sampling)])
            if not running:
                return
            logits = self._forward(cache, rows[:running])

    def _ended(self, row: _Row, sampling: Sampling) -> bool:
        """Whether the row's turn is over; marks it full when only the context ended it."""
        token = row.ids[-1]
        if token in self._ends:
            return True
        if token in self._closers and self.protocol.closes(decode(self.tokenizer, row.ids[-_TAIL:]), row.forced):
            return True
        if len(row.transcript.tokens) + len(row.ids) >= self.max_context:
            row.full = True
            return True
        return len(row.ids) >= (sampling.max_answer_tokens if row.forced else sampling.max_turn_tokens)

    def _respond(self, rows: list[_Row], environment: Environment) -> None:
        """Record the turns, ask the environment once, and queue its replies or finish the rollouts."""
        turns = [row.transcript.add_policy(row.ids, row.logprobs, row.forced) for row in rows]
        for row in rows:
            if row.full:
                row.rollout = row.transcript.finish("context", None, row.group)
        asking = [(row, turn) for row, turn in zip(rows, turns, strict=True) if not row.full]
        responses = environment.respond(
            [turn for _, turn in asking],
            [row.transcript.searches for row, _ in asking],
            [row.faults for row, _ in asking],
            [row.forced for row, _ in asking],
            episodes=[row.transcript.episodes for row, _ in asking],
            questions=[row.transcript.question for row, _ in asking],
        )
        for (row, turn), response in zip(asking, responses, strict=True):
            row.faults = row.faults + response.fault if response.answer is None else 0
            row.forced = response.forced_answer
            ids = row.transcript.add_response(response, self.max_context - len(row.transcript.tokens))
            if response.done:
                answered = turn.action == "answer"
                reason, answer = ("answered", turn.content) if answered else ("unclosed", None)
                row.rollout = row.transcript.finish(reason, answer, row.group)
            elif ids is None:
                row.rollout = row.transcript.finish("context", None, row.group)
            else:
                row.pending += ids

    def _forward(self, cache: SlotCache, rows: Sequence[_Row]) -> torch.Tensor:
        """Forward every row's pending tokens as the first rows of the cache; logits [n, V] after each row's last."""
        width = max(len(row.pending) for row in rows)
        # Padding comes first, so that every row's last token is in the last column, where the LM head runs. Its slots
        # lie just beyond the row's new length: real tokens will overwrite them before anything may look there.
        ids, slots = [], []
        for row in rows:
            end = row.length + len(row.pending)
            pad = width - len(row.pending)
            ids.append([row.pending[0]] * pad + row.pending)
            slots.append([*range(end, end + pad), *range(row.length, end)])
            row.length = end
            self.tokens_forwarded += len(row.pending)
            row.pending = []
        device = self.model.device
        where = torch.tensor(slots, device=device)
        visible = max(row.length for row in rows)
        cache.begin(where, visible, max(map(max, slots)) + 1)
        output = self.model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=attention_mask(self._config, where, visible, self.model.dtype),
            position_ids=where.clamp(max=self.max_context - 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Eval mode, no autograd, and an attention implementation that takes masks; all restored afterwards."""
        training = {module: module.training for module in self.model.modules()}
        attention = self._config._attn_implementation
        # Soft-capped scores exist only in the eager implementation.
        usable = "eager" if getattr(self._config, "attn_logit_softcapping", None) else "sdpa"
        takes_masks = attention in (usable, "eager")
        self.model.eval()
        try:
            with nullcontext() if takes_masks else running_attention(self.model, usable), torch.inference_mode():
                yield
        finally:
            for module, flag in training.items():
                module.training = flag


def _retire(cache: SlotCache, rows: list[_Row], running: int, finished: list[int]) -> int:
    """Move the finished ones of the first `running` rows behind the others; returns how many still run."""
    for i in reversed(finished):
        running -= 1
        if i != running:
            cache.swap(i, running)
            rows[i], rows[running] = rows[running], rows[i]
    return running
