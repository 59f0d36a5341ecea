"""StepCredit in verl, with verl's own classes: versions, configuration, advantage estimators, agent loop."""

# ruff: noqa: E402  (imports follow the skip)

from __future__ import annotations

import asyncio
import importlib.util
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

for _package in ("verl", "transfer_queue"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs the package {_package}: make test-frameworks", allow_module_level=True)

from datasets import Dataset
from hydra import compose, initialize_config_module
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import hf_tokenizer
from verl.utils.config import validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset

from stepcredit.credit import IGSearch
from stepcredit.integrations import _versions
from stepcredit.integrations._rows import question_of
from stepcredit.integrations.verl import (
    IGSearchTrainer,
    SearchAgentLoop,
    StepRewardOutput,
    grpo_with_steps,
    read_options,
)
from stepcredit.protocol import get_protocol
from stepcredit.rollout import Question
from towns import QUESTIONS, SCRIPTS, bits, save_policy
from verl_world import Server, configure, row

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


# ------------------------------------------------------------------------------------------------- versions, options


def test_other_versions_are_refused_by_range(monkeypatch):
    with pytest.raises(ImportError, match=r"nothing is not installed: pip install 'stepcredit\[nothing\]'"):
        _versions.require("nothing", "1", "2")
    for found in ("0.9.0", "0.10.0"):
        monkeypatch.setattr(_versions.metadata, "version", lambda _, found=found: found)
        with pytest.raises(RuntimeError, match=rf"verl {found} is not supported; .* verl>=0\.9\.1,<0\.10"):
            _versions.require("verl", "0.9.1", "0.10")


def test_options_are_read_from_verls_configuration(policy_path):
    options = read_options(configure(policy_path, "stepcredit.environment.top_k=5", "stepcredit.rewards.em=1"))
    assert options.credit == IGSearch(dead_zone=0.0)
    assert (options.environment, options.rewards.em) == ((("top_k", 5),), 1)
    with pytest.raises(
        ValueError, match=r"stepcredit\.environment\.episodes must be 1, as the agent loop plays one, got 3"
    ):
        read_options(configure(policy_path, "stepcredit.environment.episodes=3"))
    for override, message in [
        ("stepcredit.credit.alhpa=1", r"unknown field stepcredit\.credit\.alhpa; did you mean 'alpha'"),
        ("stepcredit.environment.topk=1", r"unknown field stepcredit\.environment\.topk"),
        ("stepcredit.protocl=refine", r"unknown field stepcredit\.protocl"),
        ("stepcredit.protocol=refien", "unknown protocol 'refien'"),
        ("stepcredit.rewards=3", "stepcredit.rewards must hold fields, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_options(configure(policy_path, override))
    with pytest.raises(ValueError, match=r"must be 'package\.module:function', got 'towns'"):
        replace(options, retriever="towns").make_environment()
    with pytest.raises(TypeError, match="returned str, which has no search"):
        replace(options, retriever="platform:node").make_environment()


def test_questions_come_from_rows():
    question = question_of(row("lyon"), [1, 2])
    assert (question.id, question.answers, question.supporting) == ("lyon", ("Rhône",), ("p-river",))
    assert question.text == QUESTIONS["lyon"][0]
    other = {**row("lyon"), "extra_info": {"index": 7}, "reward_model": {"ground_truth": "Rhône"}}
    assert question_of(other, [1]).id == "towns/7"
    other["extra_info"] = {}
    names = {question_of(other, ids).id for ids in ([1], [1], [2])}
    assert len(names) == 2
    with pytest.raises(ValueError, match="question 'towns/7': answers must hold"):
        question_of({**row("lyon"), "extra_info": {"index": 7}, "reward_model": {"ground_truth": []}}, [1])


# ---------------------------------------------------------------------------------------------- advantage estimator


def batch_of(rewards, mask, uids):
    tensors = {"token_level_rewards": rewards, "response_mask": mask}
    return DataProto.from_dict(tensors, non_tensors={"uid": np.array(uids, dtype=object)})


def hand_made():
    """Six rollouts of three groups, one of them of one; environment tokens inside; rewards on the last token."""
    mask = torch.ones(6, 8, dtype=torch.int64)
    mask[:, 3:5] = 0
    mask[1, 6:] = 0
    rewards = torch.zeros(6, 8)
    for i, outcome in enumerate([1.0, 0.0, 0.3, 0.3, 0.9, -0.7]):
        rewards[i, 5 if i == 1 else 7] = outcome
    return rewards, mask, ["a", "a", "b", "b", "b", "c"]


@pytest.mark.parametrize("by_std", [True, False])
def test_without_rewards_of_steps_the_estimator_is_verls_grpo_bit_for_bit(by_std):
    config = {"norm_adv_by_std_in_grpo": by_std}
    theirs = compute_advantage(batch_of(*hand_made()), "grpo", norm_adv_by_std_in_grpo=by_std, config=config)
    ours = compute_advantage(batch_of(*hand_made()), "grpo_steps", config=config)
    for name in ("advantages", "returns"):
        assert torch.equal(bits(ours.batch[name]), bits(theirs.batch[name]))
    assert ours.batch["advantages"].abs().sum() > 0


def test_rewards_of_steps_are_added_where_they_are():
    rewards, mask, uids = hand_made()
    plain = compute_advantage(batch_of(rewards, mask, uids), "grpo", config={}).batch["advantages"]
    torch.testing.assert_close(plain[0, 0], torch.tensor(0.5**0.5), atol=2e-6, rtol=0)  # 0.5 / std of (1, 0)
    steps = torch.zeros(6, 8)
    steps[0, 1:3], steps[5, 0] = 0.25, -1.0
    found = compute_advantage(batch_of(rewards + steps, mask, uids), "grpo_steps", config={}).batch
    assert torch.equal(bits(found["advantages"][steps == 0]), bits(plain[steps == 0]))
    assert torch.equal(found["advantages"][steps != 0], (plain + steps)[steps != 0])
    assert torch.equal(bits(found["returns"]), bits(plain))


def test_the_estimator_refuses_what_hides_the_steps():
    rewards, mask, uids = hand_made()
    for config, index, message in [
        ({"use_kl_in_reward": True}, uids, "use_kl_in_reward must be false"),
        ({"rollout_correction": {"rollout_rs": "token_k1"}}, uids, "rollout_rs must be empty"),
        ({}, None, "no uid"),
    ]:
        with pytest.raises(ValueError, match=message):
            grpo_with_steps(rewards, mask, config=config, index=index)


def output(**changes):
    given = {
        "prompt_ids": [1],
        "response_ids": [2, 3, 4],
        "response_mask": [1, 0, 1],
        "reward_score": 0.5,
        "token_rewards": [0.25, 0.0, 0.0],
        "metrics": {},
    }
    return StepRewardOutput(**{**given, **changes})


def test_rewards_of_steps_travel_with_an_output():
    assert output().as_dict()["rm_scores"].tolist() == [0.25, 0.0, 0.5]
    for changes, message in [
        ({"token_rewards": [0.0, 1.0, 0.0]}, "must be 0 on a token of the environment"),
        ({"token_rewards": [0.0, 0.0, 1.0]}, "must be 0 on the last token"),
        ({"token_rewards": [0.0]}, "1 entries for 3 tokens"),
        ({"response_mask": [1, 0, 0]}, "must end with a token of the policy"),
        ({"reward_score": None}, "need the rollout's reward"),
    ]:
        with pytest.raises(ValueError, match=message):
            output(**changes).as_dict()


# ------------------------------------------------------------------------------------------------------- agent loop


def agent_loop(config, server, tokenizer, cls=SearchAgentLoop):
    wraps = {"trainer_config": DictConfigWrap(config), "data_config": DictConfigWrap(config.data)}
    return cls(server_manager=server, tokenizer=tokenizer, processor=None, dataset_cls=None, **wraps)


def run_loops(config, server, tokenizer, rows, cls=SearchAgentLoop):
    async def all_of_them():
        loops = [agent_loop(config, server, tokenizer, cls).run({"temperature": 1.0}, **one) for one in rows]
        return await asyncio.gather(*loops)

    return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def tokenizer(policy_path):
    return hf_tokenizer(policy_path)


def test_the_agent_loop_searches_in_token_space(policy_path, tokenizer):
    config, server = configure(policy_path), Server(tokenizer)
    outputs = run_loops(config, server, tokenizer, [row(name, i) for name in QUESTIONS for i in range(3)])
    scripts = SCRIPTS["lyon"] + SCRIPTS["rome"]
    for found, script in zip(outputs, scripts, strict=True):
        mine = [i for i, m in zip(found.response_ids, found.response_mask, strict=True) if m]
        turns = [turn.partition(" and much")[0] for turn in script]
        assert mine == [i for turn in turns for i in tokenizer.encode(turn)]
        assert found.response_logprobs == [-0.5 * m for m in found.response_mask]
        assert found.extra_fields["policy_mask"] == found.response_mask
        assert (found.extra_fields["min_global_steps"], found.extra_fields["max_global_steps"]) == (1, len(script))
        assert found.num_turns == 2 * len(script)
        assert found.metrics.num_preempted == len(script)
        assert found.response_mask[-1] == 1
    assert "Lyon is a town in France." in tokenizer.decode(outputs[1].response_ids)
    assert outputs[1].extra_fields["passage_ids"] == [["p-town"], ["p-river"]]
    assert outputs[3].extra_fields["counts"]["cut_tokens"] > 5
    assert outputs[4].extra_fields["counts"] == {"empty_results": 1}
    assert outputs[5].extra_fields["counts"] == {"invalid_turns": 1}
    for calls in server.asked.values():  # each call goes on from the tokens that were fed and sampled
        for (before, _), (after, sampling) in pairwise(calls):
            assert after[: len(before)] == before
            assert sampling["max_tokens"] == 400 - (len(after) - len(calls[0][0]))
            assert sampling["stop"] == ["</search>", "</answer>"]


def test_a_response_never_outgrows_its_room(policy_path, tokenizer):
    config = configure(policy_path, "actor_rollout_ref.rollout.response_length=30")
    (found,) = run_loops(config, Server(tokenizer, logprobs=False), tokenizer, [row("lyon")])
    assert len(found.response_ids) <= 30
    assert all(found.response_mask)  # the reply did not fit
    assert found.response_logprobs is None


def test_failed_retrievals_go_on_and_broken_rollouts_are_named(policy_path, tokenizer):
    config = configure(policy_path)
    script = {"rome": [["<search>broken</search>", "<answer>Rome</answer>"]]}
    with pytest.warns(UserWarning, match="the index is gone"):
        (found,) = run_loops(config, Server(tokenizer, script), tokenizer, [row("rome")])
    assert found.extra_fields["counts"] == {"failed_retrievals": 1}
    for name, override in (("lyon", "stepcredit.environment.top_k=0"), ("rome", "stepcredit.retriever=no_module:x")):
        config = configure(policy_path, override)
        with pytest.raises(RuntimeError, match=f"rollout None_None of '{name}': "):
            run_loops(config, Server(tokenizer), tokenizer, [row(name)])


class PaidLoop(SearchAgentLoop):
    async def reward_steps(self, rollout):
        return [float(step + 1) for step in rollout.steps()]


def test_a_loops_own_step_rewards_reach_the_estimator(policy_path, tokenizer):
    outputs = run_loops(
        configure(policy_path), Server(tokenizer), tokenizer, [row("lyon", i) for i in range(3)], PaidLoop
    )
    assert [type(found).__name__ for found in outputs] == ["StepRewardOutput"] * 2 + ["AgentLoopOutput"]
    found = outputs[1]
    found.reward_score = 0.0
    scores = found.as_dict()["rm_scores"]
    assert scores.sum() == pytest.approx(1 + 2)
    text = tokenizer.decode([i for i, score in zip(found.response_ids, scores, strict=True) if score])
    assert "town" in text and "river" in text and "think" not in text  # noqa: PT018


# ------------------------------------------------------------------------------------- documentation and example


def test_the_documented_command_is_one_that_verl_takes(policy_path):
    command = re.search(r"main_ppo((?: \\\n +\S+)+)", (ROOT / "docs" / "verl.md").read_text(encoding="utf-8"))
    assert command is not None
    given = [word for word in command[1].split() if word != "\\"]
    overrides = [f"actor_rollout_ref.model.path={policy_path}" if "model.path=" in word else word for word in given]
    assert overrides != given
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    assert get_trainer_cls(config.trainer.v1.trainer_mode) is IGSearchTrainer
    options = IGSearchTrainer(config).options
    assert (options.credit.alpha, options.retriever) == (0.3, "verl_atlas:build")


def test_the_examples_rows_go_through_verls_data_set(policy_path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import verl_atlas

    questions = [Question("a", "Capital of France?", ("Paris",), ("p1",)), Question("b", "Of Italy?", ("Rome", "Roma"))]
    Dataset.from_list(list(verl_atlas.rows(questions))).to_parquet(tmp_path / "train.parquet")
    data = RLHFDataset(str(tmp_path / "train.parquet"), tokenizer, configure(policy_path).data)
    assert [question_of(data[i], [1]) for i in range(2)] == questions
    assert get_protocol("search_r1").instruction in data[0]["raw_prompt"][0]["content"]
