"""A tiny memory pipeline for tests: short conversations, and a small model that was taught all three roles."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from stepcredit.data.memory_scripts import memory_scripts
from stepcredit.environments.memory import AGENTS
from stepcredit.rollout import RolloutBatch
from stepcredit.train.config import TrainConfig
from stepcredit.train.loop import derive_seed
from stepcredit.train.memory import scripted
from stepcredit.train.memory_setup import MemoryParts, build_memory
from stepcredit.train.overrides import apply_overrides
from stepcredit.train.pipeline import Trajectory, assign_pipeline_rewards, run_pipeline
from stepcredit.train.progress import Reporter
from stepcredit.train.recipes import comam
from stepcredit.train.update import supervised_step

WORDS = (
    "model.name=tiny", "model.dtype=float32", "model.device=cpu", "steps=2", "questions_per_step=2", "group_size=4",
    "memory.personas.train=24", "memory.personas.dev=1", "memory.personas.test=3", "memory.personas.sessions=2",
    "memory.personas.topics=1", "memory.personas.chatter=1", "memory.extraction_tokens=32", "memory.profile_tokens=16",
    "memory.rank=4", "sampling.max_turn_tokens=12", "sampling.max_answer_tokens=6", "optimizer.learning_rate=1e-2",
    "warm_start.steps=0", "evaluation.questions=2", "evaluation.samples=0",
)  # fmt: skip


def memory_config(*overrides: str) -> TrainConfig:
    return apply_overrides(comam(), [*WORDS, *overrides])


@functools.cache
def models() -> MemoryParts:
    """Three random models, for what needs no policy that can do anything."""
    return build_memory(memory_config("memory.agents=models"), Reporter())


def scripted_trajectories(parts: MemoryParts, good: float, count: int = 12, first: int = 0) -> list[Trajectory]:
    config = memory_config()
    questions = parts.dataset.train[first : first + count]
    act = scripted(config, parts, memory_scripts(questions, good, seed=first))
    trajectories = run_pipeline(act, questions)
    assign_pipeline_rewards(trajectories, config.memory, parts.judge)
    return trajectories


@functools.cache
def taught() -> str:
    """The directory of one model that was shown scripts of all three agents, so that it writes in their tags now and
    then."""
    parts = build_memory(memory_config("memory.agents=models"), Reporter())
    agent = parts.agents["extraction"]
    for step in range(60):
        trajectories = scripted_trajectories(parts, 0.7, 4, first=derive_seed(step) % (len(parts.dataset.train) - 4))
        batch = RolloutBatch.pack([t.rollouts[name] for t in trajectories for name in AGENTS])
        supervised_step(agent.model, agent.optimizer, batch, learning_rate=1e-2, max_tokens=2048)
    directory = tempfile.mkdtemp()
    agent.model.save_pretrained(directory)
    agent.tokenizer.save_pretrained(directory)
    return str(Path(directory))


def taught_parts(*overrides: str) -> tuple[TrainConfig, MemoryParts]:
    config = memory_config(f"model.name={taught()}", *overrides)
    return config, build_memory(config, Reporter())
