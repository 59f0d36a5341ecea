"""Learning curves of a run as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class _Line(NamedTuple):
    metric: str
    label: str


class _Panel(NamedTuple):
    """Lines that share axes; `phase` is that of the steps they are read from. Of shares, which are drawn in percent,
    the held-out evaluations are drawn too."""

    title: str
    lines: tuple[_Line, ...]
    shares: bool = False
    signed: bool = False
    phase: str = "grpo"


_PANELS = (
    _Panel("Reward", (_Line("reward", "total"), _Line("reward_f1", "F1"), _Line("reward_std", "std within groups"))),
    _Panel("Answers, %", (_Line("em", "EM"), _Line("f1", "F1"), _Line("finished", "finished")), shares=True),
    _Panel("Retrieval, %", (_Line("hit", "gold passages"), _Line("any_hit", "any gold passage")), shares=True),
    _Panel("Searches per rollout", (_Line("searches", "searches"),)),
    _Panel(
        "Information gain, nats per token", (_Line("ig/gain_mean", "mean"), _Line("ig/gain_std", "std")), signed=True
    ),
    _Panel(
        "Examiner",
        (_Line("reward", "reward"), _Line("pi_play/success", "student's success"), _Line("reward_format", "accepted")),
        phase="examiner",
    ),
    _Panel(
        "Seconds per step",
        (_Line("seconds_rollout", "rollout"), _Line("seconds_credit", "credit"), _Line("seconds_update", "update")),
    ),
)

_COLOURS = ("#1f5fa8", "#d1701f", "#6b6b6b")

_Points = list[tuple[float, float]]


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path) -> str:
    """Draw the GRPO steps, and the held-out evaluations at their ends, into `path`: of all panels those for which the
    run has figures.

    Args:
        metrics: the lines of `metrics.jsonl`.
        path: where the PNG goes.

    Returns:
        One sentence to print: where the curves are, or why there are none.
    """
    if not any(m["phase"] in ("grpo", "examiner") for m in metrics):
        return f"{path} was not drawn: no GRPO step was made"
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return f"{path} was not drawn: matplotlib is not installed (pip install matplotlib)"
    read = [(panel, _read(panel, metrics)) for panel in _PANELS]
    panels = [(panel, drawn) for panel, drawn in read if any(steps or ends for _, steps, ends in drawn)]
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.25 * rows), layout="constrained")
    for number, (panel, drawn) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        for (label, steps, ends), colour in zip(drawn, _COLOURS, strict=False):
            if steps:
                axes.plot(*zip(*steps, strict=True), color=colour, label=label, marker="o", markersize=3)
            if ends:
                axes.plot(
                    *zip(*ends, strict=True), color=colour, linestyle="none", marker="D", label=f"{label}, held out"
                )
        axes.set_title(panel.title, fontsize=11, loc="left")
        axes.set_xlabel("GRPO step", fontsize=9)
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if panel.shares:
            axes.set_ylim(-2, 102)
        elif not panel.signed:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    return f"learning curves: {path}"


def _read(panel: _Panel, metrics: Sequence[dict[str, Any]]) -> list[tuple[str, _Points, _Points]]:
    """Label, (step, value) of the steps and (step, value) of the held-out evaluations of each of a panel's lines."""
    factor = 100 if panel.shares else 1
    steps = [m for m in metrics if m["phase"] == panel.phase]
    # A run that was resumed evaluates again: the last time counts.
    evaluations = {m["when"]: m for m in metrics if panel.shares and m["phase"] == "evaluation"}
    ends = [evaluations[when] for when in ("before", "after") if when in evaluations]
    return [
        (label, _points(steps, name, factor), _points(ends, f"sampled_{name}", factor)) for name, label in panel.lines
    ]


def _points(lines: Sequence[dict[str, Any]], name: str, factor: int) -> _Points:
    return [(line["step"], factor * line[name]) for line in lines if line.get(name) is not None]
