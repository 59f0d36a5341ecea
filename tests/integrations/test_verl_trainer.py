"""verl's trainer with IG-Search's bonus: verl's own rollout and reward workers, queue, Ray worker group and engine."""

# ruff: noqa: E402  (imports follow the skip)

from __future__ import annotations

import asyncio
import copy
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for _package in ("verl", "transfer_queue"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs the package {_package}: make test-frameworks", allow_module_level=True)

import ray
import transfer_queue
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.single_controller.base.decorator import MAGIC_ATTR, Dispatch
from verl.single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
)
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.reward import resolve_reward_manager_cls
from verl.trainer.ppo.v1 import AgentLoopWorkerTQ, PPOTrainerSync, get_trainer_cls
from verl.utils import hf_tokenizer

from stepcredit.batch import RolloutBatch
from stepcredit.integrations._rows import question_of
from stepcredit.integrations.verl import (
    IGSearchTrainer,
    ScoringWorker,
    SearchRewardManager,
    WorkerGroupScorer,
)
from stepcredit.integrations.verl.reward import COUNTS
from stepcredit.padded import rollout_from_tokens
from stepcredit.protocol import get_protocol
from stepcredit.scorer import PolicyScorer
from towns import QUESTIONS, bits, save_policy
from verl_world import Server, Workers, configure, row

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def tokenizer(policy_path):
    return hf_tokenizer(policy_path)


@pytest.fixture(scope="module")
def cluster(policy_path):
    """A local Ray: (verl's transfer queue, a worker group with the policy). Its workers start while
    other tests run."""
    fsdp = "actor_rollout_ref.actor.fsdp_config."
    config = configure(
        policy_path,
        "actor_rollout_ref.model.use_remove_padding=false",
        f"{fsdp}use_torch_compile=false",
        f"{fsdp}mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "transfer_queue.enable=true",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_PLATFORM", "cpu")
        patch.setenv("VERL_USE_EXTERNAL_MODULES", "verl_on_cpu")
        paths = [str(ROOT / "tests" / "integrations"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
    from verl_on_cpu import WorkerOnCPU

    made = RayClassWithInitArgs(cls=ray.remote(WorkerOnCPU), config=config.actor_rollout_ref, role="actor")
    group = RayWorkerGroup(
        resource_pool=RayResourcePool([2], use_gpu=False, max_colocate_count=1),
        ray_cls_with_init=create_colocated_worker_cls({"actor": made}),
        device_name="cpu",
    )
    transfer_queue.init(config.transfer_queue)
    yield transfer_queue, group.spawn({"actor"})["actor"]
    transfer_queue.close()
    ray.shutdown()


def roll_out(config, tokenizer, queue):
    """Both questions through verl's own agent loop worker and reward loop worker, into the queue."""

    async def run():
        reward = SimpleNamespace(compute_score=SimpleNamespace(remote=RewardLoopWorker(config).compute_score))
        make = AgentLoopWorkerTQ.__ray_actor_class__
        worker = make(config, llm_client=Server(tokenizer), reward_loop_worker_handles=[reward])
        for name in QUESTIONS:
            prompt = {**row(name), "uid": f"uid-{name}", "global_steps": 1, "agent_name": "stepcredit_search"}
            tag = {"is_prompt": True, "status": "pending", "global_steps": 1}
            queue.kv_batch_put(keys=[prompt["uid"]], partition_id="train", tags=[tag])
            where = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": False}
            await worker._run_prompt(prompt, {"temperature": 1.0}, where)

    asyncio.run(run())


@pytest.fixture(scope="module")
def sampled(policy_path, tokenizer, cluster):
    """verl's own sample of what `roll_out` put into the queue, filled up with padding."""
    queue, _ = cluster
    config = configure(policy_path)
    roll_out(config, tokenizer, queue)
    trainer = IGSearchTrainer(config)
    batch, _ = trainer.replay_buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    batch = upsample_batch_to_divisible_size(batch, 4, tokenizer.eos_token_id)
    where = {"keys": batch.keys, "partition_id": batch.partition_id}
    logprobs = queue.kv_batch_get(**where, select_fields=["rollout_log_probs"])["rollout_log_probs"]
    queue.kv_batch_put(**where, fields=TensorDict({"old_log_probs": logprobs}, batch_size=len(batch)))
    return batch


def fetch(cluster, batch, *names):
    data = cluster[0].kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))
    return [list(data[name]) for name in names]


