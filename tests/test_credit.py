from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import stepcredit.credit.ig_search
from scripted_rollouts import REFINE, random_policy, write
from stepcredit.batch import RolloutBatch
from stepcredit.credit import METHODS, IGSearch, SearchR1, get_method
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer
from tokenizers_under_test import BUILT

TOKENIZER = BUILT["byte_bpe"]()
QUESTIONS = [Question("a", "Which river flows through Lyon?", ("Rhône",)), Question("b", "Capital?", ("Paris",))]
FACTS = ("Lyon lies on the Rhône.", "Paris is the capital.", "The Seine flows north.")


@pytest.fixture(scope="module")
def policy() -> PolicyScorer:
    return PolicyScorer(random_policy("llama", TOKENIZER), TOKENIZER, REFINE)


def make(rewards: list[list[float]]) -> RolloutBatch:
    """Two groups; rollout i of a group makes i % 3 searches with queries of different lengths."""
    rollouts = []
    for group, (question, mine) in enumerate(zip(QUESTIONS, rewards, strict=True)):
        for i, reward in enumerate(mine):
            searches = [
                (f"query {'very ' * t}{i}", f"{FACTS[(i + t + group) % 3]} {group}{i}", "so" if t else None)
                for t in range(i % 3)
            ]
            rollouts.append(write(TOKENIZER, question, searches, reward=reward, group=group))
    return RolloutBatch.pack(rollouts)


MIXED = [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]]


def test_search_r1(policy):
    batch = make(MIXED)
    credit = SearchR1()(batch, policy)
    assert credit.distillation is None
    for b in range(len(batch)):
        r = batch.rewards[batch.groups == batch.groups[b]]
        expected = (batch.rewards[b] - r.mean()) / (r.std() + 1e-6)
        at = slice(int(batch.cu_seqlens[b]), int(batch.cu_seqlens[b + 1]))
        torch.testing.assert_close(credit.advantages[at], expected * batch.policy_mask[at])
    policy_tokens = credit.advantages[batch.policy_mask]
    assert credit.metrics == {
        "advantage/zero_variance_groups": 0.0,
        "advantage/outcome_abs_mean": pytest.approx(float(policy_tokens.abs().mean())),
    }


@pytest.mark.parametrize("options", [{}, {"eps": 1e-4, "ddof": 0}, {"scale": "none"}, {"singleton": "zero"}])
@pytest.mark.parametrize("rewards", [MIXED, [[0.0, 0.0, 0.0], [0.7]]])
def test_alpha_zero_is_search_r1_to_the_bit(policy, options, rewards):
    batch = make(rewards)
    plain = SearchR1(**options)(batch, policy).advantages
    assert torch.equal(IGSearch(alpha=0.0, **options)(batch, policy).advantages, plain)


def test_a_group_that_fails_altogether_learns_from_its_queries_only(policy):
    batch = make([[0.0] * 3, [0.0] * 3])
    credit = IGSearch(dead_zone=0.0)(batch, policy)
    assert credit.metrics["advantage/zero_variance_groups"] == 1.0
    assert torch.equal(credit.advantages != 0, batch.step_ids >= 0)


@pytest.mark.parametrize(
    ("options", "stabilised"),
    [
        (dict(dead_zone=0.0, negative_scale=1.0, soft_clip=math.inf), lambda g: g),
        (dict(dead_zone=0.3, negative_scale=1.0, soft_clip=math.inf), lambda g: 0.0 if abs(g) < 0.3 else g),
        (
            dict(dead_zone=0.0, negative_scale=0.5, soft_clip=0.4),
            lambda g: 0.4 * math.tanh(max(g, g / 2) / 0.4),
        ),
    ],
)
def test_the_bonus_of_a_step_sums_to_alpha_times_its_gain(policy, options, stabilised):
    batch = make(MIXED)
    method = IGSearch(alpha=0.7, **options)
    bonus = method(batch, policy, step=2).advantages - SearchR1()(batch, policy).advantages
    gains = stepcredit.credit.ig_search.score_steps(batch, policy, step=2)
    lengths = set()
    for s, gain in enumerate(gains.gain.tolist()):
        query = batch.step_ids == s
        lengths.add(int(query.sum()))
        assert float(bonus[query].sum()) == pytest.approx(0.7 * stabilised(gain), abs=1e-5)
        assert float(bonus[query].std()) < 1e-6
    assert len(lengths) > 1
    assert not bonus[batch.step_ids < 0].any()


