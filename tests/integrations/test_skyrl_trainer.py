"""SkyRL's trainer with IG-Search's bonus: SkyRL's own generator, gym, batches, actor group, FSDP workers."""

from __future__ import annotations

import asyncio
import copy
import importlib.util

import pytest
import torch

if importlib.util.find_spec("skyrl") is None:
    pytest.skip("needs the package skyrl: make test-frameworks", allow_module_level=True)

import skyrl_world  # before SkyRL: what it lacks here

# isort: split

import ray
from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import PolicyWorker, RefWorker
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
from skyrl.train.trainer import RayPPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from skyrl_world import WorkerOnCPU, configure, generator_input, make_generator, register_environment
from stepcredit.batch import RolloutBatch
from stepcredit.credit import IGSearch
from stepcredit.integrations.skyrl import IGSearchTrainer, ScoringWorker, question_of_row
from stepcredit.padded import rollout_from_tokens
from stepcredit.scorer import PolicyScorer
from towns import QUESTIONS, bits, save_policy

CREDIT = IGSearch(dead_zone=0.0)


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def tokenizer(policy_path):
    return AutoTokenizer.from_pretrained(policy_path)


def make_trainer(cfg, tokenizer, like=None, **options):
    generator = make_generator(cfg, tokenizer, SkyRLGymGenerator)
    trainer = IGSearchTrainer(
        cfg=cfg,
        tracker=None,
        tokenizer=tokenizer,
        train_dataset=None,
        inference_engine_client=generator.inference_engine_client,
        generator=generator,
        **{"credit": CREDIT, **options},
    )
    trainer.global_step = 1
    if like is not None:
        trainer.policy_model, trainer.dispatch = like.policy_model, like.dispatch
    return trainer


@pytest.fixture(scope="module")
def cluster(policy_path, tokenizer):
    """A trainer whose models SkyRL built: two Ray processes over which its FSDP strategy shards the policy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", skyrl_world.worker_path())
        ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
        trainer = make_trainer(configure(policy_path), tokenizer)
        trainer.build_models(ray.remote(num_gpus=1)(WorkerOnCPU), None, RefWorker)
        yield trainer
        ray.shutdown()


def roll_out(trainer, monkeypatch, *, change=lambda output: None):
    """A batch of both questions, up to where advantages are computed, as in SkyRL's `train`."""
    register_environment(monkeypatch)
    monkeypatch.setattr(trainer.dispatch, "get_lcm_dp_size", lambda: 2)
    batch, uids = generator_input("lyon", "rome")
    output = asyncio.run(trainer.generate(batch))
    change(output)
    output, uids = trainer.postprocess_generator_output(output, uids)
    return trainer.fwd_logprobs_values_reward(trainer.convert_to_training_input(output, uids))


def both(trainer, data):
    """SkyRL's advantages, and ours of the same batch."""
    plain = RayPPOTrainer.compute_advantages_and_returns(trainer, copy.deepcopy(data))
    found = trainer.compute_advantages_and_returns(data)
    assert torch.equal(bits(plain["returns"]), bits(found["returns"]))
    return plain["advantages"], found["advantages"]


