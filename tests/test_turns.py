from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcredit.batch import RolloutBatch
from stepcredit.credit import SearchR1
from stepcredit.credit.base import group_relative
from stepcredit.credit.turns import Turns, add_step_credit
from stepcredit.rollout import Rollout, Search, Span, SpanKind
from turn_rollouts import ANSWER, Turn, batches, rollout


def test_turns_by_hand():
    # prompt 0-3, turn 4-8 (think, tag, two query tokens, tag), message 9-10, answer 11-13; then 4 + 5 without an end
    batch = RolloutBatch.pack([rollout([Turn(2), ANSWER]), rollout([Turn(2, None)])])
    turns = Turns.of(batch)
    assert len(turns) == 3
    assert turns.ids.tolist() == [-1] * 4 + [0] * 5 + [-1] * 2 + [1] * 3 + [-1] * 4 + [2] * 5
    assert turns.rollout.tolist() == [0, 0, 1]
    assert turns.index.tolist() == [0, 1, 0]
    assert turns.start.tolist() == [4, 11, 18]
    assert turns.stop.tolist() == [9, 14, 23]
    assert turns.of_step.tolist() == [0, 2]
    assert turns.last.tolist() == [1, 2]
    assert turns.outcome(torch.tensor([0.5, 2.0])).tolist() == [0, 0.5, 2]
    assert turns.returns_to_go(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [2, 2, 4]
    assert (
        turns.spread(torch.tensor([1.0, 2.0, 3.0])).tolist()
        == [0] * 4 + [1] * 5 + [0] * 2 + [2] * 3 + [0] * 4 + [3] * 5
    )


def test_a_turn_may_hold_several_searches_and_their_gains_add_up():
    tokens = [1, 2, 3, 4, 5, 6, 7]
    kinds = [SpanKind.PROMPT, SpanKind.QUERY, SpanKind.TAG, SpanKind.QUERY, SpanKind.TAG, SpanKind.DOCUMENTS]
    spans = [Span(kind, i, i + 1, {1: 0, 3: 1, 5: 1}.get(i, -1)) for i, kind in enumerate(kinds)]
    spans.append(Span(SpanKind.ANSWER, 6, 7))
    one = rollout([ANSWER])
    parallel = Rollout(
        question=one.question,
        tokens=tokens,
        prompt_length=1,
        spans=spans,
        logprobs=[-1.0] * 7,
        searches=[Search(0, "a", ()), Search(1, "b", ())],
        rewards={"total": 0.0},
    )
    batch = RolloutBatch.pack([parallel])
    turns = Turns.of(batch)
    assert turns.of_step.tolist() == [0, 0]
    assert turns.gains(torch.tensor([1.0, 2.0])).tolist() == [3, 0]
    assert turns.gains(torch.tensor([math.nan, 2.0])).tolist() == [2, 0]
    options = dict(alpha=2.0, placement="closing")
    credit = add_step_credit(SearchR1(), batch, None, torch.tensor([1.0, 2.0]), **options)
    assert credit.advantages.tolist() == [0, 0, 0, 0, 6, 0, 0]
    assert credit.metrics["advantage/bonus_abs_mean"] == 6


def test_nothing_written_is_no_turn():
    silent = rollout([])
    batch = RolloutBatch.pack([silent, rollout([ANSWER], reward=1.0), silent])
    turns = Turns.of(batch)
    assert turns.last.tolist() == [-1, 0, -1]
    assert turns.outcome(torch.tensor([5.0, 1.0, 5.0])).tolist() == [1]
    alone = RolloutBatch.pack([silent])
    assert len(Turns.of(alone)) == 0
    assert Turns.of(alone).returns_to_go(torch.zeros(0), 1.0).shape == (0,)
    assert Turns.of(alone).spread(torch.zeros(0)).tolist() == [0] * 4


@given(batches(), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_turns_are_those_of_the_spans(batch, gamma):
    turns = Turns.of(batch)
    values = torch.randn(len(turns), dtype=torch.float64)
    number, spread, togo = 0, [], []
    for b, one in enumerate(batch.rollouts):
        first, before = number, False
        for span in one.spans:
            if span.by_policy and not before:
                assert turns.rollout[number] == b
                assert turns.index[number] == number - first
                assert turns.start[number] == int(batch.cu_seqlens[b]) + span.start
                number += 1
            if span.by_policy:
                assert turns.stop[number - 1] >= int(batch.cu_seqlens[b]) + span.stop
            if span.kind is SpanKind.QUERY:
                step = next(
                    s for s in range(batch.num_steps) if (batch.step_rollout[s], batch.step_index[s]) == (b, span.step)
                )
                assert turns.of_step[step] == number - 1
            spread += [number - 1 if span.by_policy else -1] * (span.stop - span.start)
            before = span.by_policy
        togo += [sum(gamma ** (v - u) * float(values[v]) for v in range(u, number)) for u in range(first, number)]
    assert number == len(turns)
    assert turns.ids.tolist() == spread
    assert turns.returns_to_go(values, gamma).tolist() == pytest.approx(togo)
    assert turns.spread(values).tolist() == [0 if u < 0 else float(values[u]) for u in spread]


def test_values_are_normalised_in_groups_of_any_label():
    values = torch.tensor([1.0, 5.0, 3.0, 2.0, 2.0])
    groups = torch.tensor([7, 3, 7, 9, 9])
    options = dict(eps=1e-12, scale="std")
    out = group_relative(values, groups, ddof=0, singleton="zero", **options)
    assert out.tolist() == pytest.approx([-1, 0, 1, 0, 0])
    alone = group_relative(values, groups, ddof=1, singleton="reward", **options)
    assert alone.tolist() == pytest.approx([-(2**-0.5), 5, 2**-0.5, 0, 0])
    assert group_relative(values[:0], groups[:0], ddof=0, singleton="zero", **options).shape == (0,)
