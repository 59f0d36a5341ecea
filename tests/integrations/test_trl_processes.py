"""`IGSearchTrainer` over two processes."""

from __future__ import annotations

import importlib.util
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

if missing := [name for name in ("trl", "peft") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{missing[0]} is not installed", allow_module_level=True)

from peft import LoraConfig, get_peft_model
from test_trl import CALL, CLOSE, TOKENIZER, differs_exactly_on, metrics, trained

from scripted_rollouts import random_policy
from stepcredit.integrations.trl import IGSearchMixin


def work(rank: int, directory: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    trainer = trained(directory, config={"max_steps": 2})
    differs_exactly_on(trainer, CALL, CLOSE)
    searches = [float((one["tool_mask"].diff() == -1).sum()) for one in trainer.plain]
    logged = [line["count_searches"] for line in metrics(trainer)]
    torch.save((searches, logged, trainer.model.lm_head.weight.detach()), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_each_process_scores_its_own_rollouts_and_metrics_are_means(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(str(tmp_path), port), nprocs=2)
    (searches, logged, weight), (others, _, copy) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert logged == [(mine + other) / 2 for mine, other in zip(searches, others, strict=True)]
    assert torch.equal(weight, copy)


@pytest.mark.parametrize(
    ("plugins", "adapted", "reason"),
    [
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, False, "DeepSpeed ZeRO-3"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, True, None),
        ({"deepspeed_plugin": None, "fsdp_plugin": SimpleNamespace(fsdp_version=1)}, False, "FSDP1"),
        ({"deepspeed_plugin": None, "fsdp_plugin": SimpleNamespace(fsdp_version=2)}, False, None),
        ({"deepspeed_plugin": None, "fsdp_plugin": SimpleNamespace(fsdp_version=2)}, True, "PEFT"),
    ],
)
def test_sharded_policies_whose_ranks_would_wait_for_each_other_are_refused(plugins, adapted, reason):
    model = random_policy("llama", TOKENIZER)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(**plugins)),
        model=get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model,
    )
    found = IGSearchMixin._unscorable(trainer)
    assert found is None if reason is None else reason in found
