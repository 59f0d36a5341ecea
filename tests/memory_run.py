"""A tiny memory pipeline for tests: short conversations, and small random models."""

from __future__ import annotations

import functools
import tempfile
import zlib
from collections.abc import Sequence

from stepcredit.data.memory_scripts import memory_scripts
from stepcredit.train.config import TrainConfig
from stepcredit.train.judges import Judge
from stepcredit.train.memory import scripted
from stepcredit.train.memory_config import MemoryConfig
from stepcredit.train.memory_setup import MemoryParts, build_memory
from stepcredit.train.overrides import apply_overrides
from stepcredit.train.pipeline import Trajectory, assign_pipeline_rewards, run_pipeline
from stepcredit.train.progress import Reporter
from stepcredit.train.recipes import comam

WORDS = (
    "model.name=tiny", "model.dtype=float32", "model.device=cpu", "steps=2", "questions_per_step=2", "group_size=4",
    "memory.personas.train=24", "memory.personas.dev=1", "memory.personas.test=3", "memory.personas.sessions=2",
    "memory.personas.topics=2", "memory.personas.chatter=1", "memory.extraction_tokens=16", "memory.profile_tokens=12",
    "sampling.max_turn_tokens=10", "sampling.max_answer_tokens=6", "optimizer.learning_rate=1e-2",
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
def base() -> str:
    """The directory of a random small model, which the agents of a run start from."""
    agent = models().agents["extraction"]
    directory = tempfile.mkdtemp()
    agent.model.save_pretrained(directory)
    agent.tokenizer.save_pretrained(directory)
    return directory


def made_up_rewards(trajectories: Sequence[Trajectory], settings: MemoryConfig, judge: Judge) -> None:
    """The pipeline's rewards, and on top of them some that follow from the sampled tokens: a random model earns
    nothing, and agents that earn nothing do not move."""
    assign_pipeline_rewards(trajectories, settings, judge)
    for t in trajectories:
        right = float(zlib.crc32(str(t.rollouts["retrieval"].tokens).encode()) % 3 == 0)
        for rollout in t.rollouts.values():
            rollout.rewards["local"] += zlib.crc32(str(rollout.tokens).encode()) % 8 / 8
            rollout.rewards["total"] = right


def fresh_parts(*overrides: str) -> tuple[TrainConfig, MemoryParts]:
    config = memory_config(f"model.name={base()}", *overrides)
    return config, build_memory(config, Reporter())
