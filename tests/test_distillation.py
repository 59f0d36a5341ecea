"""Divergences from a teacher, and their part in the policy update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from numerics import check
from stepcredit import reference
from stepcredit.credit import Credit, Distillation, SearchR1
from stepcredit.train.loss import topk_divergence
from stepcredit.train.setup import frozen_copy
from stepcredit.train.update import policy_update
from stepcredit.train.update_config import LossConfig
from tiny_run import gradients, played, tiny_parts

KINDS = ("jsd", "forward_kl", "reverse_kl")
SETTINGS = [(kind, tail) for kind in KINDS for tail in (True, False)]


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def some_logprobs(rows: int = 40, k: int = 7, vocabulary: int = 30, spread: float = 3.0) -> tuple[torch.Tensor, ...]:
    """(student, teacher): log-probs of the teacher's k likeliest tokens, of more and less peaked distributions."""
    scale = torch.linspace(0.1, spread, rows)[:, None]
    student, teacher = (torch.log_softmax(scale * torch.randn(rows, vocabulary), -1) for _ in range(2))
    ids = teacher.topk(k).indices
    return student.gather(-1, ids), teacher.gather(-1, ids)


# Divergences


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "tail", "expected"),
    [
        # With the tail 1/4, 1/2, 1/4 against 1/2, 1/4, 1/4, whose mean is 3/8, 3/8, 1/4.
        ((0.25, 0.5), (0.5, 0.25), "jsd", True, math.log(4 / 3) / 2 + math.log(2 / 3) / 4),
        # Renormalised 1/3, 2/3 against 2/3, 1/3.
        ((0.25, 0.5), (0.5, 0.25), "jsd", False, 2 * math.log(4 / 3) / 3 + math.log(2 / 3) / 3),
        ((0.25, 0.5), (0.5, 0.25), "forward_kl", False, math.log(2) / 3),
        # 0.2, 0.2, 0.6 against 0.7, 0.1, 0.2.
        ((0.2, 0.2), (0.7, 0.1), "forward_kl", True, 0.5878969),
        ((0.2, 0.2), (0.7, 0.1), "reverse_kl", True, 0.5472442),
        # All of the one where the other has nothing.
        ((1e-300, 1 - 1e-9), (1 - 1e-9, 1e-300), "jsd", True, math.log(2)),
    ],
)
def test_divergences_by_hand(student, teacher, kind, tail, expected):
    for function in (topk_divergence, reference.topk_divergence):
        found = function(logs(*student), logs(*teacher), kind, tail=tail)
        assert float(found) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("kind", "tail"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_are_those_of_the_reference(kind, tail, dtype):
    student, teacher = (x.to(dtype) for x in some_logprobs())
    student.requires_grad_()
    found = topk_divergence(student, teacher, kind, tail=tail)
    check(found.detach(), reference.topk_divergence, student.detach(), teacher, kind, tail)
    weights = torch.rand(len(found), dtype=dtype)
    (gradient,) = torch.autograd.grad((weights * found).sum(), student)

    def gold(student, teacher, weights):
        student.requires_grad_()
        return torch.autograd.grad((weights * reference.topk_divergence(student, teacher, kind, tail)).sum(), student)[
            0
        ]

    check(gradient, gold, student.detach().clone(), teacher, weights)


@pytest.mark.parametrize("tail", [True, False])
def test_jsd_lies_between_0_and_log_2(tail):
    for spread in (1.0, 30.0, 300.0):
        found = topk_divergence(*some_logprobs(spread=spread), "jsd", tail=tail)
        assert float(found.min()) >= -1e-7
        assert float(found.max()) <= math.log(2) + 1e-6
    assert float(found.max()) > 0.6


@pytest.mark.parametrize(("kind", "tail"), SETTINGS)
def test_equal_distributions_have_no_divergence_and_no_gradient(kind, tail):
    student, _ = some_logprobs(spread=30.0)
    student.requires_grad_()
    found = topk_divergence(student, student.detach(), kind, tail=tail)
    assert torch.equal(found, torch.zeros_like(found))
    logits = torch.randn(20, 30, requires_grad=True)
    logprobs = logits.log_softmax(-1).gather(-1, logits.topk(7).indices)
    topk_divergence(logprobs, logprobs.detach(), kind, tail=tail).sum().backward()
    assert float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(("kind", "tail"), SETTINGS)
def test_certainty_is_finite_with_its_gradient(kind, tail):
    """Also where the candidates are the whole vocabulary, so that the tail is nothing."""
    logits = torch.tensor([[200.0, 0.0, -200.0], [-200.0, 0.0, 200.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[200.0, 0.0, -200.0]]).expand(3, 3).log_softmax(-1)
    found = topk_divergence(logits.log_softmax(-1), teacher, kind, tail=tail)
    found.sum().backward()
    assert found.isfinite().all()
    assert float(found[0].detach()) == 0
    assert logits.grad.isfinite().all()


# The update


def some_distillation(batch, parts, kind="jsd", tail=True, **changes) -> Distillation:
    """A teacher far from the policy, at the query tokens of all but the first rollout."""
    with torch.no_grad():
        logits = parts.model(batch.padded(batch.tokens).long()).logits
    logp = (logits + 3 * torch.randn_like(logits)).log_softmax(-1)
    rollout = torch.arange(len(batch)).repeat_interleave(batch.cu_seqlens.diff())
    positions = ((batch.step_ids >= 0) & (rollout > 0)).nonzero()[:, 0]
    b = rollout[positions]
    top = logp[b, positions - batch.cu_seqlens[b] - 1].topk(5)
    weights = 1.0 / b.bincount(minlength=len(batch))[b]
    fields = dict(positions=positions, candidates=top.indices, logprobs=top.values, weights=weights)
    options = dict(name="sd", coefficient=0.7, divergence=kind, tail=tail)
    return Distillation(**{**fields, **options, **changes})


def update(credit, loss=None):
    """Gradients of every optimizer step, and the metrics, of one update on the same batch and policy."""
    parts = tiny_parts()
    seen = []
    parts.optimizer.step = lambda rate: seen.append(gradients(parts.optimizer)) or 1.0
    batch = played(parts, 8, group_size=4)
    options = dict(learning_rate=0.0, temperature=1.0)
    metrics = policy_update(parts.scorer, parts.optimizer, batch, credit, loss or LossConfig(), **options)
    return seen, metrics


def credit_of(**options):
    parts = tiny_parts()
    batch = played(parts, 8, group_size=4)
    credit = SearchR1()(batch, parts.scorer)
    return replace(credit, distillation=some_distillation(batch, parts, **options)), batch, parts


@pytest.mark.parametrize(("kind", "tail"), [("jsd", True), ("forward_kl", True), ("reverse_kl", False)])
def test_the_gradient_is_that_of_the_formula(kind, tail):
    """Against a padded forward over everything, full logits, and both losses written out."""
    credit, batch, parts = credit_of(kind=kind, tail=tail)
    (mine,), metrics = update(credit)
    model = frozen_copy(parts.model).requires_grad_()
    ids = batch.padded(batch.tokens).long()
    mask, advantages = batch.padded(batch.policy_mask.float()).bool()[:, 1:], batch.padded(credit.advantages)[:, 1:]
    logp = model(ids).logits[:, :-1].log_softmax(-1)
    own = logp.gather(-1, ids[:, 1:, None])[..., 0]
    policy = (-(own - own.detach()).exp() * advantages * mask).sum() / mask.sum()
    d, total = credit.distillation, 0.0
    for b in range(1, len(batch)):
        here = (d.positions >= batch.cu_seqlens[b]) & (d.positions < batch.cu_seqlens[b + 1])
        rows = d.positions[here] - batch.cu_seqlens[b] - 1
        student = logp[b, rows].gather(-1, d.candidates[here])
        if len(rows):
            total = total + reference.topk_divergence(student, d.logprobs[here], kind, tail).mean() / len(batch)
    (policy + 0.7 * total).backward()
    assert float(total.detach()) > 1e-2
    assert metrics["loss"] == pytest.approx(float(policy.detach()), abs=1e-6)
    assert metrics["sd/loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    rollout = torch.bucketize(d.positions, batch.cu_seqlens, right=True) - 1
    at = entropy[rollout, d.positions - batch.cu_seqlens[rollout] - 1]
    assert metrics["sd/student_entropy"] == pytest.approx(float(at.mean()), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_gradient_does_not_depend_on_micro_batches():
    credit, _, _ = credit_of()
    (whole,), metrics = update(credit, LossConfig(max_tokens=10**6))
    (pieces,), same = update(credit, LossConfig(max_tokens=1))
    assert metrics["sd/loss"] == pytest.approx(same["sd/loss"], rel=1e-5)
    assert metrics["sd/student_entropy"] == pytest.approx(same["sd/student_entropy"], rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-7)


def test_what_has_a_teacher_is_run_without_an_advantage():
    credit, batch, _ = credit_of()
    none = torch.zeros_like(credit.advantages)
    (gradient,), metrics = update(replace(credit, advantages=none))
    searching = {int(b) for b in batch.step_rollout if b > 0}
    assert metrics["skipped_zero_advantage"] == len(batch) - len(searching) > 0
    assert metrics["loss"] == metrics["logprob_gap"] == 0
    assert all(torch.count_nonzero(g) for name, g in gradient.items() if "embed" not in name)
    # A rollout is run to its last token with either, and one forward serves both losses.
    tokens = [update(c)[1]["tokens_forwarded"] for c in (credit, replace(credit, distillation=None))]
    assert tokens[1] <= tokens[0] < tokens[1] + metrics["tokens_forwarded"]
    # Twice the coefficient, twice the gradient.
    twice = replace(credit, advantages=none, distillation=replace(credit.distillation, coefficient=1.4))
    for name, other in update(twice)[0][0].items():
        torch.testing.assert_close(other, 2 * gradient[name], rtol=1e-4, atol=1e-8)


def test_minibatches_take_the_mean_over_their_own_rollouts():
    credit, _, _ = credit_of()
    none = torch.zeros_like(credit.advantages)
    (whole,), metrics = update(replace(credit, advantages=none))
    seen, halves = update(replace(credit, advantages=none), LossConfig(minibatches=2))
    assert len(seen) == 2
    assert halves["sd/loss"] == pytest.approx(metrics["sd/loss"], rel=1e-5)
    for name, gradient in whole.items():
        # gradients collect in the masters, as this optimizer never clears them
        torch.testing.assert_close(seen[-1][name], 2 * gradient, rtol=1e-4, atol=1e-7)


def test_the_teacher_gets_no_gradient():
    credit, _, _ = credit_of()
    teacher = credit.distillation.logprobs.clone().requires_grad_()
    (gradient,), _ = update(replace(credit, distillation=replace(credit.distillation, logprobs=teacher)))
    assert teacher.grad is None
    for name, other in update(credit)[0][0].items():
        assert torch.equal(gradient[name], other)


def test_rollouts_that_share_a_state_keep_their_own_candidates():
    """Two equal rollouts are one row; their teachers differ."""
    parts = tiny_parts()
    batch = played(parts, 8, group_size=4)
    twins = type(batch).pack([batch.rollouts[1], batch.rollouts[1]])
    first = some_distillation(twins, parts)  # of the second of them
    offset = int(twins.cu_seqlens[1])
    options = dict(learning_rate=0.0, temperature=1.0)

    def loss(distillation):
        credit = Credit(torch.zeros(len(twins.tokens)), distillation=distillation)
        return policy_update(parts.scorer, parts.optimizer, twins, credit, LossConfig(), **options)["sd/loss"]

    other = replace(first, positions=first.positions - offset, candidates=(first.candidates + 7) % 1000)
    both = Distillation(
        **{
            name: torch.cat([getattr(other, name), getattr(first, name)])
            for name in ("positions", "candidates", "logprobs", "weights")
        },
        **{name: getattr(first, name) for name in ("name", "coefficient", "divergence", "tail")},
    )
    assert loss(both) == pytest.approx(loss(first) + loss(other), rel=1e-5)
    assert abs(loss(first) - loss(other)) > 1e-6


def test_repeated_updates_bring_the_policy_to_its_teacher():
    credit, batch, parts = credit_of()
    credit = replace(credit, advantages=torch.zeros_like(credit.advantages))
    losses = []
    for _ in range(20):
        options = dict(learning_rate=1e-2, temperature=1.0)
        losses.append(policy_update(parts.scorer, parts.optimizer, batch, credit, LossConfig(), **options)["sd/loss"])
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(weights=torch.ones(3)), r"distillation.weights must have 1 dimensions and \d+ rows, got shape \(3,\)"),
        (dict(logprobs=torch.zeros(2)), r"distillation.logprobs must have 2 dimensions"),
        (dict(coefficient=-1.0), r"distillation.coefficient must be finite and at least 0, got -1.0"),
        (dict(divergence="mse"), r"distillation.divergence must be one of jsd, forward_kl, reverse_kl, got 'mse'"),
    ],
)
def test_a_distillation_that_does_not_fit_is_refused(changes, message):
    parts = tiny_parts()
    batch = played(parts, 8, group_size=4)
    with pytest.raises(ValueError, match=message):
        some_distillation(batch, parts, **changes)
    good = some_distillation(batch, parts)
    with pytest.raises(ValueError, match=r"positions must be strictly ascending"):
        replace(good, positions=good.positions.flip(0))
    with pytest.raises(ValueError, match=r"logprobs must have the shape of candidates, \(\d+, 5\), got \(\d+, 4\)"):
        replace(good, logprobs=good.logprobs[:, :4])
