"""`comam`: ranking consistency, weights, and credit of several agents on one batch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch

from scripted_rollouts import SEARCH_R1, by_rollout, random_policy, relative, write
from stepcredit.batch import RolloutBatch
from stepcredit.credit import CoMAM, SearchR1, get_method
from stepcredit.credit.comam import consistency_weights, ranking_consistency
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer
from stepcredit.train.metrics import documented
from stepcredit.train.overrides import apply_overrides, flatten
from stepcredit.train.recipes import get_recipe
from tokenizers_under_test import BUILT

DOCS = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
TOKENIZER = BUILT["byte_bpe"]()
QUESTIONS = [
    Question("a", "Which tea?", ("green",)),
    Question("b", "Which sport?", ("judo",)),
    Question("c", "Which city?", ("Oslo",)),
]
NAN = math.nan
#: Group, agent, and the rewards local and total; in the second group nobody is right.
MIXED = [
    (0, "extraction", 0.9, 1.0),
    (0, "extraction", 0.5, 0.0),
    (0, "extraction", 0.7, 0.0),
    (0, "extraction", 0.1, 1.0),
    (1, "extraction", 0.5, 0.0),
    (1, "extraction", 0.3, 0.0),
    (0, "profile", 0.5, 1.0),
    (0, "profile", 0.5, 0.0),
    (0, "profile", 0.5, 0.0),
    (0, "profile", 0.1, 1.0),
    (1, "profile", 0.0, 0.0),
    (1, "profile", 0.0, 0.0),
]
#: The same and a group of one trajectory.
WITH_A_SINGLE_ONE = [*MIXED, (2, "extraction", 0.3, 1.0), (2, "profile", 0.6, 1.0)]


def log2(x):
    return math.log(x) / math.log(2)


def make(rows) -> RolloutBatch:
    rollouts = []
    for i, (group, agent, local, total) in enumerate(rows):
        searches = [(f"query {i}", "The user drinks tea.", None)] * (i % 3)
        rollout = write(TOKENIZER, QUESTIONS[group], searches, protocol=SEARCH_R1, reward=total, group=group)
        rollout.agent = agent
        rollout.rewards["local"] = local
        rollouts.append(rollout)
    return RolloutBatch.pack(rollouts)


# NDCG and weights


def test_consistency_by_hand():
    # Ranked by the local reward: right, wrong, wrong, right; ideally both right ones come first.
    assert ranking_consistency([0.9, 0.5, 0.7, 0.1], [1, 0, 0, 1]) == pytest.approx(
        (1 + 1 / log2(5)) / (1 + 1 / log2(3)), abs=1e-12
    )
    assert ranking_consistency([0.9, 0.5, 0.7, 0.1], [1, 0, 0, 1]) == pytest.approx(0.877215, abs=1e-6)
    assert ranking_consistency([3.0, 1.0, 2.0], [1, 0, 1]) == 1.0
    assert ranking_consistency([0.0, 1.0], [1, 0]) == pytest.approx(1 / log2(3))
    # Outcomes need not be binary: the relevance is the outcome itself.
    assert ranking_consistency([1.0, 2.0], [0.5, 0.25]) == pytest.approx(
        (0.25 + 0.5 / log2(3)) / (0.5 + 0.25 / log2(3))
    )


def test_ties_by_hand_and_over_all_their_orders():
    shared = (1 + 1 / log2(3) + 1 / 2) / 3
    assert ranking_consistency([0.5, 0.5, 0.5, 0.1], [1, 0, 0, 0]) == pytest.approx(shared)
    local, outcome = [0.5, 0.2, 0.5, 0.2, 0.2, 0.9], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    discounts = [1 / log2(rank + 1) for rank in range(1, 7)]
    ideal = sum(discounts[:3])
    orders = [p for p in itertools.permutations(range(6)) if [local[i] for i in p] == sorted(local, reverse=True)]
    assert len(orders) == 12
    mean = sum(sum(outcome[i] * d for i, d in zip(p, discounts, strict=True)) for p in orders) / len(orders) / ideal
    assert ranking_consistency(local, outcome) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("outcome", [[0.0] * 4, [1.0] * 4])
def test_outcomes_that_tell_nothing_apart_agree_with_every_ranking(outcome):
    assert ranking_consistency([0.1, 0.9, 0.9, 0.3], outcome) == pytest.approx(1.0, abs=1e-12)
    assert ranking_consistency([0.7], [0.0]) == ranking_consistency([0.7], [1.0]) == 1.0


def test_consistency_does_not_depend_on_the_order_of_trajectories():
    rng = random.Random(0)
    for _ in range(50):
        size = rng.randint(2, 9)
        rows = [(rng.choice([0.0, 0.2, 0.2, 0.7]), float(rng.random() < 0.4)) for _ in range(size)]
        values = set()
        for _ in range(5):
            rng.shuffle(rows)
            values.add(ranking_consistency(*zip(*rows, strict=True)))
        assert len(values) == 1
        assert 0 <= values.pop() <= 1


def test_weights_by_hand_sum_to_one():
    weights = consistency_weights([1.0, 0.877215, 0.710310])
    assert weights == pytest.approx([0.379802, 0.335917, 0.284281], abs=1e-6)
    rng = random.Random(1)
    for _ in range(100):
        weights = consistency_weights([rng.random() for _ in range(3)])
        assert sum(weights) == pytest.approx(1.0, abs=1e-12)
        assert all(1 / (1 + 2 * math.e) < w < math.e / (math.e + 2) for w in weights)
    assert consistency_weights([0.3]) == [1.0]


@pytest.mark.parametrize(
    ("local", "outcome", "message"),
    [
        ([1.0, NAN], [1.0, 0.0], r"local must be finite, got \[1.0, nan\]"),
        ([1.0, 0.0], [1.0, -1.0], r"outcome must be finite and at least 0, got \[1.0, -1.0\]"),
        ([1.0], [1.0, 0.0], r"one shape \[G\], got \(1,\) and \(2,\)"),
        ([], [], r"one shape \[G\], got \(0,\) and \(0,\)"),
    ],
)
def test_bad_rewards_are_refused(local, outcome, message):
    with pytest.raises(ValueError, match=message):
        ranking_consistency(local, outcome)


# Credit


def test_credit_by_hand():
    batch = make(MIXED)
    v = [0.8772153153380493, (1 + 1 / log2(3) + 1 / 2) / 3 / (1 + 1 / log2(3)) + 1 / log2(5) / (1 + 1 / log2(3))]
    first, second = (math.exp(x) / sum(map(math.exp, v)) for x in v)
    extraction = relative([0.9 + first, 0.5, 0.7, 0.1 + first], 1e-6)
    profile = relative([0.5 + second, 0.5, 0.5, 0.1 + second], 1e-6)
    # Nobody is right in the second group: there the local rewards are all there is.
    local = relative([0.5, 0.3], 1e-6)
    expected = [*extraction, *local, *profile, 0.0, 0.0]
    credit = CoMAM()(batch)
    assert by_rollout(credit, batch) == pytest.approx(expected, abs=1e-5)
    assert credit.distillation is None
    assert credit.metrics["comam/weight_extraction"] == pytest.approx((first + 0.5) / 2)
    assert credit.metrics["comam/ndcg_profile"] == pytest.approx((v[1] + 1) / 2)
    first, second = relative([1.4, 0.5, 0.7, 0.6], 1e-6), relative([1.0, 0.5, 0.5, 0.6], 1e-6)
    uniform = [*first, *local, *second, 0.0, 0.0]
    credit = CoMAM(weights="uniform")(batch)
    assert by_rollout(credit, batch) == pytest.approx(uniform, abs=1e-5)
    assert credit.metrics["comam/weight_profile"] == 0.5


@pytest.mark.parametrize("options", [{}, {"ddof": 0}, {"scale": "none"}, {"singleton": "zero", "eps": 1e-4}])
def test_without_the_other_reward_every_agent_is_search_r1_to_the_bit(options):
    """With the weight of the pipeline's reward at 0 on the local reward, and without a local one on the pipeline's."""
    batch = make(WITH_A_SINGLE_ONE)
    bounds = batch.cu_seqlens.tolist()
    for reward, part in (("local", "local"), ("global", "total")):
        ours = CoMAM(reward=reward, **options)(batch).advantages
        assert ours.any()
        for agent in ("extraction", "profile"):
            rows = [b for b, rollout in enumerate(batch.rollouts) if rollout.agent == agent]
            own = [batch.rollouts[b] for b in rows]
            alone = [dataclasses.replace(rollout, rewards={"total": rollout.rewards[part]}) for rollout in own]
            theirs = SearchR1(**options)(RolloutBatch.pack(alone), None).advantages
            assert torch.equal(torch.cat([ours[bounds[b] : bounds[b + 1]] for b in rows]), theirs)
    without = make(WITH_A_SINGLE_ONE)
    for rollout in without.rollouts:
        del rollout.rewards["local"]
    assert torch.equal(CoMAM(reward="global")(without).advantages, CoMAM(reward="global")(batch).advantages)


def test_one_agent_with_the_whole_reward_is_search_r1_to_the_bit():
    """Of one agent the weight is 1, so that without local rewards its reward is the outcome."""
    batch = make([(g, "", 0.0, total) for g, a, _, total in MIXED if a == "extraction"])
    assert torch.equal(CoMAM()(batch).advantages, SearchR1()(batch, None).advantages)


def test_permuting_trajectories_and_agents_permutes_the_advantages():
    order = [7, 3, 5, 0, 11, 4, 2, 1, 10, 9, 6, 8]
    batch, other = make(MIXED), make([MIXED[i] for i in order])
    values = by_rollout(CoMAM()(batch), batch)
    assert by_rollout(CoMAM()(other), other) == pytest.approx([values[i] for i in order], abs=1e-6)
    a, b = CoMAM()(batch).metrics, CoMAM()(other).metrics
    assert {k: v for k, v in a.items() if "ndcg" in k} == {k: v for k, v in b.items() if "ndcg" in k}


def test_the_equivalent_code_of_the_documentation():
    section = DOCS.split("\n## `comam`")[1].split("\n## ")[0]
    equivalent, loop = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    local = torch.tensor([[0.9, 0.5, 0.7, 0.1], [0.2, 0.3, 0.4, 0.1], [0.0, 0.6, 0.3, 0.9]])
    names = {"torch": torch, "G": 4, "eps": 1e-6, "local": local, "r": torch.tensor([1.0, 0.0, 0.0, 1.0])}
    exec(equivalent, names)
    rows = [(0, f"agent {n}", float(local[n, i]), float(names["r"][i])) for n in range(3) for i in range(4)]
    batch = make(rows)
    assert by_rollout(CoMAM()(batch), batch) == pytest.approx(names["A"].flatten().tolist(), abs=1e-5)
    everything = [(rollout, agent, own, r) for rollout, (_, agent, own, r) in zip(batch.rollouts, rows, strict=True)]
    names = {"RolloutBatch": RolloutBatch, "everything": everything}
    for rollout in batch.rollouts:
        rollout.rewards = {}
    exec(loop, names)
    assert torch.equal(torch.cat(names["per_rollout"]), CoMAM()(batch).advantages)


def test_the_documentations_commands_are_right():
    section = DOCS.split("\n## `comam`")[1].split("\n## ")[0]
    commands = re.findall(r"^python -m stepcredit\.train comam(.*)$", section.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert apply_overrides(get_recipe("comam"), command.split()).memory.conversations
    words = section.replace("`", " ").replace(",", " ").split()
    assert {w.split("=")[0] for w in words if w.startswith(("memory.", "credit."))} <= set(flatten(get_recipe("comam")))


def test_a_policy_is_not_asked():
    policy = PolicyScorer(random_policy("llama", TOKENIZER), TOKENIZER, SEARCH_R1)
    batch = make(MIXED)
    assert torch.equal(CoMAM()(batch, policy, step=3).advantages, CoMAM()(batch).advantages)
    assert policy.tokens_forwarded == 0


def test_missing_and_negative_rewards_name_question_and_agent():
    batch = make(MIXED)
    del batch.rollouts[7].rewards["local"]
    with pytest.raises(ValueError, match=r"question 'a', agent 'profile': a rollout has no reward 'local'; .* total"):
        CoMAM()(batch)
    negative = [(g, a, own, -1.0 if g else r) for g, a, own, r in MIXED]
    with pytest.raises(ValueError, match=r"question 'b', agent 'extraction': outcome must be .* at least 0"):
        CoMAM()(make(negative))


@pytest.mark.parametrize("reward", ["both", "local", "global"])
def test_agents_without_the_same_trajectories_are_refused(reward):
    credit = CoMAM(reward=reward)
    batch = make(MIXED)
    batch.rollouts[6].agent = ""  # forgotten
    with pytest.raises(
        ValueError, match=r"'a': agents 'extraction' and '' must have .* \[0.0, 0.0, 1.0, 1.0\] and \[1.0\]"
    ):
        credit(RolloutBatch.pack(batch.rollouts))
    with pytest.raises(ValueError, match=r"question 'b': agents 'extraction' and 'profile' .* \[0.0, 0.0\] and \[\]"):
        credit(make(MIXED[:-2]))
    other = [*MIXED[:-1], (1, "profile", 0.0, 1.0)]
    with pytest.raises(ValueError, match=r"question 'b': agents .* \[0.0, 0.0\] and \[0.0, 1.0\]: is every"):
        credit(make(other))


def test_metrics():
    batch = make(MIXED)
    credit = CoMAM()(batch)
    values = credit.metrics
    assert values["comam/reward_extraction"] == pytest.approx(0.5)
    assert values["comam/reward_profile"] == pytest.approx(1.6 / 6)
    assert values["comam/all_wrong"] == 0.5
    assert values["advantage/zero_variance_groups"] == 0.25
    extraction = slice(0, int(batch.cu_seqlens[6]))
    own = credit.advantages[extraction][batch.policy_mask[extraction]]
    assert values["comam/advantage_extraction"] == pytest.approx(float(own.abs().mean()))
    assert values["advantage/outcome_abs_mean"] == pytest.approx(
        float(credit.advantages[batch.policy_mask].abs().mean())
    )
    for name in values:
        assert documented(name)
        assert f"`{re.sub('_(extraction|profile)', '_<agent>', name)}`" in CoMAM.__doc__
    assert not [name for name in CoMAM(reward="global")(batch).metrics if "weight" in name or "ndcg" in name]
    assert not [name for name in CoMAM(reward="local")(batch).metrics if "weight" in name]


def test_constants():
    assert get_method("comam") == CoMAM()
    for field in dataclasses.fields(CoMAM):
        assert f"\n        {field.name}: " in CoMAM.__doc__
    with pytest.raises(ValueError, match=r"credit\.weights must be one of adaptive, uniform, got 'equal'"):
        CoMAM(weights="equal")
    with pytest.raises(ValueError, match=r"credit\.eps must be at least 0, got -1"):
        CoMAM(eps=-1)
