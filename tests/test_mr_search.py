"""`mr_search`: credit of episodes on a batch, and the recipe in the trainer."""

from __future__ import annotations

import dataclasses
import json
import math
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcredit.batch import RolloutBatch
from stepcredit.credit import MRSearch, SearchR1, get_method
from stepcredit.rollout import Episode, Rollout, SpanKind
from stepcredit.train import loop
from stepcredit.train.checkpoint import State
from stepcredit.train.loop import train
from stepcredit.train.metrics import documented
from stepcredit.train.overrides import apply_overrides
from stepcredit.train.progress import Reporter
from stepcredit.train.recipes import get_recipe
from stepcredit.train.rewards import assign_rewards
from stepcredit.train.setup import build
from tiny_run import tiny_config, tiny_parts
from turn_rollouts import ANSWER, Turn, by_turn, pieces, rollout, shuffled

#: An answer that the environment replies to: another episode follows.
REFLECT = Turn(0, (60, 61))


def meta(*rewards: float, searches: int = 1, group: int = 0) -> Rollout:
    """A rollout of an episode a reward: some searches, then an answer."""
    turns = [*[Turn()] * searches, REFLECT] * (len(rewards) - 1) + [Turn()] * searches + [ANSWER]
    made = rollout(turns, reward=rewards[-1], group=group)
    ends = [span.stop for span in made.spans if span.kind is SpanKind.ANSWER]
    made.episodes = [
        Episode(stop, searches * (n + 1), "x", {"total": reward})
        for n, (stop, reward) in enumerate(zip(ends, rewards, strict=True))
    ]
    made.validate()
    return made


def by_episode(batch: RolloutBatch, credit) -> list[list[float]]:
    """The advantage of each episode of each rollout, which all its turns must share."""
    found = []
    for one, turns in zip(batch.rollouts, by_turn(batch, credit.advantages), strict=True):
        size = len(turns) // max(len(one.episodes), 1)
        runs = [turns[at : at + size] for at in range(0, len(turns), size)]
        assert all(len(set(run)) == 1 for run in runs)
        found.append([run[0] for run in runs])
    return found


def three() -> RolloutBatch:
    return RolloutBatch.pack([meta(0.0, 1.0, 1.0), meta(1.0, 0.0, 1.0), meta(0.0, 0.0, 0.4)])


def test_by_hand():
    # Leave one out: -1/2 1 -1/2 | 1 -1/2 -1/2 | 0.3 0.3 -0.6
    found = by_episode(three(), MRSearch()(three(), None))
    for mine, hand in zip(found, [[0.8, 1.3, 0.3], [0.8, -0.2, 0.3], [-1.6, -1.1, -0.6]], strict=True):
        assert mine == pytest.approx(hand)
    discounted = by_episode(three(), MRSearch(gamma=0.5)(three(), None))
    assert discounted[0] == pytest.approx([-0.5 + 0.5 * 1.15, 1 + 0.15, 0.3])
    myopic = by_episode(three(), MRSearch(gamma=0.0)(three(), None))
    assert [row[0] for row in myopic] == pytest.approx([-0.5, 1.0, -0.5])


def test_a_groups_own_mean_and_deviation():
    group = by_episode(three(), MRSearch(baseline="group", gamma=0.0)(three(), None))
    assert [row[0] for row in group] == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
    divided = by_episode(three(), MRSearch(scale="std", gamma=0.0)(three(), None))
    assert [row[0] for row in divided] == pytest.approx([-0.5 * 3**0.5, 3**0.5, -0.5 * 3**0.5], abs=1e-4)


def test_exploration_episodes_can_be_left_out():
    plain, masked = (by_episode(three(), MRSearch(mask_exploration=mask)(three(), None)) for mask in (False, True))
    assert [row[:2] for row in masked] == [[0, 0]] * 3
    assert [row[2] for row in masked] == [row[2] for row in plain]
    early = RolloutBatch.pack([meta(1.0), meta(0.0, 1.0)])  # the last one that a rollout has
    assert by_episode(early, MRSearch(mask_exploration=True)(early, None)) == [[1.0], [0, 0]]


def test_a_rollout_that_ended_early_counts_for_nobody_later():
    batch = RolloutBatch.pack([meta(0.0, 1.0), meta(1.0), meta(0.2, 0.0), meta(0.6, 0.5, 0.7)])
    credit = MRSearch()(batch, None)
    first = [r - (1.8 - r) / 3 for r in (0.0, 1.0, 0.2, 0.6)]
    second = [r - (1.5 - r) / 2 for r in (1.0, 0.0, 0.5)]
    expected = [[first[0] + second[0], second[0]], [first[1]], [first[2] + second[1], second[1]]]
    for mine, hand in zip(by_episode(batch, credit), [*expected, [first[3] + second[2], second[2], 0.0]], strict=True):
        assert mine == pytest.approx(hand, abs=1e-6)
    assert credit.metrics["mr_search/ended_early"] == 3
    assert credit.metrics["mr_search/alone"] == 1
    reward = by_episode(batch, MRSearch(singleton="reward")(batch, None))
    assert reward[3] == pytest.approx([first[3] + second[2] + 0.7, second[2] + 0.7, 0.7], abs=1e-6)


