"""The training loop: roll out, retrieve, score, credit, update, log, checkpoint.

Everything random in step k is drawn from the run's seed and k alone, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepcredit.batch import RolloutBatch
from stepcredit.credit import CreditMethod
from stepcredit.credit.base import taught_by_average, taught_by_reference
from stepcredit.data.demonstrations import Demonstration, demonstrations, in_parallel
from stepcredit.rollout import Question, Rollout
from stepcredit.scorer import PolicyScorer
from stepcredit.train.checkpoint import State, load_checkpoint, save_checkpoint
from stepcredit.train.config import TrainConfig
from stepcredit.train.draws import derive_seed, questions_of_step
from stepcredit.train.evaluation import evaluate
from stepcredit.train.metrics import Clock, MetricsLog, data_metrics, outcome_metrics
from stepcredit.train.overrides import to_json
from stepcredit.train.rewards import assign_rewards
from stepcredit.train.setup import Parts, reference_policy
from stepcredit.train.summary import conclude
from stepcredit.train.update import policy_update, supervised_step
from stepcredit.train.warm_start import play

if TYPE_CHECKING:
    from stepcredit.train.self_play import SelfPlay


def train(config: TrainConfig, parts: Parts, directory: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run a configuration to its end and return its summary, as written to `summary.json`.

    Args:
        config: what to run.
        parts: model, data and engines built from it (`stepcredit.train.setup.build`).
        directory: an existing directory, where everything is written.
        resume: continue from `directory/checkpoint`.

    Raises:
        FileNotFoundError: `resume` without a checkpoint.
        FloatingPointError: log-probs, loss or gradient stopped being finite.
    """
    started = time.perf_counter()
    log = MetricsLog(directory / "metrics.jsonl")
    (directory / "config.json").write_text(json.dumps(to_json(config), indent=1) + "\n", encoding="utf-8")
    checkpoint = directory / "checkpoint"
    reference = None
    roles = self_play(config, parts)
    average = roles.average if roles else None
    if resume:
        reference = reference_policy(config, parts)
        state = load_checkpoint(checkpoint, parts.optimizer, reference.model if reference else None, average)
        log.drop_after(state.step)
    else:
        state = State()
        log.write({"phase": "data", **data_metrics(parts.dataset), "seconds": parts.seconds})
        if roles:
            roles.warm_start(state, log)
        else:
            warm_start(config, parts, state, log)
        reference = reference_policy(config, parts)
        state.before = evaluate(config, parts, state, log, "before")
    started -= state.seconds + parts.seconds

    with parts.reporter.task("GRPO", config.steps) as advance:
        advance(state.step)
        audited = False  # of this process: a resumed run may be on another machine
        for step in range(state.step, config.steps):
            if roles:
                metrics = roles.step(state, step, reference, verify=not audited)
            else:
                metrics = train_step(config, parts, state, step, reference, verify=not audited)
            audited |= "ig/audit_difference" in metrics
            log.write(metrics)
            advance(1, step_note(metrics))
            state.step, state.seconds = step + 1, time.perf_counter() - started
            if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                save_checkpoint(checkpoint, parts.optimizer, state, reference.model if reference else None, average)

    after = evaluate(config, parts, state, log, "after")
    parts.model.save_pretrained(directory / "model")
    parts.tokenizer.save_pretrained(directory / "model")
    state.seconds = time.perf_counter() - started
    return conclude(config, state, after, log, directory, parts.reporter)


def self_play(config: TrainConfig, parts: Parts) -> SelfPlay | None:
    """The roles of self-play, where there is any."""
    if not config.self_play.enabled:
        return None
    from stepcredit.train.self_play import SelfPlay

    return SelfPlay(config, parts)


def train_step(
    config: TrainConfig,
    parts: Parts,
    state: State,
    step: int,
    reference: PolicyScorer | None,
    *,
    verify: bool = False,
    questions: Sequence[Question] | None = None,
    average: PolicyScorer | None = None,
) -> dict[str, Any]:
    """One GRPO step on the data set's questions, or those given; returns its metrics. `verify`: the credit is audited
    where its method can be. `average`: the teacher of a method that asks for an average of the policy."""
    torch.manual_seed(derive_seed(config.seed, "step", step))  # for whatever draws from the global generator
    clock = Clock()
    forwarded_before, waited_before = parts.engine.tokens_forwarded, parts.seconds_retrieval
    if questions is None:
        questions = questions_of_step(parts.dataset.train, config.questions_per_step, config.seed, step)

    with clock("rollout"), parts.reporter.task("  rollouts", len(questions) * config.group_size) as advance:
        rollouts = parts.engine.rollout(
            questions,
            parts.environment,
            config.sampling.build(derive_seed(config.seed, "rollout", step)),
            group_size=config.group_size,
            progress=advance,
        )
    assign_rewards(rollouts, config.rewards, parts.tokenizer)
    learnt = learn(
        config,
        parts,
        state,
        step,
        rollouts,
        clock,
        method=config.credit,
        reference=reference,
        average=average,
        tokens_rollout=parts.engine.tokens_forwarded - forwarded_before,
        seconds_retrieval=parts.seconds_retrieval - waited_before,
        verify=verify,
    )
    return {"phase": "grpo", "step": step + 1, **outcome_metrics(rollouts), **learnt}


