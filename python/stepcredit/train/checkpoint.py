"""Checkpoints in safetensors: everything a run needs to go on bit for bit.

A checkpoint is a directory with `optimizer.safetensors` (float32 masters and Adam moments), or of several agents
`optimizer.<agent>.safetensors`, with `reference.safetensors` (only where the run keeps a reference policy) and
`state.json` (steps done, and what the loop carries along).
The randomness of a step is a function of the run's seed and the step's number, so no generator state is kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from stepcredit.train.optimizer import MasterAdamW


@dataclass(slots=True)
class State:
    """What the loop carries from step to step besides tensors.

    Attributes:
        step: GRPO steps done.
        seconds: wall-clock time spent so far, in this and in resumed processes.
        tokens_forwarded: real tokens run through the model so far.
        seconds_ig, seconds_steps: time in counterfactual scoring and in GRPO steps so far.
        before: evaluation before the first GRPO step.
    """

    step: int = 0
    seconds: float = 0.0
    tokens_forwarded: int = 0
    seconds_ig: float = 0.0
    seconds_steps: float = 0.0
    before: dict[str, dict[str, float]] | None = None


def save_checkpoint(
    directory: Path,
    optimizer: MasterAdamW | Mapping[str, MasterAdamW],
    state: State,
    reference: PreTrainedModel | None = None,
) -> None:
    """Write a checkpoint, replacing an older one only when the new one is complete. `optimizer` is the policy's, or
    those of several agents by name."""
    scratch = directory.with_name(directory.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for file, of_one in _files(optimizer).items():
        save_file({k: v.contiguous() for k, v in of_one.state().items()}, scratch / file)
    if reference is not None:
        save_file(dict(_named(reference)), scratch / "reference.safetensors")
    values = {name: getattr(state, name) for name in State.__slots__}
    (scratch / "state.json").write_text(json.dumps(values, indent=1))
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    scratch.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    directory: Path, optimizer: MasterAdamW | Mapping[str, MasterAdamW], reference: PreTrainedModel | None = None
) -> State:
    """Load a checkpoint into the optimizer, or those of several agents (and through them the models), and the reference
    policy.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: it belongs to another model, or to other agents.
    """
    if not (directory / "state.json").is_file():
        raise FileNotFoundError(f"{directory} holds no checkpoint (state.json); runs write one with checkpoint_every=N")
    files = _files(optimizer)
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise ValueError(f"{directory} is the checkpoint of a run with other agents: it has no {missing[0]}")
    for file, of_one in files.items():
        of_one.load_state(load_file(directory / file))
    if reference is not None:
        weights = load_file(directory / "reference.safetensors")
        for name, parameter in _named(reference):
            parameter.data.copy_(weights[name])
    values: dict[str, Any] = json.loads((directory / "state.json").read_text())
    return State(**values)


def _files(optimizer: MasterAdamW | Mapping[str, MasterAdamW]) -> dict[str, MasterAdamW]:
    """Each optimizer by its file."""
    if isinstance(optimizer, MasterAdamW):
        return {"optimizer.safetensors": optimizer}
    return {f"optimizer.{agent}.safetensors": of_one for agent, of_one in optimizer.items()}


def _named(model: PreTrainedModel) -> list[tuple[str, Any]]:
    # named_parameters lists tied parameters once, as safetensors needs them.
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]
