"""What holds of every credit method: documentation, registry, and two steps of training."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from stepcredit.batch import RolloutBatch
from stepcredit.credit import METHODS, TIPS, SearchR1
from stepcredit.train import __main__ as command
from stepcredit.train.checkpoint import State
from stepcredit.train.loop import train, train_step
from stepcredit.train.metrics import documented
from stepcredit.train.recipes import RECIPES
from stepcredit.train.setup import reference_policy
from tiny_run import played, same, tiny_config, tiny_parts

DOCS = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
PEERS = ("igpo", "gigpo", "tips", "step_search", "mr_search")
#: comam credits several agents, which have a trainer of their own (test_train_memory.py).
OF_ONE_POLICY = [name for name in METHODS if name != "comam"]


@pytest.mark.parametrize("name", OF_ONE_POLICY)
def test_two_steps_of_training_stay_finite(name):
    config, parts = tiny_config(f"credit={name}"), tiny_parts(searching=True)
    before = {k: v.clone() for k, v in parts.model.state_dict().items()}
    reference = reference_policy(config, parts)
    for step in range(2):
        metrics = train_step(config, parts, State(), step, reference, verify=step == 0)
        assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))
        assert [key for key in metrics if not documented(key)] == []
    assert metrics["searches"] > 0
    # Nothing is right here, so that the rewards of multi_search are all 0; test_multi_search.py trains its own recipe.
    assert same(before, parts.model.state_dict()) == (name == "multi_search")


@pytest.mark.parametrize("name", METHODS)
def test_the_environments_tokens_have_no_advantage(name):
    parts = tiny_parts()
    batch = played(parts, 8, group_size=4)
    for rollout in batch.rollouts:  # multi_search and comam read parts of the reward
        rollout.rewards["f1"] = rollout.rewards["local"] = rollout.rewards["total"]
    credit = METHODS[name]()(batch, parts.scorer)
    assert credit.advantages.dtype == torch.float32
    assert not credit.advantages[~batch.policy_mask].any()
    assert credit.advantages.any()


@pytest.mark.parametrize("name", OF_ONE_POLICY)
def test_rollouts_of_several_episodes_have_credit(name):
    parts = tiny_parts()
    parts.environment.episodes = 2
    batch = played(parts, 8, group_size=4)
    assert {len(rollout.episodes) for rollout in batch.rollouts} == {2}
    for rollout in batch.rollouts:
        for part in (rollout.rewards, rollout.episodes[0].rewards, rollout.episodes[1].rewards):
            part["f1"] = part["total"] = rollout.rewards["total"]
    advantages = METHODS[name]()(batch, parts.scorer).advantages
    assert advantages.isfinite().all()
    assert advantages.any()
    assert not advantages[~batch.policy_mask].any()
    if name == "search_r1":
        whole = RolloutBatch.pack([dataclasses.replace(rollout, episodes=[]) for rollout in batch.rollouts])
        assert torch.equal(SearchR1()(whole, None).advantages, advantages)


@pytest.mark.parametrize("name", PEERS)
def test_the_coefficient_at_zero_is_search_r1_to_the_bit(name):
    parts = tiny_parts()
    batch = played(parts, 8, group_size=4)
    zero = {
        "igpo": {"weight": 0.0, "ddof": 1, "singleton": "reward"},
        "gigpo": {"omega": 0.0},
        "mr_search": {"baseline": "group", "scale": "std", "singleton": "reward"},  # one episode: nothing to weigh
    }.get(name, {"alpha": 0.0})
    method = dataclasses.replace(METHODS[name](), **zero)
    assert torch.equal(method(batch, parts.scorer).advantages, SearchR1()(batch, parts.scorer).advantages)


@pytest.mark.parametrize("name", PEERS)
def test_metrics_are_in_the_classs_docstring(name):
    parts = tiny_parts()
    method = METHODS[name]()
    metrics = method(played(parts, 8, group_size=4), parts.scorer).metrics
    for key in metrics:
        inherited = key.startswith(("advantage/zero", "advantage/outcome", "ig/")) or key == "tokens_forwarded"
        assert inherited or f"`{key}`" in type(method).__doc__, key


def test_the_reference_teaches_where_it_is_asked_to(tmp_path):
    """It is made without a KL term, stays as it was while the policy moves, and is in the checkpoint."""
    parts = tiny_parts(searching=True)
    before = {k: v.clone() for k, v in parts.model.state_dict().items()}
    seen = []

    class Spy(TIPS):
        __slots__ = ()

        def __call__(self, batch, policy, *, teacher=None, **options):
            seen.append(teacher.model.state_dict())
            assert policy is parts.scorer
            return TIPS.__call__(self, batch, policy, teacher=teacher, **options)

    config = dataclasses.replace(tiny_config("checkpoint_every=2"), credit=Spy(teacher="reference", alpha=1.0))
    train(config, parts, tmp_path)
    assert len(seen) == 2
    assert same(seen[1], before)
    assert not same(parts.model.state_dict(), before)
    assert (tmp_path / "checkpoint/reference.safetensors").is_file()
    assert reference_policy(tiny_config("credit=tips"), parts) is None
    assert reference_policy(tiny_config("credit=search_r1"), parts) is None
    assert reference_policy(tiny_config("loss.kl_coef=0.1"), parts) is not None


def test_the_list_has_a_line_for_each_recipe_and_method(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Recipes:"
    split = lines.index("Credit methods, by credit=NAME:")
    assert [line.split()[0] for line in lines[1 : split - 1]] == list(RECIPES)
    assert [line.split()[0] for line in lines[split + 1 :]] == list(METHODS)
    assert all(len(line.split()) > 3 for line in [*lines[1 : split - 1], *lines[split + 1 :]])


@pytest.mark.parametrize("name", PEERS)
def test_the_documentation_has_a_section_whose_command_is_right(name):
    section = DOCS.split(f"\n## `{name}`")[1].split("\n## ")[0]
    words = next(line for line in section.splitlines() if line.startswith("python -m stepcredit.train")).split()[3:]
    assert words[0] == "tiny"
    assert type(tiny_config(*words[1:]).credit) is type(METHODS[name]())
    fields = {f.name for f in dataclasses.fields(METHODS[name]())}
    named = {word.split("=")[0] for word in section.replace("`", " ").split() if word.startswith("credit.")}
    assert {word.removeprefix("credit.") for word in named} <= fields
