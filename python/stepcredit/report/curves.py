"""Learning curves of a run as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Panels by key: title, then (metric, label, factor) of each line.
_PANELS: dict[str, tuple[str, tuple[tuple[str, str, float], ...]]] = {
    "reward": ("Reward", (("reward", "total", 1), ("reward_f1", "F1", 1), ("reward_std", "std within groups", 1))),
    "answers": ("Answers, %", (("em", "EM", 100), ("f1", "F1", 100), ("finished", "finished", 100))),
    "retrieval": ("Retrieval, %", (("hit", "gold passages", 100), ("any_hit", "any gold passage", 100))),
    "searches": ("Searches per rollout", (("searches", "searches", 1),)),
    "gain": ("Information gain, nats per token", (("ig/gain_mean", "mean", 1), ("ig/gain_std", "std", 1))),
    "seconds": (
        "Seconds per step",
        (("seconds_rollout", "rollout", 1), ("seconds_credit", "credit", 1), ("seconds_update", "update", 1)),
    ),
}  # fmt: skip

#: In the place of the information gain where self-play has an examiner; its points are the examiner's steps.
_EXAMINER = (
    "Examiner",
    (("reward", "reward", 1), ("pi_play/success", "student's success", 1), ("reward_format", "accepted", 1)),
)

_COLOURS = ("#1f5fa8", "#d1701f", "#6b6b6b")


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path) -> str:
    """Draw the GRPO steps, and the held-out evaluations at their ends, into `path`.

    Args:
        metrics: the lines of `metrics.jsonl`.
        path: where the PNG goes.

    Returns:
        One sentence to print: where the curves are, or why there are none.
    """
    steps = [m for m in metrics if m["phase"] == "grpo"]
    examiner = [m for m in metrics if m["phase"] == "examiner"]
    if not steps and not examiner:
        return f"{path} was not drawn: no GRPO step was made"
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return f"{path} was not drawn: matplotlib is not installed (pip install matplotlib)"
    evaluations = {m["when"]: m for m in metrics if m["phase"] == "evaluation"}
    panels = dict(_PANELS)
    if examiner:
        panels["gain"] = _EXAMINER
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, (key, (title, lines)) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for (name, label, factor), colour in zip(lines, _COLOURS, strict=False):
            shown = examiner if examiner and key == "gain" else steps
            points = [(m["step"], factor * m[name]) for m in shown if m.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3)
            ends = [
                (m["step"], factor * m[sampled])
                for when in ("before", "after")
                if (m := evaluations.get(when)) and (sampled := f"sampled_{name}") in m
            ]
            if ends and title.endswith("%"):
                axes.plot(
                    *zip(*ends, strict=True), color=colour, linestyle="none", marker="D", label=f"{label}, held out"
                )
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("GRPO step", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if title.endswith("%"):
            axes.set_ylim(-2, 102)
        elif key != "gain" or examiner:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="grey")
    figure.savefig(path, dpi=130)
    return f"learning curves: {path}"
