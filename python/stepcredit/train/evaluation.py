"""The evaluation before and after a run's steps."""

from __future__ import annotations

import time
from dataclasses import replace

from stepcredit.evaluate import summarize
from stepcredit.train.checkpoint import State
from stepcredit.train.config import TrainConfig
from stepcredit.train.draws import derive_seed
from stepcredit.train.metrics import MetricsLog
from stepcredit.train.setup import Parts


def evaluate(
    config: TrainConfig, parts: Parts, state: State, log: MetricsLog, when: str
) -> dict[str, dict[str, float]]:
    """Greedy and sampled (temperature 1) rollouts of the held-out questions, summarised; the same draws each time."""
    questions = getattr(parts.dataset, config.evaluation.split)[: config.evaluation.questions]
    sampled = replace(config.sampling.build(derive_seed(config.seed, "evaluation")), temperature=1.0, top_p=1.0)
    modes = {"greedy": (replace(sampled, greedy=True), 1)}
    if config.evaluation.samples:
        modes["sampled"] = (sampled, config.evaluation.samples)
    start, forwarded = time.perf_counter(), parts.engine.tokens_forwarded
    results = {}
    with parts.reporter.task(
        f"evaluation {when}", len(questions) * sum(group_size for _, group_size in modes.values())
    ) as advance:
        for name, (sampling, group_size) in modes.items():
            results[name] = summarize(
                parts.engine.rollout(questions, parts.environment, sampling, group_size=group_size, progress=advance)
            )
            advance(0, f"{name} EM {100 * results[name]['em']:.1f}")
    tokens = parts.engine.tokens_forwarded - forwarded
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
