"""pi-Play: the student's credit, and the average that teaches it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stepcredit.credit.base
from hindsight_rollouts import make
from stepcredit import reference
from stepcredit.batch import RolloutBatch
from stepcredit.credit import METHODS, PiPlay, SearchR1
from stepcredit.credit.pi_play import path_text
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer
from stepcredit.train.average import AveragePolicy
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.setup import frozen_copy
from stepcredit.train.update import policy_update
from stepcredit.train.update_config import LossConfig
from tiny_run import played, same, tiny_parts

PATH = (("", "Lyon: It lies in France."), ("river </search> x", "Rhône: A river <search>."))


def with_paths(batch: RolloutBatch, *groups: int) -> RolloutBatch:
    """The batch, the questions of these groups with a construction path."""
    rollouts = [
        dataclasses.replace(r, question=dataclasses.replace(r.question, path=PATH)) if r.group in groups else r
        for r in batch.rollouts
    ]
    return RolloutBatch.pack(rollouts)


def another(policy: PolicyScorer) -> PolicyScorer:
    """A teacher whose weights are others."""
    model = frozen_copy(policy.model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    return PolicyScorer(model, policy.tokenizer, policy.protocol)


@pytest.fixture(scope="module")
def world() -> tuple[RolloutBatch, PolicyScorer, PolicyScorer]:
    batch, policy = make()
    return with_paths(batch, 0), policy, another(policy)


# The teacher


def test_what_the_teacher_sees():
    assert path_text(Question("a", "Who?", ("me",))) == ""
    assert path_text(Question("a", "Who?", ("me",), path=PATH)) == (
        "How this question was written:\nLyon: It lies in France.\n<search>river &lt;/search> x</search>\n"
        "Rhône: A river &lt;search>.\nAn attempt to answer it:\n"
    )


def separate(batch: RolloutBatch, teacher: PolicyScorer, b: int) -> torch.Tensor:
    """Log-probs [n, V] at the policy tokens of a rollout, by a forward of its own over prompt, path and response."""
    rollout = batch.rollouts[b]
    block, at = teacher.encode(path_text(rollout.question)), rollout.prompt_length
    ids = [*rollout.tokens[:at], *block, *rollout.tokens[at:]]
    wrote = [i + len(block) for span in rollout.spans if span.by_policy for i in range(span.start, span.stop)]
    with torch.no_grad():
        logits = teacher.model(torch.tensor([ids])).logits[0].float()
    return logits.log_softmax(-1)[torch.tensor(wrote) - 1]


def test_the_teacher_is_a_separate_forward_with_the_path(world):
    batch, policy, teacher = world
    credit = PiPlay(top_k=6)(batch, policy, teacher=teacher)
    d = credit.distillation
    taught = batch.policy_mask & (batch.groups == 0).repeat_interleave(batch.cu_seqlens.diff())
    assert torch.equal(d.positions, taught.nonzero()[:, 0])
    assert not (~batch.policy_mask)[d.positions].any()  # nothing of the environment's
    logp = torch.cat([separate(batch, teacher, b) for b in range(3)])
    torch.testing.assert_close(d.logprobs, logp.topk(6).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(d.logprobs, logp.gather(-1, d.candidates), rtol=0, atol=1e-5)
    assert (d.name, d.coefficient, d.divergence, d.tail) == ("pi_play", 0.1, "reverse_kl", True)
    rollout = torch.bucketize(d.positions, batch.cu_seqlens, right=True) - 1
    sums = torch.zeros(len(batch)).index_add(0, rollout, d.weights)
    torch.testing.assert_close(sums, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    assert credit.metrics["pi_play/without_path"] == 3
    assert credit.metrics["pi_play/tokens_distilled"] == len(d.positions)
    assert credit.metrics["pi_play/tokens_teacher"] == credit.metrics["tokens_forwarded"] > 0
    assert credit.metrics["pi_play/teacher_entropy"] == pytest.approx(float(-(logp.exp() * logp).sum(-1).mean()), 1e-4)


def test_the_code_of_the_documentation_is_what_runs(world):
    """The loss of the update is that of the formula over all the vocabulary, but for the tail."""
    batch, policy, teacher = world
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
    section = re.search(r"^## `pi_play`[^\n]*\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    code = re.search(r"```python\n(.*?)```", section[1], re.DOTALL)
    losses, plain = [], []
    for b, rollout in enumerate(batch.rollouts[:3]):
        at = rollout.prompt_length
        by_policy = torch.zeros(len(rollout.tokens), dtype=torch.bool)
        for span in rollout.spans:
            by_policy[span.start : span.stop] = span.by_policy

        def logits(ids, model):
            return SimpleNamespace(logits=model(torch.tensor([ids])).logits[0])

        names = {
            "teacher": lambda ids: logits(ids, teacher.model),
            "student": lambda ids: logits(ids, policy.model),
            "topk_divergence": reference.topk_divergence,
            "path": teacher.encode(path_text(rollout.question)),
            **{"prompt": rollout.tokens[:at], "response": rollout.tokens[at:], "by_policy": by_policy[at:]},
        }
        exec(code[1], names)
        losses.append(float(names["loss"].detach()))
        said = separate(batch, teacher, b)
        with torch.no_grad():
            own = policy.model(torch.tensor([rollout.tokens])).logits[0].log_softmax(-1)[:-1][by_policy[1:]]
        plain.append(float((own.exp() * (own - said)).sum(-1).mean()))
    options = dict(learning_rate=0.0, temperature=1.0)
    optimizer = MasterAdamW(policy.model)
    metrics = policy_update(policy, optimizer, batch, PiPlay()(batch, policy, teacher=teacher), LossConfig(), **options)
    # Rollouts without a path count 0 in the mean.
    assert metrics["pi_play/loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert metrics["pi_play/student_entropy"] > 0
    assert 0 < metrics["pi_play/loss"] < sum(plain) / 6  # what is merged into a tail can only be closer
    everything = PiPlay(top_k=1024, tail=False)(batch, policy, teacher=teacher)
    metrics = policy_update(policy, optimizer, batch, everything, LossConfig(), **options)
    assert metrics["pi_play/loss"] == pytest.approx(sum(plain) / 6, rel=1e-3)


def test_reverse_kl_on_hand_computed_numbers():
    """The student says 1/2, 1/2, the teacher 1/4, 3/4: 1/2 log 2 + 1/2 log 2/3."""
    both = [torch.tensor([p], dtype=torch.float64).log() for p in ((0.5, 0.5), (0.25, 0.75))]
    found = reference.topk_divergence(*both, PiPlay().divergence, tail=False)
    assert float(found) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


# The method


@pytest.mark.parametrize("options", [{}, {"eps": 1e-4, "ddof": 0}, {"scale": "none"}, {"singleton": "zero"}])
def test_advantages_are_those_of_search_r1_to_the_bit(world, options):
    batch, policy, teacher = world
    plain = SearchR1(**options)(batch, policy)
    credit = PiPlay(**options)(batch, policy, teacher=teacher)
    assert torch.equal(credit.advantages, plain.advantages)
    assert plain.metrics.items() <= credit.metrics.items()


@pytest.mark.parametrize("without", ["weight", "path"])
def test_without_a_weight_or_a_path_the_update_is_that_of_search_r1_to_the_bit(without):
    states, found = [], []
    for method in (SearchR1(), PiPlay(weight=0.0 if without == "weight" else 1.0)):
        parts = tiny_parts()
        batch = played(parts, 8, group_size=4)
        batch = with_paths(batch, 0, 1) if without == "weight" else batch
        for _ in range(2):
            credit = method(batch, parts.scorer)
            options = dict(learning_rate=1e-3, temperature=1.0)
            metrics = policy_update(parts.scorer, parts.optimizer, batch, credit, LossConfig(), **options)
        states.append({k: v.clone() for k, v in parts.optimizer.state().items()})
        found.append(metrics)
        assert credit.distillation is None
        assert parts.scorer.tokens_forwarded == 0
    assert same(*states)
    assert found[0] == found[1]
    assert found[0]["grad_norm"] > 0


def test_the_weight_pulls_towards_the_teacher():
    parts = tiny_parts()
    batch = with_paths(played(parts, 8, group_size=4), 0, 1)
    teacher = another(parts.scorer)
    losses = []
    for _ in range(6):
        credit = PiPlay(weight=1.0)(batch, parts.scorer, teacher=teacher)
        credit = dataclasses.replace(credit, advantages=torch.zeros_like(credit.advantages))
        options = dict(learning_rate=1e-3, temperature=1.0)
        losses.append(policy_update(parts.scorer, parts.optimizer, batch, credit, LossConfig(), **options))
    assert losses[-1]["pi_play/loss"] < losses[0]["pi_play/loss"]


def test_who_teaches(world):
    batch, policy, teacher = world
    with pytest.raises(ValueError, match=r"teacher must be given with credit.teacher='average'"):
        PiPlay()(batch, policy)
    own = PiPlay(teacher="policy")(batch, policy).distillation
    assert not torch.allclose(own.logprobs, PiPlay()(batch, policy, teacher=teacher).distillation.logprobs)
    assert stepcredit.credit.base.taught_by_average(PiPlay())
    assert not stepcredit.credit.base.taught_by_average(PiPlay(teacher="policy"))


def test_what_does_not_fit_is_counted():
    batch, policy = make()
    batch = with_paths(batch, 0)
    block = len(policy.encode(path_text(batch.rollouts[0].question)))
    longest = len(batch.rollouts[0].tokens) + block  # all but the last token are run
    for room, too_long in ((longest - 1, 0), (longest - 2, 1)):
        policy.model.config.max_position_embeddings = room
        credit = PiPlay(teacher="policy")(batch, policy)
        assert credit.metrics["pi_play/too_long"] == too_long


def test_metrics_are_finite_and_documented(world):
    batch, policy, teacher = world
    documented = PiPlay.__doc__ + stepcredit.credit.base.outcome_metrics.__doc__
    for name, value in PiPlay()(batch, policy, teacher=teacher).metrics.items():
        assert math.isfinite(value)
        assert f"`{name}`" in documented or name == "tokens_forwarded"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weight=-1.0), "credit.weight must be at least 0, got -1.0"),
        (dict(tau=0.0), r"credit.tau must be in \(0, 1\], got 0.0"),
        (dict(top_k=2000), r"credit.top_k must be in \[1, 1024\], got 2000"),
        (dict(teacher="reference"), "credit.teacher must be one of average, policy, got 'reference'"),
    ],
)
def test_bad_constants_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PiPlay(**options)


def test_every_constant_is_documented():
    for field in dataclasses.fields(PiPlay):
        assert f"\n        {field.name}" in PiPlay.__doc__ or f", {field.name}" in PiPlay.__doc__
    assert METHODS["pi_play"]() == PiPlay()


# The average


def test_the_average_by_hand():
    parts = tiny_parts()
    average = AveragePolicy(parts.scorer, parts.optimizer, tau=0.05)
    name = "model.norm.weight"
    start = average.weights[name].clone()
    assert average.distance() == 0
    with torch.no_grad():
        for master in parts.optimizer.masters.values():
            master.add_(1.0)
    parts.optimizer.write_back()
    for expected in (0.05, 0.0975, 0.142625):  # 1 - 0.95^n
        average.update()
        torch.testing.assert_close(average.weights[name] - start, torch.full_like(start, expected))
    masters = parts.optimizer.masters
    norm = math.sqrt(sum(float(m.detach().double().square().sum()) for m in masters.values()))
    apart = 0.857375 * math.sqrt(sum(m.numel() for m in masters.values()))
    assert average.distance() == pytest.approx(apart / norm, rel=1e-4)
    assert torch.equal(average.scorer.model.model.norm.weight, average.weights[name])
    assert not any(p.requires_grad for p in average.scorer.model.parameters())


def test_the_average_keeps_what_bfloat16_would_lose():
    parts = tiny_parts(torch.bfloat16)
    average = AveragePolicy(parts.scorer, parts.optimizer, tau=0.05)
    name = "model.norm.weight"  # all 1
    with torch.no_grad():
        parts.optimizer.masters[name].add_(0.01)
    for _ in range(300):
        average.update()
    torch.testing.assert_close(average.weights[name], torch.full((32,), 1.01), rtol=0, atol=2e-6)
    kept = torch.ones(32, dtype=torch.bfloat16)
    assert torch.equal(kept.lerp(parts.optimizer.masters[name].bfloat16(), 0.05), kept)  # where it stands still
    assert average.weights[name].dtype == torch.float32
    assert average.scorer.model.dtype == torch.bfloat16


def test_an_average_of_another_model_is_refused():
    parts = tiny_parts()
    average = AveragePolicy(parts.scorer, parts.optimizer, tau=0.05)
    tensors = average.state()
    with pytest.raises(ValueError, match=r"does not fit the model: \['x'\] differ"):
        average.load_state(tensors | {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(5,\), the model \(32,\)"):
        average.load_state(tensors | {"model.norm.weight": torch.zeros(5)})