@pytest.fixture(scope="module")
def model(policy_path):
    return AutoModelForCausalLM.from_pretrained(policy_path).eval()


def make_trainer(policy_path, tokenizer, workers, *overrides):
    trainer = IGSearchTrainer(configure(policy_path, *overrides))
    trainer.tokenizer, trainer.timing_raw, trainer.global_steps = tokenizer, {}, 1
    trainer.actor_rollout_wg = workers
    return trainer


def advantages(cluster, trainer, batch, of=IGSearchTrainer):
    """The advantages that a trainer's class leaves in the queue, one tensor after another, and its metrics."""
    metrics = {}
    of._compute_advantage(trainer, batch, metrics)
    return torch.cat(fetch(cluster, batch, "advantages")[0]), metrics


def test_rewards_come_from_the_policys_own_tokens(sampled, tokenizer, cluster):
    assert len(sampled.keys) == 8
    found = set()
    for score, extra, ids in zip(*fetch(cluster, sampled, "rm_scores", "extra_fields", "responses"), strict=True):
        info = extra["reward_extra_info"]
        text = tokenizer.decode(ids)
        found.add((text.count("<search>"), text[-13:-9], float(score.sum()), info["acc"], info["gold_hit"]))
        assert set(info) >= {"f1", "em", "format", "refine", "searches", *COUNTS}
    assert found >= {(1, "hône", 1, 1, 1), (2, "eine", 0, 0, 1), (0, "eine", 0, 0, 0), (1, "Rome", 1, 1, 0)}


def test_the_trainer_adds_the_bonus_to_verls_advantages_and_to_nothing_else(
    policy_path, tokenizer, model, sampled, cluster
):
    trainer = make_trainer(policy_path, tokenizer, Workers(model, tokenizer))
    assert trainer.trainer_mode == "sync"
    before, _ = advantages(cluster, trainer, sampled, PPOTrainerSync)
    after, metrics = advantages(cluster, trainer, sampled)
    ids, mine = (torch.cat(column) for column in fetch(cluster, sampled, "responses", "loss_mask"))
    changed = after != before
    assert mine[changed].all()
    assert sorted(tokenizer.decode(ids[changed])) == sorted("river" + "town" + "river" + "italy")
    assert torch.equal(bits(after[~changed]), bits(before[~changed]))

    prompts, responses, masks, keys = fetch(cluster, sampled, "prompts", "responses", "loss_mask", "uid")
    rollouts = [
        rollout_from_tokens(
            question_of(row(key[4:]) if "pad" not in key else row("rome"), []),
            *(x.tolist() for x in (prompt, response, mask)),
            tokenizer,
            "search_r1",
            group=list(QUESTIONS).index(key[4:]) if "pad" not in key else 2,
        )
        for prompt, response, mask, key in zip(prompts, responses, masks, keys, strict=True)
    ]
    packed = RolloutBatch.pack(rollouts)
    direct = trainer.options.credit.bonus(packed, PolicyScorer(model, tokenizer, "search_r1"), step=1)
    torch.testing.assert_close((after - before)[changed], direct.advantages[direct.advantages != 0], atol=1e-6, rtol=0)

    for name in ("ig/scored", "ig/steps", "ig/unscored_no_documents", "ig/tokens_counterfactual"):
        assert metrics[name] == direct.metrics[name]
    assert metrics["ig/audit_difference"] < 1e-5
    assert "ig/audit_difference" not in advantages(cluster, trainer, sampled)[1]
    assert metrics["rollout/searches"] == pytest.approx(5 / 6)  # verl's two rows of padding are no rollouts
    assert (metrics["rollout/invalid_turns"], metrics["rollout/empty_results"]) == (1, 1)
    assert trainer.timing_raw["step_gains"] > 0


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "grpo_steps"])
def test_alpha_0_leaves_every_bit_of_verls_advantages(policy_path, tokenizer, model, sampled, cluster, estimator):
    overrides = ("stepcredit.credit.alpha=0.0", f"algorithm.adv_estimator={estimator}")
    trainer = make_trainer(policy_path, tokenizer, Workers(model, tokenizer), *overrides)
    before, _ = advantages(cluster, trainer, sampled, PPOTrainerSync)
    after, metrics = advantages(cluster, trainer, sampled)
    assert torch.equal(bits(after), bits(before))
    assert before.abs().sum() > 0
    assert metrics["ig/scored"] == 4