@pytest.mark.parametrize("center", ["batch", "group"])
def test_center_subtracts_the_mean_gain(policy, monkeypatch, center):
    batch = make(MIXED)
    scored = stepcredit.credit.ig_search.score_steps(batch, policy)
    raw = torch.tensor([3.0, math.nan, 1.0, 2.0, 2.0, 2.0])[: batch.num_steps]
    fixed = dataclasses.replace(scored, gain=raw, scored=~raw.isnan())
    monkeypatch.setattr(stepcredit.credit.ig_search, "score_steps", lambda *_, **__: fixed)
    options = dict(alpha=1.0, dead_zone=0.0, negative_scale=1.0, soft_clip=math.inf)
    centred = IGSearch(center=center, **options)(batch, policy)
    bonus = centred.advantages - SearchR1()(batch, policy).advantages
    where = batch.groups[batch.step_rollout] if center == "group" else torch.zeros(batch.num_steps, dtype=torch.int64)
    assert len(where.unique()) == (2 if center == "group" else 1)
    expected = torch.cat([raw[where == g] - raw[where == g].nanmean() for g in where.unique()]).nan_to_num()
    for s in range(batch.num_steps):
        assert float(bonus[batch.step_ids == s].sum()) == pytest.approx(float(expected[s]), abs=1e-5)
    assert float(expected.sum()) == pytest.approx(0.0, abs=1e-6)
    assert centred.metrics["ig/gain_mean"] == pytest.approx(float(raw.nanmean()))  # metrics are of raw gains
    assert IGSearch(**options)(batch, policy).advantages[batch.step_ids == 0].mean() > bonus[batch.step_ids == 0].mean()


def test_metrics(policy):
    batch = make(MIXED)
    metrics = IGSearch(num_random=2)(batch, policy).metrics
    gains = stepcredit.credit.ig_search.score_steps(batch, policy, num_random=2)
    assert metrics["ig/steps"] == metrics["ig/scored"] == metrics["ig/pool_size"] == batch.num_steps == 6
    assert metrics["ig/gain_mean"] == pytest.approx(float(gains.gain.mean()))
    assert metrics["ig/gain_std"] == pytest.approx(float(gains.gain.std(correction=0)))
    assert metrics["ig/positive_share"] == pytest.approx(float((gains.gain > 0).float().mean()))
    assert metrics["ig/real_mean"] - metrics["ig/baseline_mean"] == pytest.approx(metrics["ig/gain_mean"], abs=1e-5)
    parts = [metrics[f"ig/tokens_{part}"] for part in ("trunk", "real", "counterfactual")]
    assert all(p > 0 for p in parts)
    assert metrics["tokens_forwarded"] == sum(parts)
    assert metrics["ig/seconds"] > 0
    assert metrics["advantage/bonus_abs_mean"] > 0
    assert all(f"ig/unscored_{why}" in metrics for why in ("no_documents", "too_long", "empty_pool"))
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    documented = IGSearch.__doc__ + stepcredit.credit.base.outcome_metrics.__doc__
    for name in metrics:
        assert f"`{name}`" in documented or name.startswith("ig/unscored_")


def test_no_searches_at_all(policy):
    batch = make([[0.0], [1.0]])
    credit = IGSearch()(batch, policy)
    assert torch.equal(credit.advantages, SearchR1()(batch, policy).advantages)
    assert credit.metrics["ig/scored"] == 0.0
    assert "ig/gain_mean" not in credit.metrics
    assert all(math.isfinite(value) for value in credit.metrics.values())


def test_presets():
    assert IGSearch.paper() == IGSearch()
    code = IGSearch.code()
    assert (code.head_tokens, code.head_weight, code.pool, code.trunk) == (3, 3.0, "batch", "skeleton")
    assert (code.answer_probe, code.max_context, code.alpha) == ("\n<answer> ", 4096, 0.3)


def test_presets_run(policy):
    batch = make(MIXED)
    assert IGSearch.code()(batch, policy).metrics["ig/scored"] == 6.0


def test_every_constant_is_documented():
    for method in (SearchR1, IGSearch):
        for field in dataclasses.fields(method):
            assert f"\n        {field.name}: " in method.__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            method().eps = 1.0


def test_registry():
    assert get_method("search_r1") == SearchR1()
    assert all(callable(make()) for make in METHODS.values())
    with pytest.raises(ValueError, match=r"unknown credit method 'ig_serach'.*did you mean 'ig_search'"):
        get_method("ig_serach")
