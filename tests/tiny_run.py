"""A tiny policy, data and environment for tests of the trainer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from stepcredit.batch import RolloutBatch
from stepcredit.data.demonstrations import demonstrations
from stepcredit.rollout import Rollout
from stepcredit.train.config import TrainConfig
from stepcredit.train.engine import HFEngine
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.overrides import apply_overrides
from stepcredit.train.progress import Reporter
from stepcredit.train.recipes import tiny
from stepcredit.train.rewards import RewardWeights, assign_rewards
from stepcredit.train.setup import Parts, TimedRetriever, build
from stepcredit.train.update import supervised_step
from stepcredit.train.warm_start import play

REWARDS = RewardWeights(f1=1.0, gold_hit=0.5, format=0.2)


def tiny_config(*overrides: str) -> TrainConfig:
    return apply_overrides(tiny(), ["warm_start.steps=0", "evaluation.questions=2", "evaluation.samples=0", *overrides])


@functools.cache
def _built() -> Parts:
    return build(tiny_config(), Reporter())


@functools.cache
def _searching() -> PreTrainedModel:
    """The policy after a warm start that is long enough for it to search and answer now and then."""
    parts = tiny_parts()
    for step in range(40):
        scripts = demonstrations(parts.dataset.train[8 * step : 8 * step + 8], seed=step)
        rollouts = play(scripts, parts.environment, parts.tokenizer)
        assign_rewards(rollouts, REWARDS, parts.tokenizer)
        batch = RolloutBatch.pack(rollouts)
        supervised_step(parts.model, parts.optimizer, batch, learning_rate=1e-2, max_tokens=1024)
    return parts.model


def tiny_parts(dtype: torch.dtype = torch.float32, *, max_searches: int = 2, searching: bool = False) -> Parts:
    """Fresh parts around one data set, one index and one initialisation, random or after a warm start."""
    parts = _built()
    model = copy.deepcopy(_searching() if searching else parts.model).to(dtype)
    retriever = TimedRetriever(parts.retriever.retriever)
    environment = copy.copy(parts.environment)
    environment.retriever, environment.max_searches = retriever, max_searches
    scorer = copy.copy(parts.scorer)
    scorer.model = model
    return replace(
        parts,
        model=model,
        retriever=retriever,
        environment=environment,
        engine=HFEngine(model, parts.tokenizer, environment.protocol),
        optimizer=MasterAdamW(model),
        scorer=scorer,
    )


def played(parts: Parts, count: int = 6, group_size: int = 2) -> RolloutBatch:
    """Demonstrations of mixed quality as a batch: groups of `group_size`, made-up rewards that differ inside most."""
    rollouts: list[Rollout] = []
    for group in range(count // group_size):
        scripts = demonstrations([parts.dataset.train[group]] * group_size, seed=group)
        for rollout in play(scripts, parts.environment, parts.tokenizer):
            rollout.group = group
            rollouts.append(rollout)
    assign_rewards(rollouts, REWARDS, parts.tokenizer)
    for i, rollout in enumerate(rollouts):
        rollout.rewards["total"] = float(i % group_size) if rollout.group else 1.0
    return RolloutBatch.pack(rollouts)


def gradients(optimizer: MasterAdamW) -> dict[str, torch.Tensor]:
    """The gradients collected so far, by name."""
    return {name: m.grad.clone() for name, m in optimizer.masters.items() if m.grad is not None}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: Sequence[str] = ()) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in names or a)
