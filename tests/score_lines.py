"""Rollouts as lines of a log, in each of its forms."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from scripted_rollouts import write
from stepcredit.protocol import Protocol
from stepcredit.rollout import Question, Rollout
from stepcredit.train.progress import Reporter
from test_logs import text_of
from test_scoring import GOLDS, IDS, REFINE, SEARCHES, TOKENIZER, logs, plain, rollouts

FORMS = ("text", "mask", "spans")


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO()))


def in_tokens(rollout: Rollout, form: str) -> dict[str, Any]:
    """The fields of a rollout in tokens."""
    n, spans = rollout.prompt_length, rollout.spans[1:]
    fields: dict[str, Any] = {"prompt_ids": rollout.tokens[:n], "response_ids": rollout.tokens[n:]}
    if form == "mask":
        return fields | {"policy_mask": [int(s.by_policy) for s in spans for _ in range(s.start, s.stop)]}
    items = [{"kind": s.kind.value, "start": s.start - n, "stop": s.stop - n, "step": s.step} for s in spans]
    return fields | {"spans": [{k: v for k, v in item.items() if v != -1} for item in items]}


def four(form: str, protocol: Protocol = REFINE) -> list[dict[str, Any]]:
    """`test_scoring.rollouts()`."""
    names = [{"id": f"r{i}", "question_id": q, "gold": g} for i, (q, g) in enumerate(zip(IDS, GOLDS, strict=True))]
    texts = [{"prompt": prompt, "response": response} for prompt, response in logs(protocol)]
    bodies = texts if form == "text" else [in_tokens(r, form) for r in rollouts(protocol)]
    return [name | body for name, body in zip(names, bodies, strict=True)]


def many(count: int) -> tuple[list[dict[str, Any]], list[Rollout]]:
    """`count` rollouts of questions asked twice each, as lines in turn of every form, and as they were written."""
    lines, written = [], []
    for i in range(count):
        question = Question(f"q{i // 2}", f"Which river is number {i // 2}?", ("Rhône", "Saône")[i % 2 :])
        searches = [(f"river {i}", f"River number {i} flows through Lyon.", None), *SEARCHES[i % 4][1][:1]]
        searches = plain(searches, REFINE)[: 1 + i % 2]
        written.append(write(TOKENIZER, question, searches))
        line = {"id": f"rollout {i}", "question_id": question.id, "golds": list(question.answers), "group": i // 2}
        text = {"prompt": f"Question: {question.text}\n", "response": text_of(searches, REFINE)}
        form = FORMS[i % 3]
        lines.append(line | (text if form == "text" else in_tokens(written[-1], form)))
    return lines, written
