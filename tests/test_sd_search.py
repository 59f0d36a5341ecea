"""SD-Search: the teacher that sees a hindsight block, and the credit it makes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stepcredit.credit.base
import stepcredit.ops
from hindsight_rollouts import QUESTIONS, TOKENIZER, make
from scripted_rollouts import GEMMA2, write
from stepcredit import reference
from stepcredit.batch import RolloutBatch
from stepcredit.branches.policy_tokens import score_top_tokens
from stepcredit.credit import METHODS, Credit, Distillation, SDSearch, SearchR1
from stepcredit.credit.hindsight import attempt_of, block_text, hindsight_texts, with_block
from stepcredit.rollout import SpanKind
from stepcredit.scorer import PolicyScorer
from stepcredit.train.loop import train
from stepcredit.train.loss import topk_divergence
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.update import policy_update
from stepcredit.train.update_config import LossConfig
from tiny_run import played, same, tiny_config, tiny_parts


@pytest.fixture(scope="module")
def world() -> tuple[RolloutBatch, PolicyScorer]:
    return make()


# The teacher


def plain_teacher(batch: RolloutBatch, policy: PolicyScorer, positions: torch.Tensor) -> torch.Tensor:
    """Log-probs [R, V] of the tokens at these positions, each by a forward of its own over prompt, block, response."""
    attempts = [attempt_of(rollout, policy, 0.0) for rollout in batch.rollouts]
    found = []
    for position in positions.tolist():
        b = int(torch.bucketize(torch.tensor(position), batch.cu_seqlens, right=True)) - 1
        rollout, at = batch.rollouts[b], position - int(batch.cu_seqlens[b])
        mine = [i for i in range(len(batch)) if batch.groups[i] == batch.groups[b]]
        block = policy.encode(block_text([attempts[i] for i in mine], labelled=True))
        prompt = rollout.prompt_length
        context = [*rollout.tokens[:prompt], *block, *rollout.tokens[prompt:at]]
        with torch.no_grad():
            found.append(policy.model(torch.tensor([context])).logits[0, -1].float().log_softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
        ("gemma2", {**GEMMA2, "attn_implementation": "eager"}),
        ("cohere", {"logit_scale": 0.3}),
        ("a head with a bias", {}),
    ],
)
def test_the_teacher_is_a_separate_forward_with_the_block(family, changes):
    batch, policy = make("llama" if "bias" in family else family, **changes)
    if "bias" in family:
        head = torch.nn.Linear(32, policy.model.lm_head.out_features)
        torch.nn.init.normal_(head.bias)
        policy.model.set_output_embeddings(head)
    credit = SDSearch(top_k=6)(batch, policy)
    d = credit.distillation
    assert torch.equal(d.positions, (batch.step_ids >= 0).nonzero()[:, 0])
    logp = plain_teacher(batch, policy, d.positions)
    torch.testing.assert_close(d.logprobs, logp.gather(-1, d.candidates), rtol=0, atol=1e-5)
    torch.testing.assert_close(d.logprobs, logp.topk(6).values, rtol=0, atol=1e-5)
    assert credit.metrics["sd/teacher_entropy"] == pytest.approx(float(-(logp.exp() * logp).sum(-1).mean()), abs=1e-4)
    assert credit.metrics["sd/tail"] == pytest.approx(float(1 - logp.topk(6).values.exp().sum(-1).mean()), abs=1e-5)
    for parameter in policy.model.parameters():
        assert parameter.grad is None
    assert not d.logprobs.requires_grad


def test_shared_tokens_are_run_once(world):
    batch, policy = world
    attempts = [attempt_of(rollout, policy, 0.0) for rollout in batch.rollouts]
    texts = hindsight_texts(
        batch.rollouts, batch.groups.tolist(), attempts, block="group", labels="true", seed=0, step=0
    )
    prefixes = set()
    for rollout, text in zip(batch.rollouts, texts, strict=True):
        moved = with_block(rollout, policy.encode(text))
        last = max((s.stop for s in moved.spans if s.kind is SpanKind.QUERY), default=1)
        prefixes |= {(rollout.group, *moved.tokens[:n]) for n in range(1, last)}
    metrics = SDSearch()(batch, policy).metrics
    assert metrics["sd/tokens_teacher"] == metrics["tokens_forwarded"] == len(prefixes)
    small = SDSearch(max_tokens=1)(batch, policy).distillation
    torch.testing.assert_close(small.logprobs, SDSearch()(batch, policy).distillation.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl"])
def test_without_a_block_the_teacher_is_the_student(world, kind):
    batch, policy = world
    wanted = batch.step_ids >= 0
    teacher = score_top_tokens(batch, policy, wanted, 10)
    ids = batch.padded(batch.tokens).long()
    positions = wanted.nonzero()[:, 0]
    b = torch.bucketize(positions, batch.cu_seqlens, right=True) - 1
    with torch.no_grad():
        logp = policy.model(ids).logits.log_softmax(-1)[b, positions - batch.cu_seqlens[b] - 1]
    divergence = topk_divergence(logp.gather(-1, teacher.ids), teacher.logprobs, kind, tail=True)
    assert float(divergence.abs().max()) < 1e-6


def test_hidden_states_that_are_not_numbers_name_the_question():
    batch, policy = make()
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"hidden states are not finite for question '.'"):
        SDSearch()(batch, policy)
    batch, policy = make()
    with torch.no_grad():
        policy.model.lm_head.weight[5] = math.nan
    with pytest.raises(FloatingPointError, match=r"the policy's head: .* NaN in row 5"):
        SDSearch()(batch, policy)


def test_no_tensor_has_a_row_of_logits_for_every_token():
    """The largest allocation of teacher and update, on a vocabulary of several tiles."""
    vocabulary = 100_000
    _, policy = make(vocab_size=vocabulary, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    searches = [("xjq kvw zpf bnm hgt qwx jkz " + 9 * letter, "Lyon lies on it.", None) for letter in "xyz"]
    batch = RolloutBatch.pack([write(TOKENIZER, QUESTIONS[0], searches[i:], reward=float(i)) for i in range(2)])
    optimizer = MasterAdamW(policy.model)
    contexts = set()  # tokens that rollouts share are predicted once
    for position in (batch.step_ids >= 0).nonzero()[:, 0].tolist():
        b = int(torch.bucketize(torch.tensor(position), batch.cu_seqlens, right=True)) - 1
        contexts.add(tuple(batch.rollouts[b].tokens[: position - int(batch.cu_seqlens[b])]))
    assert len(contexts) > 80
    logits = len(contexts) * vocabulary * 4

    def largest(run) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        events = profile.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    found: list[Credit] = []
    options = dict(learning_rate=0.0, temperature=1.0)
    assert largest(lambda: found.append(SDSearch()(batch, policy))) < logits / 2
    assert len(found[0].distillation.positions) >= len(contexts)
    assert largest(lambda: policy_update(policy, optimizer, batch, found[0], LossConfig(), **options)) < logits / 2
    # and the measure does see such a tensor, inside an op too
    head = policy.model.lm_head.weight.detach()
    hidden, ids = torch.randn(len(contexts), 8), torch.zeros(len(contexts), 50, dtype=torch.int64)
    assert largest(lambda: stepcredit.ops.gather_logprobs(hidden, head, ids, impl="reference")) >= logits


def test_the_code_of_the_documentation_is_what_runs():
    batch, policy = make()
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
    section = re.search(r"^## `sd_search`[^\n]*\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    code = re.search(r"```python\n(.*?)```", section[1], re.DOTALL)
    assert code is not None
    attempts = [attempt_of(rollout, policy, 0.0) for rollout in batch.rollouts]
    block = policy.encode(block_text(attempts[:3], labelled=True))
    losses = []
    for rollout in batch.rollouts[:2]:
        tokens, at = rollout.tokens, rollout.prompt_length
        is_query = torch.zeros(len(tokens), dtype=torch.bool)
        for span in rollout.spans:
            is_query[span.start : span.stop] = span.kind is SpanKind.QUERY
        names = {
            "model": lambda ids: SimpleNamespace(logits=policy.model(torch.tensor([ids])).logits[0]),
            "topk_divergence": reference.topk_divergence,
            **{"prompt": tokens[:at], "block": block, "response": tokens[at:], "is_query": is_query[at:]},
        }
        exec(code[1], names)
        losses.append(float(names["loss"]))
    first = RolloutBatch.pack(batch.rollouts[:3])
    optimizer = MasterAdamW(policy.model)
    options = dict(learning_rate=0.0, temperature=1.0)
    metrics = policy_update(policy, optimizer, first, SDSearch()(first, policy), LossConfig(), **options)
    assert metrics["sd/loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


# The method


@pytest.mark.parametrize("options", [{}, {"eps": 1e-4, "ddof": 0}, {"scale": "none"}, {"singleton": "zero"}])
def test_advantages_are_those_of_search_r1_to_the_bit(world, options):
    batch, policy = world
    plain = SearchR1(**options)(batch, policy)
    credit = SDSearch(**options)(batch, policy)
    assert torch.equal(credit.advantages, plain.advantages)
    assert plain.metrics.items() <= credit.metrics.items()
    assert credit.logprobs is None


def test_what_is_distilled(world):
    batch, policy = world
    method = SDSearch(weight=0.3, top_k=7, tail=False, divergence="reverse_kl")
    d = method(batch, policy).distillation
    assert (d.name, d.coefficient, d.tail, d.divergence) == ("sd", 0.3, False, "reverse_kl")
    assert d.candidates.shape == d.logprobs.shape == (len(d.positions), 7)
    rollout = torch.bucketize(d.positions, batch.cu_seqlens, right=True) - 1
    sums = torch.zeros(len(batch)).index_add(0, rollout, d.weights)
    torch.testing.assert_close(sums, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0]))
    one = SDSearch(block="single", labels="none")(batch, policy).distillation
    assert not torch.allclose(one.logprobs[:, :7], d.logprobs)


def test_the_warm_up_and_a_weight_of_0_run_no_teacher(world):
    batch, policy = world
    before = policy.tokens_forwarded
    for method, progress in ((SDSearch(), 0.24), (SDSearch(weight=0.0), 1.0), (SDSearch(warmup=1.0), 0.999)):
        credit = method(batch, policy, progress=progress)
        assert credit.distillation is None
        assert credit.metrics == SearchR1()(batch, policy).metrics | {"sd/weight": 0.0}
    assert policy.tokens_forwarded == before
    assert SDSearch()(batch, policy, progress=0.25).metrics["sd/weight"] == 1e-3
    assert SDSearch(warmup=0.0)(batch, policy, progress=0.0).distillation is not None


def test_what_has_no_teacher_is_counted(world):
    batch, policy = world
    metrics = SDSearch()(batch, policy).metrics
    assert metrics["sd/groups_without_contrast"] == 0.5
    assert (metrics["sd/rollouts_without_block"], metrics["sd/too_long"]) == (0, 0)
    wrong = [dataclasses.replace(rollout, answer="no") for rollout in batch.rollouts]
    failed = RolloutBatch.pack(wrong)
    credit = SDSearch(block="correct_only")(failed, policy)
    assert credit.distillation is None
    assert credit.metrics["sd/groups_without_contrast"] == 1.0
    assert credit.metrics["sd/rollouts_without_block"] == 4  # those that search
    assert credit.metrics["sd/tokens_distilled"] == credit.metrics["sd/tokens_teacher"] == 0
    # A group that failed altogether still has a teacher.
    assert SDSearch()(failed, policy).metrics["sd/tokens_distilled"] == int((batch.step_ids >= 0).sum())
    alone = RolloutBatch.pack(batch.rollouts[:1])
    assert SDSearch(block="leave_one_out")(alone, policy).metrics["sd/rollouts_without_block"] == 1


def test_a_block_that_does_not_fit_is_counted():
    batch, policy = make()
    attempts = [attempt_of(rollout, policy, 0.0) for rollout in batch.rollouts[:3]]
    block = policy.encode(block_text(attempts, labelled=True))
    longest = max(s.stop for s in with_block(batch.rollouts[0], block).spans if s.kind is SpanKind.QUERY)
    for room, too_long in ((longest - 1, 0), (longest - 2, 1)):
        policy.model.config.max_position_embeddings = room
        first = RolloutBatch.pack(batch.rollouts[:3])
        credit = SDSearch()(first, policy)
        assert credit.metrics["sd/too_long"] == too_long
        queries = [int((part >= 0).sum()) for part in first.step_ids.split(first.cu_seqlens.diff().tolist())]
        assert len(credit.distillation.positions) == sum(queries) - too_long * queries[0]


def test_metrics_are_finite_and_documented(world):
    batch, policy = world
    metrics = SDSearch()(batch, policy).metrics
    documented = SDSearch.__doc__ + stepcredit.credit.base.outcome_metrics.__doc__
    for name, value in metrics.items():
        assert isinstance(value, float)
        assert math.isfinite(value)
        assert f"`{name}`" in documented
    assert metrics["sd/seconds"] > 0
    assert 0 < metrics["sd/tail"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_k=0), r"credit.top_k must be in \[1, 1024\], got 0"),
        (dict(top_k=2000), r"credit.top_k must be in \[1, 1024\], got 2000"),
        (dict(weight=-1.0), "credit.weight must be at least 0, got -1.0"),
        (dict(warmup=1.5), r"credit.warmup must be in \[0, 1\], got 1.5"),
        (dict(divergence="mse"), "credit.divergence must be one of jsd, forward_kl, reverse_kl, got 'mse'"),
        (dict(block="all"), "credit.block must be one of"),
        (dict(labels="false"), "credit.labels must be one of true, shuffled, none, got 'false'"),
    ],
)
def test_bad_constants_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SDSearch(**options)


def test_every_constant_is_documented():
    for field in dataclasses.fields(SDSearch):
        assert f"\n        {field.name}" in SDSearch.__doc__ or f", {field.name}" in SDSearch.__doc__
    assert METHODS["sd_search"]() == SDSearch()


# The trainer


def test_weight_zero_is_search_r1_bit_for_bit_and_the_paper_s_weight_is_not(tmp_path):
    models, lines = [], []
    for number, method in enumerate(
        (["credit=search_r1"], ["credit=sd_search", "credit.weight=0"], ["credit=sd_search", "credit.warmup=0.5"])
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        parts = tiny_parts(searching=True)
        train(tiny_config(*method), parts, directory)
        models.append(parts.model.state_dict())
        found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        lines.append([line for line in found if line["phase"] == "grpo"])
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    assert [line["sd/weight"] for line in lines[2]] == [0.0, 1e-3]
    first, second = lines[2]
    assert "sd/loss" not in first
    assert 0 < second["sd/loss"] < math.log(2)
    assert second["tokens_credit"] == second["sd/tokens_teacher"] > 0
    assert second["sd/tokens_distilled"] > 0
    assert lines[0][0]["grad_norm"] == first["grad_norm"]


def test_the_teacher_of_a_batch_is_followed():
    """Updates on one batch: the policy comes closer to what it says itself with hindsight."""
    parts = tiny_parts(searching=True)
    batch = played(parts, 8, group_size=4)
    method = SDSearch(weight=1.0)
    losses = []
    for _ in range(6):
        credit = method(batch, parts.scorer)
        credit = dataclasses.replace(credit, advantages=torch.zeros_like(credit.advantages))
        options = dict(learning_rate=1e-3, temperature=1.0)
        metrics = policy_update(parts.scorer, parts.optimizer, batch, credit, LossConfig(), **options)
        losses.append(metrics["sd/loss"])
        assert isinstance(credit.distillation, Distillation)
    assert losses[-1] < losses[0]