def test_a_group_of_one():
    batch = RolloutBatch.pack([meta(1.0, 0.5), meta(0.0, 1.0, group=1), meta(1.0, 0.0, group=1)])
    credit = MRSearch()(batch, None)
    assert by_episode(batch, credit) == [[0, 0], [0, 1], [0, -1]]
    assert credit.metrics["mr_search/alone"] == 2
    assert by_episode(batch, MRSearch(singleton="reward")(batch, None))[0] == [1.5, 0.5]


def test_metrics():
    batch = RolloutBatch.pack(
        [meta(0.0, 1.0), meta(1.0, 0.0), meta(0.5, 0.5), meta(0.2), meta(1.0, 1.0, group=4), meta(1.0, 1.0, group=4)]
    )
    credit = MRSearch()(batch, None)
    assert credit.metrics == {
        "mr_search/episodes": pytest.approx(11 / 6),
        "mr_search/reward_1": pytest.approx(3.7 / 6),
        "mr_search/reward_2": pytest.approx(3.5 / 5),
        "mr_search/improved": pytest.approx(1 / 5),
        "mr_search/worsened": pytest.approx(1 / 5),
        "mr_search/ended_early": 1.0,
        "mr_search/alone": 0.0,
        "advantage/zero_variance_groups": 0.5,
        "advantage/outcome_abs_mean": pytest.approx(float(credit.advantages[batch.policy_mask].abs().mean())),
    }
    for name in credit.metrics:
        assert documented(name)
        assert f"`{name}`" in MRSearch.__doc__
    single = RolloutBatch.pack([meta(1.0), meta(0.0)])
    assert "mr_search/improved" not in MRSearch()(single, None).metrics


@st.composite
def batches(draw: st.DrawFn) -> RolloutBatch:
    """Groups of any size in any order, rollouts of one to three episodes."""
    values = st.sampled_from([0.0, 0.0, 1.0, 0.3])
    made = []
    for _ in range(draw(st.integers(1, 7))):
        rewards = draw(st.lists(values, min_size=1, max_size=3))
        made.append(meta(*rewards, searches=draw(st.integers(0, 2)), group=draw(st.integers(0, 2))))
    return RolloutBatch.pack(made)


@given(batch=batches(), gamma=st.sampled_from([0.0, 0.7, 1.0]), data=st.data())
@settings(max_examples=80, deadline=None)
def test_ragged_batches_follow_the_formula_in_any_order(batch, gamma, data):
    credit = MRSearch(gamma=gamma)(batch, None)
    rewards = [one.episode_rewards for one in batch.rollouts]
    relative: list[list[float]] = []
    for i, mine in enumerate(rewards):
        row = []
        for n, reward in enumerate(mine):
            others = [
                r[n] for j, r in enumerate(rewards) if j != i and batch.groups[j] == batch.groups[i] and len(r) > n
            ]
            row.append(reward - math.fsum(others) / len(others) if others else 0.0)
        relative.append(row)
    for mine, row in zip(by_episode(batch, credit), relative, strict=True):
        expected = [sum(gamma ** (m - n) * row[m] for m in range(n, len(row))) for n in range(len(row))]
        assert mine == pytest.approx(expected, abs=1e-5)
    order = data.draw(st.permutations(range(len(batch))))
    other = pieces(shuffled(batch, order), MRSearch(gamma=gamma)(shuffled(batch, order), None).advantages)
    for b, mine in zip(order, other, strict=True):
        torch.testing.assert_close(mine, pieces(batch, credit.advantages)[b], rtol=1e-5, atol=1e-6)


@given(batch=batches())
@settings(max_examples=20, deadline=None)
def test_leave_one_out_sums_to_nothing_in_a_group(batch):
    myopic = by_episode(batch, MRSearch(gamma=0.0)(batch, None))
    for group in batch.groups.unique():
        rows = [row for row, g in zip(myopic, batch.groups, strict=True) if g == group]
        for n in range(max(map(len, rows))):
            assert math.fsum(row[n] for row in rows if len(row) > n) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.3, 1.0])
def test_equal_rewards_are_exactly_nothing(reward):
    batch = RolloutBatch.pack([meta(reward, reward) for _ in range(3)])
    credit = MRSearch()(batch, None)
    assert not credit.advantages.any()
    assert credit.metrics["advantage/zero_variance_groups"] == 1
    # A group that fails at first and then now and then learns, the first episode too.
    later = RolloutBatch.pack([meta(0.0, 1.0), meta(0.0, 0.0)])
    assert by_episode(later, MRSearch()(later, None)) == [[1, 1], [-1, -1]]
    assert by_episode(later, MRSearch(gamma=0.0)(later, None)) == [[0, 1], [0, -1]]