def learn(
    config: TrainConfig,
    parts: Parts,
    state: State,
    step: int,
    rollouts: Sequence[Rollout],
    clock: Clock,
    *,
    method: CreditMethod,
    reference: PolicyScorer | None,
    tokens_rollout: int,
    seconds_retrieval: float,
    average: PolicyScorer | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Credit of rewarded rollouts and the update on them; returns the metrics of both, and what the step took.

    Args:
        clock: of the step, from its beginning.
        method: of the credit.
        tokens_rollout, seconds_retrieval: what sampling the rollouts took.
        reference, average, verify: as in `train_step`.
    """
    batch = RolloutBatch.pack(rollouts, parts.model.device)
    teacher: dict[str, Any] = {"teacher": reference} if taught_by_reference(method) else {}
    if taught_by_average(method):
        teacher = {"teacher": average}
    with clock("credit"):
        credit = method(
            batch,
            parts.scorer,
            step=derive_seed(config.seed, "credit", step),
            progress=step / config.steps,
            temperature=config.sampling.temperature if config.loss.optimizer_steps > 1 else None,
            verify=verify,
            **teacher,
        )
    with clock("update"):
        updated = policy_update(
            parts.scorer,
            parts.optimizer,
            batch,
            credit,
            config.loss,
            learning_rate=config.optimizer.rate(step),
            temperature=config.sampling.temperature,
            reference=reference,
        )

    tokens = {
        "tokens_rollout": tokens_rollout,
        "tokens_credit": credit.metrics.get("tokens_forwarded", 0.0),
        "tokens_update": updated["tokens_forwarded"],
    }
    state.tokens_forwarded += int(sum(tokens.values()))
    state.seconds_steps += clock.total
    state.seconds_ig += credit.metrics.get("ig/seconds", 0.0)
    return {
        **credit.metrics,
        **updated,
        "learning_rate": config.optimizer.rate(step),
        **tokens,
        "tokens_forwarded": sum(tokens.values()),
        **{f"seconds_{name}": seconds for name, seconds in clock.seconds.items()},
        "ig_seconds_share": credit.metrics.get("ig/seconds", 0.0) / clock.total,
        "seconds_retrieval": seconds_retrieval,
        "seconds": clock.total,
    }


def step_note(metrics: Mapping[str, Any]) -> str:
    """What the progress bar shows of a step."""
    if metrics["phase"] == "skipped":
        return "no question to answer"
    last = f"EM {100 * float(metrics['em']):.1f}" if "em" in metrics else f"accepted {metrics['pi_play/accepted']:.0f}"
    return f"reward {metrics['reward']:.2f}  {last}"


def warm_start(
    config: TrainConfig,
    parts: Parts,
    state: State,
    log: MetricsLog,
    *,
    questions: Sequence[Question] | None = None,
    also: Callable[[int], list[Rollout]] = lambda step: [],
) -> None:
    """Supervised steps on demonstrations of training questions, or of those given, and on rollouts of another role that
    `also` gives for each step; afterwards the optimizer starts afresh."""
    settings = config.warm_start
    if questions is None:
        known = [q for q in parts.dataset.train if q.plan or not settings.mix.needs_plan]
        count = settings.steps * settings.batch
        if count and not known:
            raise ValueError(f"warm_start.steps={settings.steps}, but no training question has a plan to demonstrate")
        questions = questions_of_step(known, count, derive_seed(config.seed, "warm start"), 0)
    scripts = warm_start_scripts(config, parts, questions)
    with parts.reporter.task("warm start", settings.steps) as advance:
        for step in range(settings.steps):
            start = time.perf_counter()
            rollouts = play(
                scripts[step * settings.batch : (step + 1) * settings.batch],
                parts.environment,
                parts.tokenizer,
                prompt_style=config.environment.prompt,
                max_context=parts.engine.max_context,
            )
            assign_rewards(rollouts, config.rewards, parts.tokenizer)
            metrics = supervised_step(
                parts.model,
                parts.optimizer,
                RolloutBatch.pack([*rollouts, *also(step)], parts.model.device),
                learning_rate=settings.learning_rate,
                max_tokens=config.loss.max_tokens,
            )
            state.tokens_forwarded += int(metrics["tokens_forwarded"])
            log.write(
                {
                    "phase": "warm_start",
                    "step": step + 1,
                    **outcome_metrics(rollouts),
                    **metrics,
                    "seconds": time.perf_counter() - start,
                }
            )
            advance(1, f"loss {metrics['loss']:.2f}")
    parts.optimizer.restart()


def warm_start_scripts(config: TrainConfig, parts: Parts, questions: Sequence[Question]) -> list[Demonstration]:
    """A demonstration of each question; the scripts of its episodes are drawn independently of each other."""
    settings = config.warm_start
    episodes = []
    for number in range(config.environment.episodes):
        purpose = (number,) if number else ()
        scripts = demonstrations(questions, settings.mix, derive_seed(config.seed, "demonstrations", *purpose))
        if parts.environment.protocol.several_queries:
            seed = derive_seed(config.seed, "parallel queries", *purpose)
            scripts = in_parallel(scripts, several=settings.several, merged=settings.merged, seed=seed)
        episodes.append(scripts)
    return [replace(first, later=tuple(later)) for first, *later in zip(*episodes, strict=True)]
