"""Training of a memory pipeline: its agents roll out together, are credited together, and learn in one joint step.

The counterpart of `train.loop` for several agents; everything random in step k is a function of the run's seed and k.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

from stepcredit.batch import RolloutBatch
from stepcredit.credit import Credit
from stepcredit.data.conversations import MemoryQuestion
from stepcredit.data.demonstrations import Demonstration
from stepcredit.data.memory_scripts import MemoryScript, memory_scripts
from stepcredit.environments.memory import AGENTS, AgentTask
from stepcredit.rollout import Rollout
from stepcredit.train.checkpoint import State, load_checkpoint, save_checkpoint
from stepcredit.train.config import TrainConfig
from stepcredit.train.draws import derive_seed, questions_of_step
from stepcredit.train.engine import Sampling
from stepcredit.train.evaluation import evaluate_held_out
from stepcredit.train.memory_setup import MemoryParts, fits, special, turn_tokens
from stepcredit.train.metrics import Clock, MetricsLog, data_metrics
from stepcredit.train.overrides import to_json
from stepcredit.train.pipeline import (
    Act,
    Trajectory,
    assign_pipeline_rewards,
    pipeline_metrics,
    run_pipeline,
    sampled_metrics,
)
from stepcredit.train.progress import Advance
from stepcredit.train.summary import conclude
from stepcredit.train.update import policy_update, supervised_step
from stepcredit.train.warm_start import play


def train_memory(config: TrainConfig, parts: MemoryParts, directory: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run a configuration to its end and return its summary; arguments, files and errors as in `train.loop.train`. The
    agents are written to `directory/agents/<agent>`."""
    started = time.perf_counter()
    log = MetricsLog(directory / "metrics.jsonl")
    (directory / "config.json").write_text(json.dumps(to_json(config), indent=1) + "\n", encoding="utf-8")
    checkpoint = directory / "checkpoint"
    if resume:
        state = load_checkpoint(checkpoint, parts.optimizers)
        log.drop_after(state.step)
    else:
        state = State()
        log.write({"phase": "data", **data_metrics(parts.dataset), "seconds": parts.seconds})
        warm_start(config, parts, state, log)
        state.before = evaluate(config, parts, state, log, "before")
    started -= state.seconds + parts.seconds

    with parts.reporter.task("GRPO", config.steps) as advance:
        advance(state.step)
        for step in range(state.step, config.steps):
            metrics = train_step(config, parts, state, step)
            log.write(metrics)
            advance(1, f"reward {metrics['reward']:.2f}  coverage {metrics['coverage']:.2f}")
            state.step, state.seconds = step + 1, time.perf_counter() - started
            if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                save_checkpoint(checkpoint, parts.optimizers, state)

    after = evaluate(config, parts, state, log, "after")
    for name, agent in parts.agents.items():
        agent.save(directory / "agents" / name)
    state.seconds = time.perf_counter() - started
    return conclude(config, state, after, log, directory, parts.reporter)


def train_step(config: TrainConfig, parts: MemoryParts, state: State, step: int) -> dict[str, Any]:
    """One joint step of all agents; returns its metrics."""
    torch.manual_seed(derive_seed(config.seed, "step", step))  # for whatever draws from the global generator
    clock = Clock()
    before = parts.tokens_forwarded
    questions = _questions(parts.dataset.train, config.questions_per_step, config.seed, step)
    with clock("rollout"), parts.reporter.task("  rollouts", len(AGENTS) * len(questions) * config.group_size) as moved:
        sampling = config.sampling.build(derive_seed(config.seed, "rollout", step))
        trajectories = _sample(config, parts, questions, sampling, config.group_size, moved)
    assign_pipeline_rewards(trajectories, config.memory, parts.judge)
    rollouts = {name: [t.rollouts[name] for t in trajectories] for name in AGENTS}
    with clock("credit"):
        batch = RolloutBatch.pack([rollout for name in AGENTS for rollout in rollouts[name]])
        credit = config.credit(batch, parts.agents[AGENTS[0]].scorer)
        # Agent after agent, as they were packed.
        sizes = [sum(len(rollout.tokens) for rollout in rollouts[name]) for name in AGENTS]
        advantages = dict(zip(AGENTS, credit.advantages.split(sizes), strict=True))
    updated = {}
    with clock("update"):
        for name, agent in parts.agents.items():
            agent.activate()
            updated[name] = policy_update(
                agent.scorer,
                agent.optimizer,
                RolloutBatch.pack(rollouts[name], agent.model.device),
                Credit(advantages[name].to(agent.model.device)),
                config.loss,
                learning_rate=config.optimizer.rate(step),
                temperature=config.sampling.temperature,
            )
    tokens = {
        "tokens_rollout": parts.tokens_forwarded - before,
        "tokens_update": int(sum(update["tokens_forwarded"] for update in updated.values())),
    }
    state.tokens_forwarded += sum(tokens.values())
    state.seconds_steps += clock.total
    return {
        "phase": "grpo",
        "step": step + 1,
        **sampled_metrics(trajectories),
        **pipeline_metrics(trajectories),
        **credit.metrics,
        **_joint(updated),
        "learning_rate": config.optimizer.rate(step),
        **tokens,
        "tokens_forwarded": sum(tokens.values()),
        **{f"seconds_{name}": seconds for name, seconds in clock.seconds.items()},
        "seconds": clock.total,
    }


