"""What a run came to: `summary.json` and the last line on the console."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepcredit.report.curves import draw_curves
from stepcredit.train.checkpoint import State
from stepcredit.train.config import TrainConfig
from stepcredit.train.metrics import MetricsLog
from stepcredit.train.progress import Reporter


def conclude(
    config: TrainConfig,
    state: State,
    after: Mapping[str, Mapping[str, float]],
    log: MetricsLog,
    directory: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """End a run: write `summary.json` and `curves.png` into its directory and say both; returns the summary."""
    summary = summarize_run(config, state, after)
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    reporter.line(draw_curves(log.read(), directory / "curves.png"))
    reporter.line(summary_line(summary))
    return summary


def summarize_run(config: TrainConfig, state: State, after: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The fields of `summary.json`; a value that was not measured is None."""
    ends = {"before": state.before or {}, "after": after}
    summary: dict[str, Any] = {}
    for name, mode, key in (
        ("em", "greedy", "em"),
        ("em_sampled", "sampled", "em"),
        ("f1", "greedy", "f1"),
        ("hit", "greedy", "hit"),
        ("hit_sampled", "sampled", "hit"),
        ("finished", "greedy", "finished"),
    ):
        for end, results in ends.items():
            summary[f"{name}_{end}"] = results.get(mode, {}).get(key)
    if "clarify/iou" in after.get("greedy", {}):
        summary |= {f"iou_{end}": results.get("greedy", {}).get("clarify/iou") for end, results in ends.items()}
    return {
        **summary,
        "seconds": round(state.seconds, 1),
        "steps": state.step,
        "tokens_forwarded": state.tokens_forwarded,
        "ig_seconds_share": round(state.seconds_ig / state.seconds_steps, 4) if state.seconds_steps else 0.0,
        "seed": config.seed,
    }


def summary_line(summary: Mapping[str, Any]) -> str:
    """The run in one line, e.g. "held-out EM 27.5 -> 41.0 (sampled 11.3 -> 30.1), gold passages .63 -> .78, ...";
    of scenes the IoU in place of the passages."""

    def change(name: str, show: str) -> str:
        ends = [summary[f"{name}_before"], summary[f"{name}_after"]]
        return " -> ".join("-" if value is None else show.format(100 * value, value) for value in ends)

    found, name = ("IoU", "iou") if "iou_after" in summary else ("gold passages", "hit")
    hits = change(name, "{1:.2f}").replace("0.", ".")
    return (
        f"held-out EM {change('em', '{0:.1f}')} (sampled {change('em_sampled', '{0:.1f}')}), "
        f"{found} {hits}, {summary['steps']} steps, {summary['seconds']:.0f} s"
    )
