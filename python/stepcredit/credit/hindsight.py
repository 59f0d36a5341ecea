"""Hindsight blocks of SD-Search: what a group searched for and what came of it, put before each of its rollouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stepcredit.batch import RolloutBatch
from stepcredit.branches.draws import hash_key
from stepcredit.protocol import escape_tags
from stepcredit.rewards import f1
from stepcredit.rollout import Rollout, Span, SpanKind
from stepcredit.scorer import PolicyScorer

BlockKind = Literal["group", "correct_only", "leave_one_out", "single"]
Labels = Literal["true", "shuffled", "none"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What hindsight keeps of a rollout: its queries in order, and whether its answer was right."""

    queries: tuple[str, ...]
    correct: bool


def attempt_of(rollout: Rollout, policy: PolicyScorer, rho: float) -> Attempt:
    """The attempt that a rollout was. An F1 above `rho` is correct; without an answer it is 0."""
    parsed = {search.step: search.query for search in rollout.searches}
    queries = []
    for step in rollout.steps():
        span = rollout.find(SpanKind.QUERY, step)
        assert span is not None
        # Tokens of a query may carry parts of its tags, the text that was parsed does not.
        queries.append(parsed.get(step) or policy.decode(rollout.tokens[span.start : span.stop]))
    return Attempt(tuple(queries), f1(rollout.answer, rollout.question.answers) > rho)


def block_text(attempts: Sequence[Attempt], *, labelled: bool) -> str:
    """The block of some attempts (the wording is ours); "" for none. Queries are data: one line each, tags escaped."""
    if not attempts:
        return ""
    lines = ["Attempts at this question:"]
    for number, attempt in enumerate(attempts, 1):
        outcome = (": correct" if attempt.correct else ": incorrect") if labelled else ""
        lines.append(f"Attempt {number}{outcome}")
        for query in attempt.queries:
            parts = (" ".join(line.split()) for line in query.splitlines())
            lines.append(f"<search>{escape_tags('; '.join(filter(None, parts)))}</search>")
    return "\n".join([*lines, "Next attempt:", ""])


def hindsight_texts(
    rollouts: Sequence[Rollout],
    groups: Sequence[int],
    attempts: Sequence[Attempt],
    *,
    block: BlockKind,
    labels: Labels,
    seed: int,
    step: int,
) -> list[str]:
    """The block of each rollout, "" where nothing of its group is to be shown.

    Args:
        rollouts: B.
        groups: B group indices.
        attempts: theirs.
        block: "group" shows every attempt of the group, the rollout's own too; "correct_only" those that are correct;
            "leave_one_out" all but the rollout's own; "single" its own alone.
        labels: "true"; "shuffled" deals the group's outcomes out among its attempts anew, which also decides what is
            correct; "none" shows no outcome.
        seed, step: of that deal, with the question's id and the number of its group.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for b, group in enumerate(groups):
        members[group].append(b)
    texts = [""] * len(rollouts)
    for group, mine in members.items():
        shown = [attempts[b] for b in mine]
        if labels == "shuffled":
            key = (seed, step, rollouts[mine[0]].question.id, group)
            dealt = sorted(range(len(mine)), key=lambda j: hash_key(*key, j))
            shown = [replace(one, correct=attempts[mine[j]].correct) for one, j in zip(shown, dealt, strict=True)]
        for at, b in enumerate(mine):
            chosen = {
                "group": shown,
                "correct_only": [one for one in shown if one.correct],
                "leave_one_out": shown[:at] + shown[at + 1 :],
                "single": shown[at : at + 1],
            }[block]
            texts[b] = block_text(chosen, labelled=labels != "none")
    return texts


def with_block(rollout: Rollout, block: Sequence[int]) -> Rollout:
    """The rollout with these tokens at the end of its prompt; all that follows moves up by their number."""
    at, size = rollout.prompt_length, len(block)
    moved = (replace(span, start=span.start + size, stop=span.stop + size) for span in rollout.spans[1:])
    return replace(
        rollout,
        tokens=[*rollout.tokens[:at], *block, *rollout.tokens[at:]],
        prompt_length=at + size,
        spans=[Span(SpanKind.PROMPT, 0, at + size), *moved],
        logprobs=[*rollout.logprobs[:at], *[float("nan")] * size, *rollout.logprobs[at:]],
        episodes=[replace(episode, stop=episode.stop + size) for episode in rollout.episodes],
    )


def with_blocks(
    batch: RolloutBatch, texts: Sequence[str], teacher: PolicyScorer
) -> tuple[RolloutBatch, list[list[int]]]:
    """What a teacher is shown: the rollouts of a batch, each with its text at the end of its prompt, and the tokens of
    the texts in the teacher's vocabulary. The policy's tokens are the same ones in the same order."""
    tokens = {text: teacher.encode(text) for text in set(texts)}
    blocks = [tokens[text] for text in texts]
    shown = [with_block(rollout, block) for rollout, block in zip(batch.rollouts, blocks, strict=True)]
    return RolloutBatch.pack(shown, batch.tokens.device), blocks
