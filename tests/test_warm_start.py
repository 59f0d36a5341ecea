from __future__ import annotations

import pytest
import torch

from stepcredit.batch import RolloutBatch
from stepcredit.data.demonstrations import Demonstration
from stepcredit.rollout import Question, SpanKind
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.update import supervised_step
from stepcredit.train.warm_start import play
from tiny_run import gradients, played, same, tiny_parts

QUESTION = Question("q", "Where is it?", ("in Peru",), plan=("Lima", "Peru"))


def demonstration(*queries):
    return Demonstration(QUESTION, "good", queries, "in Peru")


def spans(rollout, parts):
    return [(s.kind.value, s.step, parts.tokenizer.decode(rollout.tokens[s.start : s.stop])) for s in rollout.spans]


def test_a_demonstration_searches_and_answers():
    parts = tiny_parts(max_searches=3)
    (rollout,) = play([demonstration("Lima")], parts.environment, parts.tokenizer)
    assert (rollout.finish, rollout.answer) == ("answered", "in Peru")
    assert [s.query for s in rollout.searches] == ["Lima"]
    kinds = [(kind, step) for kind, step, _ in spans(rollout, parts)]
    assert kinds == [
        ("prompt", -1),
        ("tag", -1),
        ("query", 0),
        ("tag", -1),
        ("documents", 0),
        ("tag", -1),
        ("answer", -1),
        ("tag", -1),
    ]
    texts = {kind: text for kind, _, text in spans(rollout, parts)}
    assert texts["query"].strip() == "Lima"
    assert texts["answer"].strip() == "in Peru"
    assert "Lima" in texts["documents"]


def test_the_last_search_forces_the_answer_and_later_queries_are_left_out():
    parts = tiny_parts(max_searches=2)
    short, long = play(
        [demonstration("Lima", "Peru"), demonstration("Lima", "Peru", "Chile")], parts.environment, parts.tokenizer
    )
    for rollout in (short, long):
        assert rollout.finish == "answered"
        assert rollout.answer == "in Peru"
        assert rollout.counts["forced_answers"] == 1
        assert len(rollout.searches) == 2
        notice = rollout.find(SpanKind.NOTICE, -1)
        assert parts.tokenizer.decode(rollout.tokens[notice.start : notice.stop]) == "<answer>"
    assert short.tokens == long.tokens


def test_demonstrations_run_side_by_side_with_one_retrieval_a_turn():
    parts = tiny_parts(max_searches=3)
    calls = []
    search = parts.retriever.search
    parts.retriever.search = lambda queries, k: calls.append(list(queries)) or search(queries, k)
    play([demonstration("Lima"), demonstration("Peru", "Lima")], parts.environment, parts.tokenizer)
    assert calls == [["Lima", "Peru"], ["Lima"]]


def test_a_context_that_is_too_short_ends_the_rollout():
    parts = tiny_parts()
    (rollout,) = play([demonstration("Lima")], parts.environment, parts.tokenizer, max_context=40)
    assert rollout.finish == "context"
    assert rollout.answer is None


def test_only_what_the_policy_wrote_is_learned():
    """The loss is the mean over policy tokens of plain log-softmax, so environment tokens are never targets."""
    parts = tiny_parts()
    batch = played(parts)
    metrics = supervised_step(parts.model, parts.optimizer, batch, learning_rate=0.0, max_tokens=512)
    losses = []
    for rollout in batch.rollouts:
        with torch.no_grad():
            logits = parts.model(torch.tensor([rollout.tokens])).logits[0]
        logp = logits.log_softmax(-1)
        losses += [
            -float(logp[i - 1, rollout.tokens[i]]) for s in rollout.spans if s.by_policy for i in range(s.start, s.stop)
        ]
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_gradients_do_not_depend_on_micro_batches():
    results = []
    for max_tokens in (1, 300, 100_000):
        parts = tiny_parts()
        optimizer = parts.optimizer
        optimizer.step = lambda rate, o=optimizer: results.append(gradients(o)) or 0.0
        supervised_step(parts.model, optimizer, played(parts), learning_rate=0.0, max_tokens=max_tokens)
    for other in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_supervised_steps_lower_the_loss():
    parts = tiny_parts()
    batch = played(parts, 4)
    losses = [
        supervised_step(parts.model, parts.optimizer, batch, learning_rate=1e-2, max_tokens=2048)["loss"]
        for _ in range(8)
    ]
    assert losses[-1] < 0.7 * losses[0]


def test_small_updates_survive_bfloat16():
    """Steps far below the resolution of bfloat16 add up in the float32 masters and reach the model."""
    parts = tiny_parts(torch.bfloat16)
    batch = played(parts, 2)
    before = {n: p.detach().clone() for n, p in parts.model.named_parameters()}
    for _ in range(6):
        supervised_step(parts.model, parts.optimizer, batch, learning_rate=1e-5, max_tokens=2048)
    master = parts.optimizer.masters["model.norm.weight"]
    moved = (master.detach() - 1).abs().max()
    assert 2e-5 < moved < 1e-4
    assert torch.equal(parts.model.model.norm.weight, before["model.norm.weight"])  # rounds to 1
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in parts.model.parameters())
    for name, parameter in parts.optimizer.parameters.items():
        assert torch.equal(parameter, parts.optimizer.masters[name].to(torch.bfloat16))


def test_tied_embeddings_have_one_master_and_the_gradient_of_both_uses():
    parts = tiny_parts()
    assert "lm_head.weight" not in parts.optimizer.masters
    batch = played(parts, 2)
    parts.optimizer.step = lambda rate: 0.0
    supervised_step(parts.model, parts.optimizer, batch, learning_rate=0.0, max_tokens=2048)
    tied = parts.optimizer.masters["model.embed_tokens.weight"].grad
    expected = torch.zeros_like(tied)
    weight = parts.model.model.embed_tokens.weight
    for part in range(len(batch)):
        one = RolloutBatch.pack([batch.rollouts[part]])
        logits = parts.model(one.tokens[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, one.tokens[1:], reduction="none")[one.policy_mask[1:]].sum()
        (gradient,) = torch.autograd.grad(loss / int(batch.policy_mask.sum()), weight)
        expected += gradient
    torch.testing.assert_close(tied, expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_and_a_bad_one_changes_nothing():
    parts = tiny_parts()
    optimizer = MasterAdamW(tiny_parts().model, max_grad_norm=0.5)
    master = next(iter(optimizer.masters.values()))
    before = {name: m.detach().clone() for name, m in optimizer.masters.items()}
    master.grad = torch.ones_like(master)
    seen = []
    optimizer.adamw.step = lambda: seen.append(float(master.grad.norm()))
    assert optimizer.step(1e-3) == pytest.approx(master.numel() ** 0.5)
    assert seen == [pytest.approx(0.5)]
    master.grad = torch.full_like(master, float("nan"))
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        optimizer.step(1e-3)
    assert same(before, {name: m.detach() for name, m in optimizer.masters.items()})
    assert optimizer.step(1e-3) == 0.0  # the bad gradient is gone
    with pytest.raises(ValueError, match="nothing to train"):
        MasterAdamW(parts.model.requires_grad_(False))
