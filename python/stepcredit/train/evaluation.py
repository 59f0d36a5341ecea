"""Evaluation on held-out questions, before and after the reinforcement learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from stepcredit.data import Dataset
from stepcredit.evaluate import summarize
from stepcredit.rollout import Question
from stepcredit.train.checkpoint import State
from stepcredit.train.config import TrainConfig
from stepcredit.train.draws import derive_seed
from stepcredit.train.engine import Sampling
from stepcredit.train.metrics import MetricsLog
from stepcredit.train.progress import Advance, Reporter
from stepcredit.train.setup import Parts

#: Called with questions, the sampling, the number of rollouts of each question, and what progress is reported to; rolls
#: the questions out and gives metrics, "em" among them.
Measure = Callable[[Sequence[Any], Sampling, int, Advance], dict[str, float]]


class Evaluated(Protocol):
    """The parts of a run that an evaluation looks at."""

    @property
    def dataset(self) -> Dataset:
        """Has the held-out questions."""

    @property
    def reporter(self) -> Reporter:
        """Shows progress."""

    @property
    def tokens_forwarded(self) -> int:
        """Tokens run through the models for rollouts so far."""


def evaluate_held_out(
    measure: Measure,
    config: TrainConfig,
    parts: Evaluated,
    state: State,
    log: MetricsLog,
    when: str,
    *,
    agents: int = 1,
) -> dict[str, dict[str, float]]:
    """Greedy and sampled (temperature 1) rollouts of the held-out questions, measured; the same draws each time.

    Args:
        measure: rolls out and measures.
        config, parts, state, log: of the run; a line is logged, and the tokens are added to the state's.
        when: "before" or "after".
        agents: rollouts that one answer takes.

    Returns:
        Metrics by "greedy" and, with `evaluation.samples`, "sampled".
    """
    questions = getattr(parts.dataset, config.evaluation.split)[: config.evaluation.questions]
    sampled = replace(config.sampling.build(derive_seed(config.seed, "evaluation")), temperature=1.0, top_p=1.0)
    modes = {"greedy": (replace(sampled, greedy=True), 1)}
    if config.evaluation.samples:
        modes["sampled"] = (sampled, config.evaluation.samples)
    start, before = time.perf_counter(), parts.tokens_forwarded
    results = {}
    total = agents * len(questions) * sum(group_size for _, group_size in modes.values())
    with parts.reporter.task(f"evaluation {when}", total) as advance:
        for name, (sampling, group_size) in modes.items():
            results[name] = measure(questions, sampling, group_size, advance)
            advance(0, f"{name} EM {100 * results[name]['em']:.1f}")
    tokens = parts.tokens_forwarded - before
    state.tokens_forwarded += tokens
    named = {f"{mode}_{name}": value for mode, result in results.items() for name, value in result.items()}
    log.write(
        {
            "phase": "evaluation",
            "when": when,
            "step": state.step,
            **named,
            "tokens_forwarded": tokens,
            "seconds": time.perf_counter() - start,
        }
    )
    return results


def evaluate(
    config: TrainConfig, parts: Parts, state: State, log: MetricsLog, when: str
) -> dict[str, dict[str, float]]:
    """`evaluate_held_out` of one policy, by `stepcredit.evaluate.summarize`."""

    def measure(
        questions: Sequence[Question], sampling: Sampling, group_size: int, progress: Advance
    ) -> dict[str, float]:
        rollout = parts.engine.rollout
        return summarize(rollout(questions, parts.environment, sampling, group_size=group_size, progress=progress))

    return evaluate_held_out(measure, config, parts, state, log, when)
