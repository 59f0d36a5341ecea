"""`multi_search`: credit of several rewards on a batch, and the recipe in the trainer."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch

from scripted_rollouts import SEARCH_R1, by_rollout, random_policy, relative, write
from stepcredit.batch import RolloutBatch
from stepcredit.credit import MultiSearch, SearchR1, get_method
from stepcredit.protocol import PROTOCOLS
from stepcredit.rollout import Question, Search, Span, SpanKind
from stepcredit.scorer import PolicyScorer
from stepcredit.train.loop import train
from stepcredit.train.metrics import documented
from stepcredit.train.overrides import apply_overrides
from stepcredit.train.progress import Reporter
from stepcredit.train.recipes import get_recipe
from stepcredit.train.setup import build
from tokenizers_under_test import BUILT

TOKENIZER = BUILT["byte_bpe"]()
QUESTIONS = [Question("a", "Which river flows through Lyon?", ("Rhône",)), Question("b", "Capital?", ("Paris",))]
NAN = math.nan
#: Group, and the rewards f1, multi_query and merge; the second group's answers are all wrong.
MIXED = [
    (0, 1.0, 1.0, 1.0),
    (0, 1.0, 1.0, 0.0),
    (0, 0.5, 0.0, 0.0),
    (0, 0.0, 0.0, 0.0),
    (1, 0.0, 0.0, 0.0),
    (1, 0.0, 0.0, 0.0),
]


@pytest.fixture(scope="module")
def policy() -> PolicyScorer:
    return PolicyScorer(random_policy("llama", TOKENIZER), TOKENIZER, SEARCH_R1)


def make(rows, names=("f1", "multi_query", "merge")) -> RolloutBatch:
    rollouts = []
    for i, (group, *rewards) in enumerate(rows):
        searches = [(f"query {i}", "Lyon lies on the Rhône.", None)] * (i % 3)
        rollout = write(TOKENIZER, QUESTIONS[group], searches, protocol=SEARCH_R1, reward=rewards[0], group=group)
        rollout.rewards |= dict(zip(names, rewards, strict=False))
        rollouts.append(rollout)
    return RolloutBatch.pack(rollouts)


def test_by_hand(policy):
    batch = make(MIXED)
    terms = [relative(column) for column in ([1.0, 1.0, 0.5, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])]
    expected = [sum(w * term[i] for w, term in zip((1.0, 0.5, 2.0), terms, strict=True)) for i in range(4)]
    method = MultiSearch(multi_query=0.5, merge=2.0, batch_norm=False)
    assert by_rollout(method(batch, policy), batch) == pytest.approx([*expected, 0.0, 0.0], abs=1e-6)
    spread = math.sqrt(sum(x * x for x in expected) / 5)
    normed = [x / (spread + 1e-4) for x in expected]
    credit = dataclasses.replace(method, batch_norm=True)(batch, policy)
    assert by_rollout(credit, batch) == pytest.approx([*normed, 0.0, 0.0], abs=1e-6)
    assert by_rollout(credit, batch)[4:] == [0.0, 0.0]  # a group that fails altogether learns nothing
    assert credit.distillation is None


def test_decoupled_rewards_keep_apart_what_their_sum_mixes(policy):
    """Right, but one with a merge and one with several queries: the same total, another advantage."""
    rows = [(0, 1.0, 0.0, 1.0), (0, 1.0, 1.0, 0.0), (0, 1.0, 1.0, 0.0), (0, 0.0, 0.0, 0.0)]
    batch = make(rows)
    merged, several, same, wrong = by_rollout(MultiSearch()(batch, policy), batch)
    assert several == same
    assert merged > several > wrong


@pytest.mark.parametrize("options", [{}, {"ddof": 0}, {"scale": "none"}, {"singleton": "zero"}])
@pytest.mark.parametrize("rows", [MIXED, [(0, 0.0, 0.0, 1.0), (0, 0.0, 1.0, 0.0), (1, 0.7, 0.0, 0.0)]])
def test_auxiliary_weights_of_zero_are_search_r1_to_the_bit(policy, options, rows):
    batch = make(rows)
    plain = SearchR1(eps=1e-4, **options)(batch, policy).advantages
    method = MultiSearch(multi_query=0.0, merge=0.0, batch_norm=False, **options)
    assert torch.equal(method(batch, policy).advantages, plain)
    without = make(rows, names=("f1",))  # what has no weight need not be there
    assert torch.equal(method(without, policy).advantages, plain)


def test_permuting_the_batch_permutes_the_advantages(policy):
    order = [3, 5, 0, 4, 2, 1]
    batch, other = make(MIXED), make([MIXED[i] for i in order])
    values = by_rollout(MultiSearch()(batch, policy), batch)
    assert by_rollout(MultiSearch()(other, policy), other) == pytest.approx([values[i] for i in order], abs=1e-6)


def test_missing_rewards_count_for_nobody_and_are_counted(policy):
    batch = make([(0, 1.0, NAN, 1.0), (0, 0.0, 0.0, 0.0), (0, 0.5, 1.0, NAN)])
    del batch.rollouts[0].rewards["merge"]
    credit = MultiSearch(batch_norm=False)(batch, policy)
    f1, multi = relative([1.0, 0.0, 0.5]), relative([0.0, 1.0])
    # The only merge reward that is there is a group of one: its reward, 0.
    assert by_rollout(credit, batch) == pytest.approx([f1[0], f1[1] + multi[0], f1[2] + multi[1]], abs=1e-6)
    assert credit.metrics["multi_search/missing_rewards"] == 3.0
    assert credit.metrics["multi_search/constant_merge"] == 1.0


def test_a_reward_that_nobody_assigned_is_an_error(policy):
    batch = make(MIXED, names=("f1", "multi_query"))
    with pytest.raises(
        ValueError, match=r"no rollout has a reward 'merge', .*credit\.merge; parts: total, f1, multi_q"
    ):
        MultiSearch()(batch, policy)
    MultiSearch(merge=0.0)(batch, policy)


def test_metrics(policy):
    batch = make(MIXED)
    searches = [[3, 3], [2], [], [5, 1], [1], [3, 2]]
    for rollout, sizes in zip(batch.rollouts, searches, strict=True):
        rollout.searches = [Search(i, "", ("p",), queries=("x",) * n) for i, n in enumerate(sizes)]
    first = batch.rollouts[0]
    last = first.spans[-1]
    first.spans[-1] = Span(SpanKind.MERGE, last.start, last.stop, 1)
    credit = MultiSearch()(batch, policy)
    tokens = credit.advantages[batch.policy_mask]
    assert credit.metrics == {
        "multi_search/queries": pytest.approx(20 / 8),
        "multi_search/several_share": pytest.approx(3 / 6),
        "multi_search/merged_share": pytest.approx(1 / 8),
        "multi_search/constant_f1": 0.5,
        "multi_search/constant_multi_query": 0.5,
        "multi_search/constant_merge": 0.5,
        "multi_search/missing_rewards": 0.0,
        "advantage/zero_variance_groups": 0.5,
        "advantage/outcome_abs_mean": pytest.approx(float(tokens.abs().mean())),
    }
    for name in credit.metrics:
        assert documented(name)
        assert f"`{re.sub('constant_.*', 'constant_<reward>', name)}`" in MultiSearch.__doc__
    constant = make([(0, 1.0, 0.0, 1.0), (0, 1.0, 1.0, 1.0)])
    assert MultiSearch()(constant, policy).metrics["advantage/zero_variance_groups"] == 0.0
    unweighted = MultiSearch(multi_query=0.0)(constant, policy)
    assert unweighted.metrics["advantage/zero_variance_groups"] == 1.0
    assert not unweighted.advantages.any()
    for rollout in constant.rollouts:
        rollout.searches = []
    assert "multi_search/queries" not in MultiSearch()(constant, policy).metrics


def test_constants():
    assert get_method("multi_search") == MultiSearch()
    for field in dataclasses.fields(MultiSearch):
        assert f"\n        {field.name}: " in MultiSearch.__doc__
    with pytest.raises(ValueError, match=r"credit\.merge must be finite, got nan"):
        MultiSearch(merge=NAN)
    with pytest.raises(ValueError, match=r"credit\.eps must be at least 0, got -1"):
        MultiSearch(eps=-1)


def test_the_recipe_trains(tmp_path):
    """Two steps of the recipe with the tiny policy."""
    words = ["steps=2", "questions_per_step=2", "group_size=4", "model.name=tiny", "model.dtype=float32"]
    words += ["model.device=cpu", "sampling.max_turn_tokens=32", "optimizer.learning_rate=1e-3", "warm_start.steps=8"]
    words += ["warm_start.learning_rate=1e-2", "warm_start.batch=6", "evaluation.questions=2", "evaluation.samples=0"]
    config = apply_overrides(get_recipe("multi_search"), words)
    parts = build(config, Reporter())
    assert parts.environment.protocol == PROTOCOLS["multi_search"]
    assert len(parts.tokenizer.encode("<merge>")) <= 3  # a tag of its own
    train(config, parts, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line if not documented(name)} == set()
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    started = [line for line in lines if line["phase"] == "warm_start"]
    assert len(started) == 8
    assert 0 < sum(line["reward_multi_query"] for line in started) < 8
    assert 0 < sum(line["reward_merge"] for line in started) < 8
    steps = [line for line in lines if line["phase"] == "grpo"]
    assert len(steps) == 2
    assert all("multi_search/several_share" in line and line["multi_search/missing_rewards"] == 0 for line in steps)
