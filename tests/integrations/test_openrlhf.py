"""StepCredit in OpenRLHF: its command line, agent executor, experience, actor group, DeepSpeed engine, experience
maker."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("needs the package openrlhf: make test-frameworks", allow_module_level=True)

import openrlhf_world  # before OpenRLHF: what it lacks here

# isort: split

import ray
from openrlhf.trainer.ppo_utils.experience import balance_experiences
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.utils import get_strategy
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_world import ActorOnCPU, roll_out, run_command, words
from stepcredit.batch import RolloutBatch
from stepcredit.credit import IGSearch
from stepcredit.integrations._rows import prompt_name
from stepcredit.integrations.openrlhf import IGSearchExperienceMaker, IGSearchTrainer, ScoringActor, check_args
from stepcredit.padded import rollout_from_tokens
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer
from towns import QUESTIONS, bits, save_policy

ROOT = Path(__file__).parents[2]
CREDIT = IGSearch(dead_zone=0.0)


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def tokenizer(policy_path):
    return AutoTokenizer.from_pretrained(policy_path)


@pytest.fixture(scope="module")
def actors(policy_path):
    """OpenRLHF's actor group: two Ray processes, in each a DeepSpeed engine with the policy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", openrlhf_world.worker_path())
        strategy = get_strategy(run_command(patch, *words(policy_path)).args)
        ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
        group = RayActorGroup(1, 2, ray.remote(num_gpus=1)(ActorOnCPU))
        ray.get(group.async_init_model_from_pretrained(strategy, policy_path))
        yield group
        ray.shutdown()


def make(cls, policy_path, tokenizer, actors, monkeypatch, *more, **options):
    """An experience maker of OpenRLHF's or ours."""
    strategy = get_strategy(run_command(monkeypatch, *words(policy_path, *more)).args)
    return cls(actors, None, None, None, FixedKLController(0.0), strategy, tokenizer, **options)


def both(policy_path, tokenizer, actors, monkeypatch, *more, **options):
    """OpenRLHF's experiences, and ours of the same rollouts; and our maker."""
    given = (policy_path, tokenizer, actors, monkeypatch, *more)
    theirs, ours = make(RemoteExperienceMaker, *given), make(IGSearchExperienceMaker, *given, **options)
    ours.global_step = 1
    plain, found = (maker.make_experience_batch(roll_out(monkeypatch, tokenizer)) for maker in (theirs, ours))
    for one, other in zip(plain, found, strict=True):
        for name in ("sequences", "action_mask", "action_log_probs", "returns"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    return plain, found, ours


def test_the_maker_adds_the_bonus_to_openrlhfs_advantages_and_to_nothing_else(
    policy_path, tokenizer, actors, monkeypatch
):
    plain, found, maker = both(
        policy_path, tokenizer, actors, monkeypatch, "--algo.advantage.estimator=group_norm", credit=CREDIT
    )
    queries, added, rollouts = [], [], []
    for before, after in zip(plain, found, strict=True):
        changed = before.advantages != after.advantages
        assert after.action_mask[changed].all()
        assert torch.equal(bits(after.advantages[~changed]), bits(before.advantages[~changed]))
        queries += tokenizer.decode(after.sequences[:, 1:][changed])
        added.append((after.advantages - before.advantages)[changed])
        for i, label in enumerate(after.labels):
            ids = after.sequences[i][after.attention_mask[i].bool()].tolist()
            mine = [0, *after.action_mask[i].tolist()][: len(ids)]
            first = mine.index(1)
            text = tokenizer.decode(ids[:first])
            name = next(name for name, (question, _) in QUESTIONS.items() if question in text)
            assert (after.prompts[i], label) == (text, QUESTIONS[name][1])
            # Draws are seeded by the names of questions, which are ours to give.
            question = Question(prompt_name(ids[:first]), text, tuple(label))
            rollouts.append(
                rollout_from_tokens(
                    question, ids[:first], ids[first:], mine[first:], tokenizer, "search_r1", group=int(name == "rome")
                )
            )
    assert sorted(queries) == sorted("river" + "town" + "river" + "italy")
    # As OpenRLHF loads it.
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.bfloat16).float().eval()
    direct = CREDIT.bonus(RolloutBatch.pack(rollouts), PolicyScorer(model, tokenizer, "search_r1"), step=1)
    expected = direct.advantages[direct.advantages != 0]
    torch.testing.assert_close(torch.cat(added), expected, atol=1e-6, rtol=0)

    sizes = [len(experience.sequences) for experience in found]
    info = {name: value for name, value in found[0].info.items() if "/" in name}
    for name in ("ig/scored", "ig/steps", "ig/unscored_no_documents", "ig/tokens_counterfactual"):
        assert info[name].tolist() == [direct.metrics[name]] * sizes[0]
    assert info["ig/scored"][0] == 4
    assert info["rollout/searches"][0] == pytest.approx(5 / 6)
    assert info["ig/audit_difference"][0] < 1e-4
    assert info["timing/step_gains"][0] > 0
    again = maker.make_experience_batch(roll_out(monkeypatch, tokenizer))
    assert "ig/audit_difference" not in again[0].info
    # As OpenRLHF takes them apart for its actors.
    (balanced, *_) = balance_experiences(again, maker.args)
    assert len(balanced.info["ig/scored"]) == len(balanced.sequences)