def test_what_cannot_be_scored_is_named_before_anything_starts(policy_path, tokenizer, model, sampled, cluster):
    for override, message in [
        ("actor_rollout_ref.actor.strategy=fsdp", "actor.strategy must be fsdp2, whose .* got 'fsdp'"),
        ("actor_rollout_ref.actor.fsdp_config.offload_policy=true", "offload_policy must be false"),
        ("actor_rollout_ref.model.use_fused_kernels=true", "use_fused_kernels must be false"),
        ("actor_rollout_ref.model.lora_rank=8", "lora_rank must be 0"),
        ("stepcredit.credit.num_random=0", "credit.num_random must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            IGSearchTrainer(configure(policy_path, override))
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(torch.nan)
    trainer = make_trainer(policy_path, tokenizer, Workers(broken, tokenizer))
    with pytest.raises(FloatingPointError, match=r"question '(lyon|rome)'"):
        trainer._compute_advantage(sampled, {})


def test_the_trainers_workers_score_over_ray(policy_path, tokenizer, model, sampled, cluster):
    """verl's worker group of two processes, in which FSDP2 shards the policy, gives what the whole policy gives."""
    workers = cluster[1]
    workers.init_model()
    scorer = WorkerGroupScorer(workers, tokenizer, get_protocol("search_r1"))
    assert (scorer.name, scorer.max_context) == ("FSDPLlamaForCausalLM", 1024)
    here = make_trainer(policy_path, tokenizer, Workers(model, tokenizer))
    there = make_trainer(policy_path, tokenizer, workers)
    (expected, _), (found, metrics) = (advantages(cluster, trainer, sampled) for trainer in (here, there))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert metrics["ig/audit_difference"] < 1e-4
    assert there._scorer.tokens_forwarded >= metrics["ig/tokens_forwarded"]


def test_tokens_that_verl_rejects_keep_its_advantage(policy_path, tokenizer, model, sampled, cluster):
    rejecting = ("rollout_rs=token_k2", "rollout_rs_threshold='1.0'")
    overrides = [f"algorithm.rollout_correction.{field}" for field in rejecting]
    trainer = make_trainer(policy_path, tokenizer, Workers(model, tokenizer), *overrides)
    before, _ = advantages(cluster, trainer, sampled, PPOTrainerSync)
    bonus = advantages(cluster, trainer, sampled)[0] - before
    where = {"keys": sampled.keys, "partition_id": sampled.partition_id}
    as_it_was = cluster[0].kv_batch_get(**where, select_fields=["old_log_probs", "response_mask"])
    off = torch.zeros_like(bonus)
    off[bonus.nonzero()[0]] = 5.0  # the policy moved away from one query token
    nested = as_it_was["old_log_probs"]
    moved = torch.nested.nested_tensor_from_jagged(nested.values() + off, nested.offsets())
    cluster[0].kv_batch_put(**where, fields=TensorDict({"old_log_probs": moved}, batch_size=len(sampled)))
    try:
        after, _ = advantages(cluster, trainer, sampled)
        (mask,) = fetch(cluster, sampled, "response_mask")
    finally:
        cluster[0].kv_batch_put(**where, fields=as_it_was)
    assert torch.equal(torch.cat(mask) == 0, (torch.cat(list(as_it_was["response_mask"])) == 0) | (off != 0))
    expected = torch.where(off != 0, 0.0, before + bonus)  # 0 is verl's advantage of what it masks
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=0)


def test_verl_finds_the_parts_by_name_and_gives_its_workers_the_scoring(policy_path):
    trainer = get_trainer_cls("ig_search")(configure(policy_path))
    trainer._init_resource_pool_mgr()
    (role,) = trainer.role_worker_mapping
    made = trainer.role_worker_mapping[role]
    assert made.__ray_actor_class__ is ScoringWorker
    fused = create_colocated_worker_cls({str(role): RayClassWithInitArgs(cls=made)})
    bound = getattr(fused.cls.__ray_actor_class__, f"{role}_score_trees")
    assert getattr(bound, MAGIC_ATTR)["dispatch_mode"] == Dispatch.DP_COMPUTE
    assert resolve_reward_manager_cls(trainer.config) is SearchRewardManager
    custom = configure(policy_path, "reward.custom_reward_function.path=mine.py")
    with pytest.raises(ValueError, match=r"path='mine\.py' would not be called"):
        SearchRewardManager(custom, None)
