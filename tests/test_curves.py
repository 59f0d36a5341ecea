"""Learning curves: which panels are drawn, of which figures."""

from __future__ import annotations

import sys

import pytest

from stepcredit.report.curves import draw_curves

pytest.importorskip("matplotlib")

#: What every run of one policy measures, and a memory pipeline too.
COMMON = dict(reward=0.5, em=0.25, hit=0.75, searches=1.5, seconds_rollout=2.0)
ALWAYS = ["Reward", "Answers, %", "Retrieval, %", "Searches per rollout", "Seconds per step"]


def step(number: int, phase: str = "grpo", **figures: float | None) -> dict:
    return {"phase": phase, "step": number, **figures}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figures as they are saved: of each panel its lines, as label -> points."""
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))

    def draw(metrics: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
        assert draw_curves(metrics, tmp_path / "curves.png") == f"learning curves: {tmp_path / 'curves.png'}"
        (figure,) = saved
        saved.clear()
        return {
            axes.get_title(loc="left"): {
                line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.get_lines()
            }
            for axes in figure.axes
        }

    return draw


def test_panels_without_figures_are_left_out(drawn):
    assert list(drawn([step(1, **COMMON)])) == ALWAYS
    assert list(drawn([step(1, **COMMON, **{"ig/gain_mean": None})])) == ALWAYS  # no step was scored
    assert list(drawn([step(1, reward=0.5, searches=None)])) == ["Reward"]
    gains = [step(1, **COMMON, **{"ig/gain_mean": 0.1, "ig/gain_std": 0.2}), step(2, **COMMON)]
    panels = drawn(gains)
    assert list(panels) == [*ALWAYS[:4], "Information gain, nats per token", ALWAYS[4]]
    assert panels["Information gain, nats per token"] == {"mean": [(1.0, 0.1)], "std": [(1.0, 0.2)]}


def test_a_memory_pipeline_has_no_gain(drawn):
    """As CoMAM logs it: metrics of the agents beside the common ones, and seconds of its credit."""
    lines = [
        step(n, **COMMON, seconds_credit=0.5, local_profile=0.1 * n, **{"comam/weight_profile": 0.3}) for n in (1, 2)
    ]
    panels = drawn(lines)
    assert list(panels) == ALWAYS
    assert panels["Seconds per step"] == {"rollout": [(1.0, 2.0), (2.0, 2.0)], "credit": [(1.0, 0.5), (2.0, 0.5)]}


def test_shares_are_in_percent_beside_the_last_held_out_evaluations(drawn):
    def evaluation(when: str, at: int, em: float) -> dict:
        return {
            "phase": "evaluation",
            "when": when,
            "step": at,
            "greedy_em": 1.0,
            "sampled_em": em,
            "sampled_reward": 1,
        }

    before, first, last = evaluation("before", 0, 0.5), evaluation("after", 1, 0.75), evaluation("after", 2, 1.0)
    panels = drawn([before, step(1, reward=0.5, em=0.25), first, step(2, reward=0.25, em=None), last])
    assert panels == {
        "Reward": {"total": [(1.0, 0.5), (2.0, 0.25)]},
        "Answers, %": {"EM": [(1.0, 25.0)], "EM, held out": [(0.0, 50.0), (2.0, 100.0)]},
    }


def test_the_examiner_of_self_play_has_a_panel_of_its_own(drawn):
    examined = step(1, "examiner", reward=0.2, reward_format=0.5, **{"pi_play/success": 0.25})
    points = {"reward": [(1.0, 0.2)], "student's success": [(1.0, 0.25)], "accepted": [(1.0, 0.5)]}
    assert drawn([examined]) == {"Examiner": points}  # no step of the student's yet
    panels = drawn([examined, step(2, **COMMON)])
    assert list(panels) == [*ALWAYS[:4], "Examiner", ALWAYS[4]]
    assert panels["Examiner"] == points
    assert panels["Reward"] == {"total": [(2.0, 0.5)]}


def test_curves_are_drawn_or_say_why_not(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    assert "no GRPO step" in draw_curves(
        [{"phase": "evaluation", "when": "before", "step": 0, "sampled_em": 1.0}], path
    )
    line = step(1, reward=0.5, em=None)
    assert str(path) in draw_curves([line], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in draw_curves([line], tmp_path / "other.png")