def warm_start(config: TrainConfig, parts: MemoryParts, state: State, log: MetricsLog) -> None:
    """Supervised steps of every agent on scripted trajectories; afterwards the optimizers start afresh."""
    settings = config.warm_start
    count = settings.steps * settings.batch
    chosen = _questions(parts.dataset.train, count, derive_seed(config.seed, "warm start"), 0)
    scripts = memory_scripts(chosen, config.memory.good, derive_seed(config.seed, "demonstrations"))
    with parts.reporter.task("warm start", settings.steps) as advance:
        for step in range(settings.steps):
            start = time.perf_counter()
            share = slice(step * settings.batch, (step + 1) * settings.batch)
            trajectories = _run(config, parts, scripted(config, parts, scripts[share]), chosen[share])
            assign_pipeline_rewards(trajectories, config.memory, parts.judge)
            updated = {}
            for name, agent in parts.agents.items():
                agent.activate()
                batch = RolloutBatch.pack([t.rollouts[name] for t in trajectories], agent.model.device)
                updated[name] = supervised_step(
                    agent.model,
                    agent.optimizer,
                    batch,
                    learning_rate=settings.learning_rate,
                    max_tokens=config.loss.max_tokens,
                )
            metrics = _joint(updated)
            tokens = int(sum(update["tokens_forwarded"] for update in updated.values()))
            state.tokens_forwarded += tokens
            log.write(
                {
                    "phase": "warm_start",
                    "step": step + 1,
                    **sampled_metrics(trajectories),
                    **pipeline_metrics(trajectories),
                    **metrics,
                    "tokens_forwarded": tokens,
                    "seconds": time.perf_counter() - start,
                }
            )
            advance(1, f"loss {metrics['loss']:.2f}")
    for agent in parts.agents.values():
        agent.optimizer.restart()


def scripted(config: TrainConfig, parts: MemoryParts, scripts: Sequence[MemoryScript]) -> Act:
    """Scripts as agents, one a question, played through the real environments. A rollout in which a script wrote more
    than its agent may write in a turn is counted as "long_scripts": the agent could not write it itself."""

    def act(name: str, tasks: Sequence[AgentTask], each: int) -> list[Rollout]:
        agent = parts.agents[name]
        played = []
        for task, script in zip(tasks, scripts, strict=True):
            text = {"extraction": script.notes, "profile": script.profile, "retrieval": script.answer}[name]
            queries = (script.query,) if name == "retrieval" else ()
            played.append(Demonstration(task, "", queries, text))
        rollouts = play(
            played,
            parts.environments[name],
            agent.tokenizer,
            prompt_style=config.environment.prompt,
            max_context=agent.engine.max_context,
        )
        for rollout in rollouts:
            if _is_long(config, name, rollout):
                rollout.counts["long_scripts"] = 1
        return rollouts

    return act


def evaluate(
    config: TrainConfig, parts: MemoryParts, state: State, log: MetricsLog, when: str
) -> dict[str, dict[str, float]]:
    """Greedy and sampled (temperature 1) trajectories of the held-out questions; the same draws each time."""

    def measure(
        questions: Sequence[MemoryQuestion], sampling: Sampling, group_size: int, progress: Advance
    ) -> dict[str, float]:
        trajectories = _sample(config, parts, questions, sampling, group_size, progress)
        assign_pipeline_rewards(trajectories, config.memory, parts.judge)
        return pipeline_metrics(trajectories)

    return evaluate_held_out(measure, config, parts, state, log, when, agents=len(AGENTS))


def _sample(
    config: TrainConfig,
    parts: MemoryParts,
    questions: Sequence[MemoryQuestion],
    sampling: Sampling,
    group_size: int,
    progress: Advance,
) -> list[Trajectory]:
    """Trajectories by the agents' engines."""

    def act(name: str, tasks: Sequence[AgentTask], each: int) -> list[Rollout]:
        agent = parts.agents[name]
        agent.activate()
        mine = replace(sampling, seed=derive_seed(sampling.seed, name), max_turn_tokens=turn_tokens(config, name))
        return agent.engine.rollout(tasks, parts.environments[name], mine, group_size=each, progress=progress)

    return _run(config, parts, act, questions, group_size)


def _run(
    config: TrainConfig, parts: MemoryParts, act: Act, questions: Sequence[MemoryQuestion], group_size: int = 1
) -> list[Trajectory]:
    """The pipeline, with the prompts that the agents' engines and tokenizers can be fed."""
    return run_pipeline(
        act,
        questions,
        group_size=group_size,
        fits=lambda name, task: fits(config, parts, name, task),
        special=lambda name, task: special(config, parts, name, task) is not None,
    )


def _is_long(config: TrainConfig, name: str, rollout: Rollout) -> bool:
    """Whether a turn of a rollout is longer than its agent may write."""
    turns = rollout.turns()
    limits = [turn_tokens(config, name)] * len(turns)
    if rollout.counts.get("forced_answers") and rollout.spans[-1].by_policy:
        limits[-1] = config.sampling.max_answer_tokens
    return any(turn.stop - turn.start > limit for turn, limit in zip(turns, limits, strict=True))


def _joint(updated: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of the agents' updates: sums of counts, means of the rest, and losses and gradients of each agent."""
    metrics = {}
    for what in next(iter(updated.values())):
        values = [update[what] for update in updated.values()]
        counted = what in ("optimizer_steps", "skipped_zero_advantage", "tokens_forwarded")
        metrics[what] = sum(values) if counted else fmean(values)
    for name, update in updated.items():
        metrics |= {f"{what}_{name}": update[what] for what in ("loss", "grad_norm")}
    return metrics


def _questions(questions: Sequence[Any], count: int, seed: int, step: int) -> list[MemoryQuestion]:
    return cast(list[MemoryQuestion], questions_of_step(questions, count, seed, step))
