"""From a line of a log to a `Rollout`, and from its gains to a line of the output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepcredit.counterfactual import StepGains
from stepcredit.logs import prompt_name, rollout_from_text
from stepcredit.padded import rollout_from_tokens
from stepcredit.rollout import Question, Rollout, Span, SpanKind
from stepcredit.score.records import Record
from stepcredit.scorer import PolicyScorer

#: Many readers take these for ends of lines; in JSON they can only stand in strings.
_SEPARATORS = {ord(separator): f"\\u{ord(separator):04x}" for separator in "\x85\u2028\u2029"}


def to_rollout(record: Record, policy: PolicyScorer) -> Rollout:
    """The rollout of a line: its text read by `logs.rollout_from_text`, its mask by `padded.rollout_from_tokens`, its
    spans as they are. A line without a question id has that of its prompt (`logs.prompt_name`).

    Raises:
        ValueError: a token is not in the model's vocabulary, or a prompt has no tokens; names file, line and rollout.
    """
    tokenizer, protocol = policy.tokenizer, policy.protocol
    prompt, response = record.prompt, record.response
    if isinstance(prompt, str) and isinstance(response, str):
        name = record.question_id or prompt_name(prompt)
        try:
            return rollout_from_text(Question(name, name, record.golds), prompt, response, tokenizer, protocol)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from error
    prompt_ids, response_ids = list(map(int, prompt)), list(map(int, response))
    vocabulary = policy.model.get_output_embeddings().weight.shape[0]
    for field, ids in (("prompt_ids", prompt_ids), ("response_ids", response_ids)):
        if (highest := max(ids, default=0)) >= vocabulary:
            raise ValueError(
                f"{record.where}: field {field!r} holds {highest}, but the model's vocabulary is {vocabulary}"
            )
    name = record.question_id or prompt_name(" ".join(map(str, prompt_ids)))
    question = Question(name, name, record.golds)
    if record.policy_mask is not None:
        return rollout_from_tokens(question, prompt_ids, response_ids, record.policy_mask, tokenizer, protocol)
    n = len(prompt_ids)
    spans = [Span(s.kind, n + s.start, n + s.stop, s.step) for s in record.spans or ()]
    logprobs = [float("nan")] * n
    for span in spans:
        logprobs += [0.0 if span.by_policy else float("nan")] * (span.stop - span.start)
    return Rollout(
        question=question,
        tokens=prompt_ids + response_ids,
        prompt_length=n,
        spans=[Span(SpanKind.PROMPT, 0, n), *spans],
        logprobs=logprobs,
        rewards={"total": float("nan")},
    )


def output_lines(
    records: Sequence[Record], rollouts: Sequence[Rollout], gains: StepGains, policy: PolicyScorer
) -> list[str]:
    """A line of JSON for every rollout of a window, in order (`schemas/gains.schema.json`)."""
    steps: list[list[dict[str, Any]]] = [[] for _ in records]
    columns = {name: _shortest(getattr(gains, name)) for name in ("gain", "real", "baseline", "counterfactual")}
    for s, (b, t) in enumerate(zip(gains.rollout.tolist(), gains.step.tolist(), strict=True)):
        rollout, query = rollouts[b], _query(rollouts[b], t)
        text = policy.decode([i for a, z in query for i in rollout.tokens[a:z]]).strip()
        step: dict[str, Any] = {"step": t, "query": text}
        if not isinstance(records[b].response, str):
            step["query_tokens"] = [[a - rollout.prompt_length, z - rollout.prompt_length] for a, z in query]
        step |= {name: columns[name][s] for name in ("gain", "real", "baseline")}
        step["counterfactual"] = [score for score in columns["counterfactual"][s] if score is not None]
        step["draws"] = [{"id": records[other].id, "step": number} for other, number in gains.draws[s]]
        step["unscored"] = gains.reasons[s]
        steps[b].append(step)
    return [
        json.dumps(
            {
                "id": record.id,
                "line": record.line,
                "question_id": rollout.question.id,
                "steps": steps[b],
                "counts": {name: n for name, n in rollout.counts.items() if name != "unknown_logprobs"},
                **record.passed,
            },
            ensure_ascii=False,
            allow_nan=False,
        ).translate(_SEPARATORS)
        for b, (record, rollout) in enumerate(zip(records, rollouts, strict=True))
    ]


def _query(rollout: Rollout, step: int) -> list[tuple[int, int]]:
    return [(s.start, s.stop) for s in rollout.spans if s.kind is SpanKind.QUERY and s.step == step]


def _shortest(values: Any) -> list[Any]:
    """Float32 as the shortest decimals that give it back; None for NaN, which JSON does not have."""
    array = values.cpu().numpy().astype(np.float32)
    if array.ndim > 1:
        return [_shortest(row) for row in values]
    return [None if np.isnan(value) else float(str(value)) for value in array]
