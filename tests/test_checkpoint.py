from __future__ import annotations

import json

import pytest
import torch

from stepcredit.train.checkpoint import State, load_checkpoint, save_checkpoint
from stepcredit.train.loop import train
from stepcredit.train.setup import frozen_copy
from stepcredit.train.update import supervised_step
from tiny_run import played, same, tiny_config, tiny_parts

TIMED = ("seconds", "ig/seconds", "ig_seconds_share", "ig/audit")


def run(directory, *overrides, resume=False, dtype=torch.float32):
    directory.mkdir(exist_ok=True)
    config = tiny_config("checkpoint_every=2", *overrides)
    parts = tiny_parts(dtype, searching=True)
    summary = train(config, parts, directory, resume=resume)
    return parts, summary


def untimed(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_and_two_steps_are_four_bit_for_bit(tmp_path, dtype):
    overrides = ("loss.kl_coef=0.1", "rewards.format=1.0")
    whole, summary = run(tmp_path / "whole", "steps=4", *overrides, dtype=dtype)
    run(tmp_path / "parts", "steps=2", *overrides, dtype=dtype)
    resumed, resumed_summary = run(tmp_path / "parts", "steps=4", *overrides, resume=True, dtype=dtype)
    assert same(whole.optimizer.state(), resumed.optimizer.state())
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    kl = [line["kl"] for line in untimed(tmp_path / "whole") if line["phase"] == "grpo"]
    assert kl[-1] > 0  # the reference is the policy after the warm start, in the resumed run too
    for key in summary:
        if key not in ("seconds", "ig_seconds_share"):
            assert summary[key] == resumed_summary[key], key
    assert any(line.get("grad_norm") for line in untimed(tmp_path / "whole") if line["phase"] == "grpo")


def test_steps_after_the_checkpoint_are_logged_once(tmp_path):
    run(tmp_path, "steps=3")  # the checkpoint is of step 2
    run(tmp_path, "steps=3", resume=True)
    steps = [line["step"] for line in untimed(tmp_path) if line["phase"] == "grpo"]
    assert steps == [1, 2, 3]
    assert [line["when"] for line in untimed(tmp_path) if line["phase"] == "evaluation"] == ["before", "after"]


def test_state_and_moments_round_trip(tmp_path):
    parts = tiny_parts(torch.bfloat16)
    supervised_step(parts.model, parts.optimizer, played(parts, 2), learning_rate=1e-3, max_tokens=512)
    state = State(step=3, seconds=1.5, tokens_forwarded=7, before={"greedy": {"em": 0.5}})
    save_checkpoint(tmp_path / "c", parts.optimizer, state)
    other = tiny_parts(torch.bfloat16)
    assert load_checkpoint(tmp_path / "c", other.optimizer) == state
    assert same(parts.optimizer.state(), other.optimizer.state())
    assert {name.split(".")[0] for name in other.optimizer.state()} == {"master", "step", "exp_avg", "exp_avg_sq"}
    assert same(parts.model.state_dict(), other.model.state_dict())


def test_the_reference_policy_is_kept(tmp_path):
    parts = tiny_parts()
    reference = frozen_copy(parts.model)
    with torch.no_grad():
        reference.model.norm.weight.add_(1)
    save_checkpoint(tmp_path / "c", parts.optimizer, State(), reference)
    loaded = frozen_copy(parts.model)
    load_checkpoint(tmp_path / "c", parts.optimizer, loaded)
    assert same(loaded.state_dict(), reference.state_dict())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_an_interrupted_save_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    parts = tiny_parts()
    save_checkpoint(tmp_path / "c", parts.optimizer, State(step=1))
    monkeypatch.setattr("stepcredit.train.checkpoint.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path / "c", parts.optimizer, State(step=2))
    assert load_checkpoint(tmp_path / "c", parts.optimizer).step == 1


def test_a_missing_checkpoint_and_one_of_another_model_are_named(tmp_path):
    parts = tiny_parts()
    with pytest.raises(FileNotFoundError, match="checkpoint_every=N"):
        load_checkpoint(tmp_path / "none", parts.optimizer)
    save_checkpoint(tmp_path / "c", parts.optimizer, State())
    master = parts.optimizer.masters["model.norm.weight"]
    master.data = torch.ones(5)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has shape \(32,\), the model \(5,\)"):
        load_checkpoint(tmp_path / "c", parts.optimizer)
    del parts.optimizer.masters["model.norm.weight"]
    with pytest.raises(ValueError, match=r"does not fit the model.*model\.norm\.weight"):
        load_checkpoint(tmp_path / "c", parts.optimizer)
