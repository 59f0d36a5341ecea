"""What the scoring pass shares with the trainer's pass over old log-probs, and what it counts."""

from __future__ import annotations

import pytest
import torch

from scripted_rollouts import REFINE, SEARCH_R1, random_policy
from stepcredit.branches.policy_tokens import score_tokens
from stepcredit.counterfactual import score_steps
from stepcredit.rollout import SpanKind
from stepcredit.scorer import PolicyScorer
from stepcredit.train import update
from stepcredit.train.checkpoint import State
from stepcredit.train.loop import train_step
from stepcredit.train.setup import reference_policy
from test_counterfactual import TOKENIZER, make, steps
from tiny_run import tiny_config, tiny_parts


def separate_logprobs(model, batch, temperature):
    """Log-probs [T] of the policy's tokens, each rollout a forward pass of its own; 0 elsewhere."""
    found = []
    for rollout in batch.rollouts:
        ids = torch.tensor([rollout.tokens])
        with torch.no_grad():
            logp = (model(ids).logits[0, :-1].float() / temperature).log_softmax(-1)
        found.append(torch.cat([torch.zeros(1), logp.gather(1, ids[0, 1:, None])[:, 0]]))
    return torch.cat(found) * batch.policy_mask


@pytest.mark.parametrize("max_tokens", [1, 300])
def test_old_log_probs_do_not_depend_on_the_packing(max_tokens):
    """Down to a tree for each step: the last of a rollout's gives the log-probs of its tokens."""
    batch, policy = make()
    whole = score_steps(batch, policy, temperature=0.7)
    assert len(policy.trees) == 3
    packed = score_steps(batch, policy, temperature=0.7, max_tokens=max_tokens)
    assert len(policy.trees) > 4
    torch.testing.assert_close(packed.gain, whole.gain, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed.logprobs, whole.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed.logprobs, separate_logprobs(policy.model, batch, 0.7), atol=1e-5, rtol=0)


def test_reference_log_probs_are_those_of_separate_forwards():
    batch, _ = make()
    reference = PolicyScorer(random_policy("llama", TOKENIZER, initializer_range=0.2), TOKENIZER, REFINE)
    for max_tokens in (16384, 1):
        found = score_tokens(batch, reference, batch.policy_mask, temperature=0.7, max_tokens=max_tokens)
        torch.testing.assert_close(found, separate_logprobs(reference.model, batch, 0.7), atol=1e-5, rtol=0)


def test_leaves_are_counted_token_by_token():
    """Probe and answer, but for its last token, which is only predicted; further answers hang on the probe; a trunk
    with old log-probs goes on to the end of the rollout."""
    batch, policy = make(protocol=SEARCH_R1)
    one, two = (score_steps(batch, policy, max_variants=n) for n in (1, 2))
    probe = len(TOKENIZER.encode(SEARCH_R1.answer_probe))
    real = counterfactual = more = 0
    for (b, _), draws in zip(steps(batch), one.draws, strict=True):
        first, *others = (len(TOKENIZER.encode(" " + text)) - 1 for text in batch.rollouts[b].question.answers)
        shown = [batch.rollouts[b2].find(SpanKind.DOCUMENTS, t2) for b2, t2 in draws]
        real += probe + first
        counterfactual += sum(span.stop - span.start + probe + first for span in shown)
        more += sum(others)
    assert one.tokens_forwarded["real"] == real
    assert one.tokens_forwarded["counterfactual"] == counterfactual
    assert two.tokens_forwarded["trunk"] == one.tokens_forwarded["trunk"]
    assert two.tokens_forwarded["real"] == real + more
    assert two.tokens_forwarded["counterfactual"] == counterfactual + 3 * more
    folded = score_steps(batch, policy, temperature=1.0)
    assert folded.tokens_forwarded | {"trunk": 0} == one.tokens_forwarded | {"trunk": 0}
    last = {b: rollout.find(SpanKind.DOCUMENTS, rollout.steps()[-1]).stop for b, rollout in enumerate(batch.rollouts)}
    rest = sum(len(rollout.tokens) - 1 - last[b] for b, rollout in enumerate(batch.rollouts))
    assert folded.tokens_forwarded["trunk"] == one.tokens_forwarded["trunk"] + rest


def test_the_trainer_folds_and_says_what_scoring_took(monkeypatch):
    """Several optimizer steps need old log-probs: they come with the scores. The reference's have a packed pass."""
    parts = tiny_parts()
    config = tiny_config("loss.minibatches=2", "loss.kl_coef=0.1")
    reference = reference_policy(config, parts)
    asked = []

    def recorded(batch, policy, *args, **kwargs):
        asked.append(policy)
        return score_tokens(batch, policy, *args, **kwargs)

    monkeypatch.setattr(update, "score_tokens", recorded)
    metrics = train_step(config, parts, State(), 0, reference)
    assert asked == [reference]
    assert metrics["old_logprob_gap"] < 1e-5
    parted = sum(metrics[f"ig/tokens_{part}"] for part in ("trunk", "real", "counterfactual"))
    assert metrics["tokens_credit"] == parted > 0
    assert metrics["ig_seconds_share"] == pytest.approx(metrics["ig/seconds"] / metrics["seconds"], rel=0.1)
    assert 0 < metrics["ig/seconds"] < metrics["seconds_credit"] < metrics["seconds"]
