"""Rollouts made of turns, without text or a policy, and gains made up for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from stepcredit.batch import RolloutBatch
from stepcredit.counterfactual import StepGains
from stepcredit.rollout import Question, Rollout, Search, Span, SpanKind

PROMPT = (1, 2, 3)


@dataclass(frozen=True)
class Turn:
    """A turn that searches (`query` tokens), and the message after it; without a query it was invalid. The last turn of
    a rollout has no message: it answers, or it searched in vain."""

    query: int = 2
    message: tuple[int, ...] | None = (7, 8)
    passages: tuple[str, ...] = ("p",)
    failed: bool = False


ANSWER = Turn(0, None)


def rollout(turns: Sequence[Turn], *, reward: float = 0.0, group: int = 0, supporting: tuple[str, ...] = ()) -> Rollout:
    """A rollout of these turns. Its prompt is the group's."""
    tokens = [*PROMPT, 100 + group]
    spans = [Span(SpanKind.PROMPT, 0, len(tokens))]
    searches: list[Search] = []

    def add(kind: SpanKind, ids: Sequence[int], step: int = -1) -> None:
        if ids:
            spans.append(Span(kind, len(tokens), len(tokens) + len(ids), step))
            tokens.extend(ids)

    for turn in turns:
        add(SpanKind.THINK, [20])
        if turn.query:
            step = len(searches)
            add(SpanKind.TAG, [21])
            add(SpanKind.QUERY, [22] * turn.query, step)
            add(SpanKind.TAG, [23])
            searches.append(Search(step, "query", () if turn.failed else turn.passages, turn.failed))
            add(SpanKind.NOTICE if turn.failed else SpanKind.DOCUMENTS, turn.message or (), step)
        else:
            add(SpanKind.ANSWER, [24, 25])
            add(SpanKind.NOTICE, turn.message or ())
    policy = {i for span in spans if span.by_policy for i in range(span.start, span.stop)}
    return Rollout(
        question=Question(f"q{group}", "?", ("gold",), supporting),
        tokens=tokens,
        prompt_length=4,
        spans=spans,
        logprobs=[-1.0 if i in policy else math.nan for i in range(len(tokens))],
        group=group,
        searches=searches,
        rewards={"total": reward},
    )


def gains_of(
    batch: RolloutBatch,
    gain: Sequence[float],
    *,
    real: Sequence[float] | None = None,
    scores: Sequence[Sequence[Sequence[float]]] | None = None,
) -> StepGains:
    """What `score_steps` would give with these gains; NaN is an unscored step."""
    values = torch.tensor(gain, dtype=torch.float32)
    above = torch.zeros_like(values) if real is None else torch.tensor(real)
    scored = ~values.isnan()
    table = torch.stack([above, above - values], 1)[:, None] if scores is None else torch.tensor(scores)
    return StepGains(
        rollout=batch.step_rollout,
        step=batch.step_index,
        gain=values,
        real=torch.where(scored, above, math.nan),
        baseline=above - values,
        scored=scored,
        counterfactual=(above - values)[:, None],
        scores=table,
        draws=((),) * len(gain),
        reasons=tuple(None if good else "no_documents" for good in scored.tolist()),
        counts={"steps": len(gain), "scored": int(scored.sum())},
        tokens_forwarded={"trunk": 1, "real": 1, "counterfactual": 1},
        seconds=0.1,
    )


def by_turn(batch: RolloutBatch, advantages: torch.Tensor) -> list[list[float]]:
    """The advantage of each turn of each rollout, which all its tokens must share; others must be 0."""
    assert not advantages[~batch.policy_mask].any()
    found = []
    for b, one in enumerate(batch.rollouts):
        mine = advantages[int(batch.cu_seqlens[b]) : int(batch.cu_seqlens[b + 1])]
        runs: list[list[float]] = []
        before = False
        for span in one.spans:
            if span.by_policy and not before:
                runs.append([])
            if span.by_policy:
                runs[-1] += mine[span.start : span.stop].tolist()
            before = span.by_policy
        assert all(len(set(run)) == 1 for run in runs)
        found.append([run[0] for run in runs])
    return found


def shuffled(batch: RolloutBatch, order: Sequence[int]) -> RolloutBatch:
    """The same rollouts in another order."""
    return RolloutBatch.pack([batch.rollouts[b] for b in order])


def pieces(batch: RolloutBatch, values: torch.Tensor) -> list[torch.Tensor]:
    """Values of tokens [T], rollout by rollout."""
    return list(values.split(batch.cu_seqlens.diff().tolist()))


#: Messages that repeat now and then, and are now and then nearly the same.
MESSAGES = st.sampled_from([(7, 8), (7, 8, 9), (10, 11, 12), tuple(range(30, 50)), tuple(range(31, 51))])
TURNS = st.builds(
    Turn,
    query=st.integers(0, 3),
    message=MESSAGES,
    passages=st.lists(st.sampled_from("abcd"), max_size=3).map(tuple),
    failed=st.booleans(),
)


@st.composite
def batches(draw: st.DrawFn) -> RolloutBatch:
    """Ragged batches: groups of one and more in any order, rollouts with and without searches."""
    made = []
    for _ in range(draw(st.integers(1, 6))):
        last = draw(st.sampled_from([ANSWER, Turn(2, None)]))
        turns = [*draw(st.lists(TURNS, max_size=3)), last]
        reward = draw(st.sampled_from([0.0, 0.0, 1.0, 0.3]))
        group = draw(st.integers(0, 2))
        made.append(rollout(turns, reward=reward, group=group, supporting=("a", "b")[: draw(st.integers(0, 2))]))
    return RolloutBatch.pack(made)
