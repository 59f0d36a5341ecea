"""Rollouts as other trainers hold them: token ids, and a mask that says which of them the policy wrote.

Nothing is tokenised again: spans are read from the ids and the mask, so that credit lands on the tokens that were
sampled. Trainers hold responses padded, as [B, L]; `pack_padded` takes them from there, and `spread` takes what was
computed for packed tokens back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase

from stepcredit.batch import RolloutBatch
from stepcredit.logs import message_passages
from stepcredit.protocol import Protocol, get_protocol
from stepcredit.rollout import Question, Rollout, Search, SpanKind
from stepcredit.tokens import decode, encode
from stepcredit.train.engine.transcript import Transcript
from stepcredit.turn import Turn

OP = "pack_padded"


def rollout_from_tokens(
    question: Question,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    by_policy: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol | str,
    *,
    logprobs: Sequence[float] | None = None,
    group: int = 0,
) -> Rollout:
    """A rollout from its tokens and a mask of who wrote them.

    Each run of the policy's tokens is a turn, each run between them a message of the environment. A message after a
    search answers it: with passages (`Protocol.shows_documents`), or with a notice, as when retrieval failed. Passages
    that no search asked for belong to no step ("unasked_documents"); a last search that nothing answered gets no credit
    ("unanswered_searches").

    Args:
        question: what was asked, with its gold answers.
        prompt_ids: token ids of the prompt, at least one.
        response_ids: all that follows, without padding.
        by_policy: for each of `response_ids`, whether the policy wrote it.
        tokenizer: the policy's.
        protocol: tag grammar of the response, or its name.
        logprobs: for each of `response_ids`, the log-prob under which it was sampled, nats; read where the policy
            wrote. None: not known, which credit does not need.
        group: index of the group of rollouts that share the question.

    Returns:
        A rollout that ended "answered" or "unclosed", with `rewards["total"]` NaN. Each message counts as one passage,
        whose id is a hash of its text. Unknown log-probs are 0.0, their number being `counts["unknown_logprobs"]`.

    Raises:
        ValueError: lengths differ, no prompt, an unknown protocol, or a log-prob of the policy that is not finite.
    """
    grammar = get_protocol(protocol) if isinstance(protocol, str) else protocol
    known = [0.0] * len(response_ids) if logprobs is None else logprobs
    for name, column in (("by_policy", by_policy), ("logprobs", known)):
        if len(column) != len(response_ids):
            raise ValueError(
                f"question {question.id!r}: {name} has {len(column)} entries for {len(response_ids)} response_ids"
            )
    transcript = Transcript(question, prompt_ids, tokenizer, grammar)
    opener = encode(tokenizer, grammar.answer_opener)
    asked: Turn | None = None
    answer: str | None = None
    forced, at = False, 0
    for mine, run in groupby(map(bool, by_policy)):
        ids = list(response_ids[at : at + len(list(run))])
        stop = at + len(ids)
        if mine:
            turn = transcript.add_policy(ids, list(known[at:stop]), forced)
            asked = turn if turn.action == "search" and turn.content else None
            answer = turn.content if turn.action == "answer" else answer
        else:
            text = decode(tokenizer, ids)
            kind = SpanKind.DOCUMENTS if grammar.shows_documents(text) else SpanKind.NOTICE
            search = None
            if asked is not None:
                shown = message_passages(text, grammar) if kind is SpanKind.DOCUMENTS else ()
                failed = kind is SpanKind.NOTICE
                search = Search(len(transcript.searches), asked.query, shown, failed, asked.queries)
            elif kind is SpanKind.DOCUMENTS:
                transcript.counts["unasked_documents"] += 1
            # An opener is not part of the passages that other passages stand in for.
            cut = len(ids) - len(opener) if ids[-len(opener) :] == opener else len(ids)
            transcript.add_environment_tokens(ids[:cut], kind, search)
            transcript.add_environment_tokens(ids[cut:], SpanKind.NOTICE)
            forced, asked = text.rstrip().endswith(grammar.answer_opener), None
        at = stop
    if asked is not None:
        transcript.counts["unanswered_searches"] += 1
    if logprobs is None and (count := sum(map(bool, by_policy))):
        transcript.counts["unknown_logprobs"] += count
    rollout = transcript.finish("unclosed" if answer is None else "answered", answer, group)
    rollout.rewards["total"] = float("nan")
    return rollout


def pack_padded(
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    responses: torch.Tensor,
    attention: torch.Tensor,
    policy_mask: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol | str,
    *,
    groups: Sequence[int],
    logprobs: torch.Tensor | None = None,
) -> RolloutBatch:
    """A batch of padded responses, packed, on their device.

    Args:
        questions: B questions; rollouts of one id answer the same one.
        prompts: B prompts, token ids without padding.
        responses: int64 [B, L], token ids.
        attention: bool or 0/1 [B, L], which of them are not padding.
        policy_mask: bool or 0/1 [B, L], which of them the policy wrote; 0 on padding.
        tokenizer: the policy's.
        protocol: tag grammar of the responses, or its name.
        groups: B indices of groups.
        logprobs: float [B, L], nats, under which the policy's tokens were sampled.

    Returns:
        RolloutBatch; `rewards` are NaN.

    Raises:
        ValueError: a shape is wrong, the policy wrote padding, or what `rollout_from_tokens` raises; names the rollout.
        RuntimeError: a method of the protocol, which may be a user's, raised anything else; names the rollout.
    """
    shape = tuple(responses.shape)
    if len(shape) != 2 or not shape[0]:
        raise ValueError(f"{OP}: responses must be [B, L] with B >= 1, got shape {shape}")
    for name, tensor in (("attention", attention), ("policy_mask", policy_mask), ("logprobs", logprobs)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{OP}: {name} has shape {tuple(tensor.shape)}, responses {shape}")
    for name, column in (("questions", questions), ("prompts", prompts), ("groups", groups)):
        if len(column) != shape[0]:
            raise ValueError(f"{OP}: {name} has {len(column)} entries for {shape[0]} responses")
    real, mine = attention.bool().cpu(), policy_mask.bool().cpu()
    if (stray := (mine & ~real).nonzero()).numel():
        row, column = stray[0].tolist()
        raise ValueError(f"{OP}: policy_mask is set at [{row}, {column}], where attention says padding")
    ids, known = responses.cpu(), None if logprobs is None else logprobs.float().cpu()
    rollouts = []
    for b in range(shape[0]):
        try:
            rollout = rollout_from_tokens(
                questions[b],
                prompts[b],
                ids[b, real[b]].tolist(),
                mine[b, real[b]].tolist(),
                tokenizer,
                protocol,
                logprobs=None if known is None else known[b, real[b]].tolist(),
                group=groups[b],
            )
        except Exception as error:  # a protocol may be a user's
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"{OP}: rollout {b} of question {questions[b].id!r}: {error!r}") from error
        rollouts.append(rollout)
    return RolloutBatch.pack(rollouts, responses.device)


def spread(batch: RolloutBatch, values: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """What was computed for a batch of `pack_padded`, where its responses lie.

    Args:
        batch: of T tokens.
        values: [T], one a packed token.
        attention: bool or 0/1 [B, L], as `pack_padded` was given it.

    Returns:
        [B, L], dtype and device of `values`; 0 on padding.

    Raises:
        ValueError: `values` is not one a token, or `attention` does not fit the batch.
    """
    if values.shape != batch.tokens.shape:
        raise ValueError(f"spread: values has shape {tuple(values.shape)}, expected {tuple(batch.tokens.shape)}")
    response = torch.ones_like(batch.policy_mask)
    for start, rollout in zip(batch.cu_seqlens.tolist(), batch.rollouts, strict=False):
        response[start : start + rollout.prompt_length] = False
    real = attention.bool().to(values.device)
    lengths = [len(rollout.tokens) - rollout.prompt_length for rollout in batch.rollouts]
    if real.sum(1).tolist() != lengths:
        raise ValueError(f"spread: attention has {real.sum(1).tolist()} tokens a row, the responses {lengths}")
    out = values.new_zeros(real.shape)
    out[real] = values[response.to(values.device)]
    return out