def test_the_trainer_adds_the_bonus_to_skyrls_advantages_and_to_nothing_else(
    policy_path, tokenizer, cluster, monkeypatch
):
    trainer = make_trainer(configure(policy_path), tokenizer, cluster)
    data = roll_out(trainer, monkeypatch)
    rows = dict(trainer._rows)
    before, after = both(trainer, data)
    changed = after != before
    tokens = data["sequences"][:, -changed.shape[1] :]
    assert (data["loss_mask"][changed] == 1).all()
    assert sorted(tokenizer.decode(tokens[changed])) == sorted("river" + "town" + "river" + "italy")
    assert torch.equal(bits(after[~changed]), bits(before[~changed]))
    assert trainer._rows == {}

    rollouts = []
    for i, uid in enumerate(["lyon"] * 3 + ["rome"] * 3):
        ids = data["sequences"][i][data["attention_mask"][i].bool()].tolist()
        length = int(data["response_mask"][i].sum())
        mine = data["loss_mask"][i][-length:].tolist()
        question = question_of_row(rows[uid], ids[:-length])
        assert (question.id, question.text, list(question.answers)) == (uid, *QUESTIONS[uid])
        rollouts.append(
            rollout_from_tokens(
                question, ids[:-length], ids[-length:], mine, tokenizer, "search_r1", group=int(uid == "rome")
            )
        )
    model = AutoModelForCausalLM.from_pretrained(policy_path).eval()
    direct = CREDIT.bonus(RolloutBatch.pack(rollouts), PolicyScorer(model, tokenizer, "search_r1"), step=1)
    torch.testing.assert_close((after - before)[changed], direct.advantages[direct.advantages != 0], atol=1e-6, rtol=0)

    metrics = trainer.all_metrics
    for name in ("ig/scored", "ig/steps", "ig/unscored_no_documents", "ig/tokens_counterfactual"):
        assert metrics[name] == direct.metrics[name]
    assert (metrics["ig/scored"], metrics["rollout/masked"]) == (4, 0)
    assert metrics["rollout/searches"] == pytest.approx(5 / 6)
    assert metrics["ig/audit_difference"] < 1e-4
    assert trainer.all_timings["step_gains"] > 0
    trainer.all_metrics = {}
    both(trainer, roll_out(trainer, monkeypatch))
    assert "ig/audit_difference" not in trainer.all_metrics


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "grpo_steps"])
def test_alpha_0_leaves_every_bit_of_skyrls_advantages(policy_path, tokenizer, cluster, monkeypatch, estimator):
    cfg = configure(policy_path, f"trainer.algorithm.advantage_estimator={estimator}")
    trainer = make_trainer(cfg, tokenizer, cluster, credit=IGSearch(alpha=0.0))
    before, after = both(trainer, roll_out(trainer, monkeypatch))
    assert torch.equal(bits(after), bits(before))
    assert before.abs().sum() > 0
    assert trainer.all_metrics["ig/scored"] == 4


def test_rollouts_that_skyrl_masks_get_nothing(policy_path, tokenizer, cluster, monkeypatch):
    def mask_the_first(output):
        output["loss_masks"][0] = [0] * len(output["loss_masks"][0])

    trainer = make_trainer(configure(policy_path), tokenizer, cluster)
    before, after = both(trainer, roll_out(trainer, monkeypatch, change=mask_the_first))
    changed = (after != before).any(1)
    assert changed.tolist() == [False, True, False, True, False, False]
    assert (trainer.all_metrics["rollout/masked"], trainer.all_metrics["ig/scored"]) == (1, 3)
    assert "rollout/unasked_documents" not in trainer.all_metrics


def test_what_cannot_be_scored_is_named_before_anything_starts(policy_path, tokenizer, cluster, monkeypatch):
    for overrides, message in [
        (["trainer.strategy=megatron"], "trainer.strategy must be fsdp, got 'megatron'"),
        (["trainer.policy.sequence_parallel_size=2"], "sequence_parallel_size must be 1, got 2"),
        (["trainer.policy.fsdp_config.cpu_offload=true"], "cpu_offload must be false"),
        (["trainer.policy.model.lora.rank=8"], "lora.rank must be 0"),
        (
            ["generator.step_wise_trajectories=true", "generator.use_conversation_multi_turn=true"],
            "IGSearchTrainer: generator.step_wise_trajectories must be false",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(configure(policy_path, *overrides), tokenizer)
    with pytest.raises(TypeError, match="must derive from ScoringWorker, FSDPRefWorkerBase does not"):
        cluster.build_models(RefWorker, None, RefWorker)
    built = []
    monkeypatch.setattr(RayPPOTrainer, "build_models", lambda self, *workers: built.append(workers[0]))
    cluster.build_models(PolicyWorker, None, RefWorker)
    assert built[0].__ray_actor_class__ is ScoringWorker


def test_a_batch_whose_gold_answers_are_not_known_is_refused(policy_path, tokenizer, cluster, monkeypatch):
    trainer = make_trainer(configure(policy_path), tokenizer, cluster)
    data = roll_out(trainer, monkeypatch)
    trainer._rows["lyon"] = {"reward_spec": {"ground_truth": []}, "extra_info": {"id": "lyon"}}
    with pytest.raises(ValueError, match="question 'lyon': answers must hold"):
        trainer.compute_advantages_and_returns(data)
    trainer._rows.clear()
    with pytest.raises(ValueError, match="prompt 'lyon' was not rolled out by this trainer's generate"):
        trainer.compute_advantages_and_returns(data)