@pytest.mark.parametrize("estimator", ["group_norm", "rloo", "reinforce_baseline"])
def test_alpha_0_leaves_every_bit_of_openrlhfs_advantages(policy_path, tokenizer, actors, monkeypatch, estimator):
    flag = f"--algo.advantage.estimator={estimator}"
    credit = IGSearch(alpha=0.0)
    plain, found, _ = both(policy_path, tokenizer, actors, monkeypatch, flag, credit=credit)
    for before, after in zip(plain, found, strict=True):
        assert torch.equal(bits(before.advantages), bits(after.advantages))
        assert after.info["ig/scored"][0] == 4
    assert sum(before.advantages.abs().sum() for before in plain) > 0


def test_a_rollout_without_a_gold_answer_is_named(policy_path, tokenizer, actors, monkeypatch):
    flag = "--algo.advantage.estimator=group_norm"
    maker = make(IGSearchExperienceMaker, policy_path, tokenizer, actors, monkeypatch, flag)
    samples = roll_out(monkeypatch, tokenizer)
    samples[4].labels = [[]]
    with pytest.raises(ValueError, match=r"question 'prompt-\w+': answers must hold"):
        maker.make_experience_batch(samples)


def test_the_command_gives_openrlhf_our_classes_and_options(policy_path, monkeypatch):
    more = ("--stepcredit.credit.alpha", "0.7", "--stepcredit.protocol=refine", "--stepcredit.credit.max_context=none")
    found = run_command(monkeypatch, *words(policy_path), *more)
    assert found.args.actor.model_name_or_path == policy_path
    assert found.actor.__ray_actor_class__ is ScoringActor
    assert found.trainer.func.__self__.__ray_actor_class__ is IGSearchTrainer
    assert found.trainer.keywords["credit"] == IGSearch(alpha=0.7)
    assert found.trainer.keywords["protocol"].name == "refine"
    for wrong, message in [
        (["--stepcredit.credit.alhpa=1"], "unknown option --stepcredit.credit.alhpa; did you mean 'credit.alpha'"),
        (["--stepcredit.credit.alpha"], "--stepcredit.credit.alpha has no value"),
        (["--stepcredit.credit.alpha=much"], "credit.alpha must be a number, got 'much'"),
        (["--stepcredit.credit.num_random=0"], "credit.num_random must be at least 1"),
        (["--stepcredit.protocol=refien"], "unknown protocol 'refien'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            run_command(monkeypatch, *words(policy_path), *wrong)


def test_what_cannot_be_scored_is_named_before_the_trainer_starts(policy_path, monkeypatch):
    for flags, message in [
        (["--train.async_enable"], "--train.async_enable must be off"),
        (["--ds.zero_stage=3"], "--ds.zero_stage must be at most 2: .* got 3"),
        (["--ds.tensor_parallel_size=2"], "--ds.tensor_parallel_size must be 1, got 2"),
        (["--ds.ring_attn_size=2"], "--ds.ring_attn_size must be 1, got 2"),
        (["--ds.use_liger_kernel"], "--ds.use_liger_kernel must be off"),
        (["--ds.lora.rank=8"], "--ds.lora.rank must be 0"),
        (["--ds.load_in_4bit"], "--ds.load_in_4bit must be off"),
    ]:
        args = run_command(monkeypatch, *words(policy_path), *flags).args
        with pytest.raises(ValueError, match=message):
            check_args(args)
        with pytest.raises(ValueError, match=message):
            IGSearchTrainer(policy_path, SimpleNamespace(args=args), credit=CREDIT, protocol="search_r1")


def test_the_trainer_makes_its_experience_with_our_maker(policy_path, tokenizer, monkeypatch, tmp_path):
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"input": "Capital of Italy?\n", "label": ["Rome", "Roma"]}) + "\n"
    )
    flags = (f"--data.prompt_dataset={tmp_path}", "--data.label_key=label", "--data.dataloader_num_workers=0")
    strategy = get_strategy(run_command(monkeypatch, *words(policy_path), *flags).args)
    trainer = IGSearchTrainer(
        policy_path, strategy, None, None, None, None, None, credit=CREDIT, protocol="refine", max_len=400
    )
    maker = trainer.experience_maker
    assert type(maker) is IGSearchExperienceMaker
    assert (maker._step_bonus.credit, maker._step_bonus.protocol.name) == (CREDIT, "refine")
    seen = []
    monkeypatch.setattr(maker, "make_experience_batch", lambda samples: seen.append((samples, maker.global_step)) or [])
    with pytest.raises(IndexError):  # OpenRLHF looks at the first experience
        trainer.train_step("samples", 7)
    assert seen == [("samples", 7)]
    _, prompts, labels, _ = next(iter(trainer.prompts_dataloader))
    assert (prompts, labels) == (["Capital of Italy?\n"], [["Rome", "Roma"]])


def test_the_documented_command_is_one_that_openrlhf_takes(monkeypatch):
    text = (ROOT / "docs" / "openrlhf.md").read_text(encoding="utf-8")
    command = re.search(r"python -m stepcredit\.integrations\.openrlhf((?: \\\n +.+?)+)(?<!\\)\n", text)
    assert command is not None
    found = run_command(monkeypatch, *(word for word in command[1].split() if word != "\\"))
    check_args(found.args)
    assert found.args.train.agent_func_path == "examples/openrlhf_atlas.py"
    assert found.trainer.keywords["credit"] == IGSearch(alpha=0.3)