@pytest.mark.parametrize("options", [{}, {"eps": 1e-2, "ddof": 0}, {"scale": "none"}, {"singleton": "zero"}])
@given(rewards=st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.3]), st.integers(0, 2)), min_size=1, max_size=7))
@settings(max_examples=20, deadline=None)
def test_one_episode_is_search_r1_to_the_bit_or_leaves_one_out(options, rewards):
    batch = RolloutBatch.pack([rollout([Turn(), ANSWER], reward=r, group=g) for r, g in rewards])
    plain = SearchR1(**options)(batch, None).advantages
    method = MRSearch(baseline="group", **{"scale": "std", "singleton": "reward", **options})
    assert torch.equal(method(batch, None).advantages, plain)
    noted = RolloutBatch.pack([meta(r, group=g) for r, g in rewards])  # an episode noted down, and so in the others
    assert torch.equal(method(noted, None).advantages, SearchR1(**options)(noted, None).advantages)
    centred = by_turn(batch, SearchR1(scale="none", singleton="zero")(batch, None).advantages)
    size = [sum(g == other for _, other in rewards) for _, g in rewards]
    left_out = by_turn(batch, MRSearch()(batch, None).advantages)
    for mine, theirs, n in zip(left_out, centred, size, strict=True):
        assert mine[0] == pytest.approx(theirs[0] * n / max(n - 1, 1), abs=1e-6)


def test_rewards_that_nobody_assigned_are_an_error():
    batch = three()
    batch.rollouts[1].episodes[0].rewards = {"f1": 1.0}
    with pytest.raises(ValueError, match=r"question 'q0' has no reward 'total'; parts: \{'f1': 1.0\}"):
        MRSearch()(batch, None)
    batch.rollouts[1].episodes[0].rewards = {"total": math.nan}
    with pytest.raises(ValueError, match="rewards must be finite"):
        MRSearch()(batch, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"credit\.gamma must be in \[0, 1\], got 1\.5"),
        ({"baseline": "mean"}, r"credit\.baseline must be one of leave_one_out, group, got 'mean'"),
        ({"eps": -1}, r"credit\.eps must be at least 0, got -1"),
    ],
)
def test_bad_constants_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MRSearch(**options)
    assert get_method("mr_search") == MRSearch()
    for field in dataclasses.fields(MRSearch):
        assert f"\n        {field.name}: " in MRSearch.__doc__


# The recipe


def test_the_recipe_trains(tmp_path):
    """Two steps of the recipe with a tiny policy that searches and answers now and then, as its own does later."""
    words = ["steps=2", "questions_per_step=2", "group_size=4", "model.name=tiny", "model.dtype=float32"]
    words += ["model.device=cpu", "sampling.max_turn_tokens=32", "sampling.max_answer_tokens=12"]
    words += ["optimizer.learning_rate=1e-3", "warm_start.steps=2", "warm_start.batch=6", "rewards.gold_hit=0.5"]
    words += ["evaluation.questions=2", "evaluation.samples=0"]
    config = apply_overrides(get_recipe("mr_search"), words)
    built, searching = build(config, Reporter()), tiny_parts(searching=True)
    assert built.environment.episodes == 3
    parts = dataclasses.replace(searching, environment=built.environment)
    before = {k: v.clone() for k, v in parts.model.state_dict().items()}
    train(config, parts, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line if not documented(name)} == set()
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    started = [line for line in lines if line["phase"] == "warm_start"]
    assert all(line["em_episode_1"] == line["em_episode_3"] == line["em"] == 1 for line in started)
    assert all(3 <= line["searches"] <= 6 for line in started)
    steps = [line for line in lines if line["phase"] == "grpo"]
    assert len(steps) == 2
    assert all(line["mr_search/episodes"] > 1 and "mr_search/reward_2" in line for line in steps)
    assert any(not torch.equal(before[k], v) for k, v in parts.model.state_dict().items())


def test_twenty_steps_move_what_episodes_earn(monkeypatch):
    """Rewards that a policy which knows nothing can earn: 1 for an episode that it ends with an answer."""

    def answered(rollouts, weights, tokenizer):
        assign_rewards(rollouts, weights, tokenizer)
        for one in rollouts:
            for episode in one.episodes:
                episode.rewards["total"] = float(episode.answer is not None)
            one.rewards["total"] = float(one.finish == "answered")

    monkeypatch.setattr(loop, "assign_rewards", answered)
    config = tiny_config("credit=mr_search", "environment.episodes=2", "questions_per_step=1", "group_size=10")
    config = apply_overrides(config, ["optimizer.learning_rate=1e-3", "steps=20", "sampling.max_turn_tokens=32"])
    parts = tiny_parts(searching=True)
    parts.environment.episodes = 2
    steps = [loop.train_step(config, parts, State(), step, None) for step in range(config.steps)]
    assert all(math.isfinite(v) for line in steps for v in line.values() if isinstance(v, float))
    for name in ("mr_search/reward_1", "mr_search/reward_2", "mr_search/episodes"):
        earned = [line[name] for line in steps]
        assert fmean(earned[-4:]) > fmean(earned[:4]) + 0.1
