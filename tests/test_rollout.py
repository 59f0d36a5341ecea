from __future__ import annotations

import math

import pytest
import torch

from stepcredit import Question, Rollout, RolloutBatch, Span, SpanKind

K = SpanKind
NAN = math.nan


def rollout(group=0, reward=1.0, steps=1, **change) -> Rollout:
    """Prompt of 2 tokens, then per step: tag, two query tokens, tag, three document tokens; then a one-token answer."""
    spans = [Span(K.PROMPT, 0, 2)]
    for step in range(steps):
        at = spans[-1].stop
        spans += [
            Span(K.TAG, at, at + 1),
            Span(K.QUERY, at + 1, at + 3, step),
            Span(K.TAG, at + 3, at + 4),
            Span(K.DOCUMENTS, at + 4, at + 7, step),
        ]
    spans.append(Span(K.ANSWER, spans[-1].stop, spans[-1].stop + 1))
    fields = dict(
        question=Question("q", "Who?", ("Ada",)),
        tokens=list(range(spans[-1].stop)),
        prompt_length=2,
        spans=spans,
        logprobs=[-0.5 if s.by_policy else NAN for s in spans for _ in range(s.stop - s.start)],
        group=group,
        rewards={"total": reward},
    )
    return Rollout(**{**fields, **change})


def test_pack():
    batch = RolloutBatch.pack([rollout(7, 1.0, steps=2), rollout(3, 0.0, steps=0), rollout(7, 0.5)])
    assert len(batch) == 3
    assert batch.num_steps == 3
    assert batch.cu_seqlens.tolist() == [0, 17, 20, 30]
    assert batch.groups.tolist() == [0, 1, 0]
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5]
    assert batch.step_rollout.tolist() == [0, 0, 2]
    assert batch.step_index.tolist() == [0, 1, 0]
    assert (batch.step_ids == 0).nonzero().flatten().tolist() == [3, 4]
    assert (batch.step_ids == 1).nonzero().flatten().tolist() == [10, 11]
    assert (batch.step_ids == 2).nonzero().flatten().tolist() == [23, 24]
    assert batch.policy_mask[batch.step_ids >= 0].all()
    assert not batch.policy_mask[6:9].any()  # the documents
    assert batch.sampling_logprobs.isfinite().all()
    assert batch.padded(batch.tokens, -1).tolist()[1] == [0, 1, 2] + [-1] * 14


def test_padded_refuses_another_shape():
    with pytest.raises(ValueError, match=r"packed has shape \(3,\), expected \(10,\)"):
        RolloutBatch.pack([rollout(steps=1)]).padded(torch.zeros(3))


def test_empty_batch():
    with pytest.raises(ValueError, match="nothing to pack"):
        RolloutBatch.pack([])


def test_unrewarded_rollout():
    with pytest.raises(ValueError, match="has no reward 'total'"):
        RolloutBatch.pack([rollout(rewards={"f1": 1.0})])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [NAN]}, "logprobs has 1 entries for 3 tokens"),
        ({"prompt_length": 0}, r"prompt_length 0 not in \[1, 3\]"),
        ({"spans": [Span(K.PROMPT, 0, 2)]}, "spans end at 2, tokens at 3"),
        ({"spans": [Span(K.PROMPT, 0, 2), Span(K.ANSWER, 2, 2)]}, "must tile"),
        ({"spans": [Span(K.ANSWER, 0, 3)], "logprobs": [-1.0] * 3}, "first span must be PROMPT"),
        ({"logprobs": [NAN] * 3}, "log-prob of policy token 2 is nan"),
    ],
)
def test_invalid_rollouts(change, message):
    with pytest.raises(ValueError, match=message):
        rollout(steps=0, **change)


@pytest.mark.parametrize("answers", [(), ("",), ("Ada", " ")])
def test_question_without_gold_answer(answers):
    with pytest.raises(ValueError, match="question 'x': answers must hold at least one non-empty gold answer"):
        Question("x", "Who?", answers)


def test_question_without_text():
    with pytest.raises(ValueError, match="question 'x': text is empty"):
        Question("x", "  ", ("a",))
