"""Self-play in the trainer: both roles, their metrics, checkpoints, and the data set that nobody touches."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from stepcredit.batch import RolloutBatch
from stepcredit.branches.policy_tokens import score_tokens
from stepcredit.credit import SearchR1
from stepcredit.data.demonstrations import Demonstration
from stepcredit.report.curves import draw_curves
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer
from stepcredit.train import __main__ as command
from stepcredit.train import loop, self_play, summary
from stepcredit.train.checkpoint import State, load_checkpoint
from stepcredit.train.config import TrainConfig
from stepcredit.train.metrics import MetricsLog, documented
from stepcredit.train.overrides import apply_overrides, from_json, to_json
from stepcredit.train.recipes import get_recipe
from stepcredit.train.self_play import SelfPlay
from stepcredit.train.setup import Parts, frozen_copy
from stepcredit.train.warm_start import play
from tiny_run import same, tiny_parts

SMALL = (
    "model.name=tiny", "model.dtype=float32", "model.device=cpu", "optimizer.learning_rate=1e-3", "warm_start.steps=0",
    "evaluation.questions=2", "evaluation.samples=0", "questions_per_step=2", "group_size=4", "credit.weight=1",
    "self_play.examiner_steps=1", "self_play.student_steps=2", "self_play.seeds=2", "self_play.walks=4",
    "sampling.max_turn_tokens=24", "sampling.max_answer_tokens=8",
)  # fmt: skip
TIMED = ("seconds", "ig_seconds_share", "pi_play/seconds")
Script = Callable[[Question, int], Demonstration]


def pi_config(*overrides: str) -> TrainConfig:
    return apply_overrides(get_recipe("pi_play"), [*SMALL, *overrides])


class Scripted:
    """An engine whose policy follows a script: `script(question, member)` is the demonstration it plays."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Script) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.tokens_forwarded, self.max_context = 0, 2048

    def rollout(self, questions, environment, sampling, *, group_size=1, progress=None):
        scripts = [self.script(question, i) for question in questions for i in range(group_size)]
        rollouts = play(scripts, environment, self.tokenizer)
        for number, rollout in enumerate(rollouts):
            rollout.group = number // group_size
        self.tokens_forwarded += sum(len(rollout.tokens) for rollout in rollouts)
        return rollouts


def writes(question, member):
    """Of four walks the first two ask well, the third repeats the first, the fourth asks for what was not shown."""
    title, answer = question.text.split(":")[0], question.text.rstrip(".").split()[-1]
    asks = f"Of what is {title} number {member % 2 if member < 3 else 3}?"
    return Demonstration(question, "", (title,), "nowhere at all" if member == 3 else answer, asks=asks)


def says_nothing(question, member):
    return Demonstration(question, "", ("a query",), "no question before it")


def answers(question, member):
    """Right in one attempt of four where the number of the question's walk is even, and in all where it is odd."""
    right = bool(question.path) and (member == 0 or int(question.id.split(":")[-1]) % 2 == 1)
    return Demonstration(question, "", ("a query",), question.answers[0] if right else "wrong")


def scripted_roles(monkeypatch: pytest.MonkeyPatch, script: Script) -> list[SelfPlay]:
    """An examiner that follows a script; the roles that the trainer makes are found here."""
    monkeypatch.setattr(self_play, "HFEngine", lambda model, tokenizer, *args, **more: Scripted(tokenizer, script))
    made: list[SelfPlay] = []

    def remember(config: TrainConfig, parts: Parts) -> SelfPlay:
        made.append(SelfPlay(config, parts))
        return made[-1]

    monkeypatch.setattr(loop, "self_play", remember)
    return made


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Drawing takes longer than a step."""
    monkeypatch.setattr(summary, "draw_curves", lambda metrics, path: "")


@pytest.fixture
def roles(monkeypatch) -> list[SelfPlay]:
    return scripted_roles(monkeypatch, writes)


def scripted_parts(dtype: torch.dtype = torch.float32) -> Parts:
    """A random policy, and a student that follows its script."""
    parts = tiny_parts(dtype)
    engine, dataset = Scripted(parts.tokenizer, answers), dataclasses.replace(parts.dataset, train=[])
    return dataclasses.replace(parts, engine=engine, dataset=dataset)


def lines_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def run(directory: Path, *overrides: str, resume: bool = False, dtype: torch.dtype = torch.float32) -> Parts:
    directory.mkdir(exist_ok=True)
    parts = scripted_parts(dtype)
    loop.train(pi_config(*overrides), parts, directory, resume=resume)
    return parts


# The steps of both roles


def test_iterations_alternate_and_what_they_log(tmp_path, roles):
    run(tmp_path, "steps=6")
    steps = [line for line in lines_of(tmp_path) if line["phase"] in ("examiner", "grpo")]
    assert [line["phase"] for line in steps] == ["examiner", "grpo", "grpo"] * 2
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["pi_play/iteration"] for line in steps] == [1, 1, 1, 2, 2, 2]
    for line in steps:
        assert [name for name in line if not documented(name)] == []
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
    for line in (steps[0], steps[3]):
        assert (line["pi_play/accepted"], line["pi_play/rejected_duplicate"]) == (4, 2)
        assert line["pi_play/rejected_unsupported"] == 2
        assert sum(v for k, v in line.items() if k.startswith("pi_play/rejected_")) + 4 == line["rollouts"] == 8
        # Two questions are right once in four attempts, and worth 3/4 and the format; two always, and worth that alone.
        assert (line["pi_play/success_1_of_4"], line["pi_play/success_4_of_4"]) == (2, 2)
        assert sum(v for k, v in line.items() if k.startswith("pi_play/success_")) == 4
        assert line["pi_play/success"] == pytest.approx(5 / 8)
        assert line["reward"] == pytest.approx((2 * 0.85 + 2 * 0.1) / 8)
        assert (line["reward_format"], line["reward_difficulty"]) == (0.5, 0.1875)
        assert line["grad_norm"] > 0
        assert "em" not in line
    for line in (*steps[1:3], *steps[4:]):
        assert line["pi_play/questions"] == 4
        assert line["pi_play/loss"] > 0
        assert 0 < line["pi_play/ema_distance"] < 1
        assert line["pi_play/without_path"] == 0
        assert 0 < line["em"] <= 1
    for drawn in (steps, steps[:1]):  # no step of the student's yet
        assert draw_curves(drawn, path := tmp_path / "curves.png") == f"learning curves: {path}"
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_average_moves_after_student_steps_alone(roles):
    parts = scripted_parts()
    both, state = SelfPlay(pi_config(), parts), State()
    start = {k: v.clone() for k, v in both.average.state().items()}
    both.step(state, 0, None)
    assert same(both.average.state(), start)
    assert not same({k: m.detach() for k, m in parts.optimizer.masters.items()}, start)
    both.step(state, 1, None)
    for name, average in both.average.state().items():
        torch.testing.assert_close(average, start[name].lerp(parts.optimizer.masters[name].detach(), 0.05))
    assert not same(both.average.state(), start)


def test_the_student_is_asked_what_its_iteration_accepted(roles):
    config = pi_config("self_play.examiner_steps=2", "self_play.student_steps=4")
    both, state = SelfPlay(config, scripted_parts()), State()
    asked, rollout = [], both.parts.engine.rollout
    both.parts.engine.rollout = lambda questions, *rest, **more: (
        asked.append(questions) or rollout(questions, *rest, **more)
    )
    for step in range(2):
        both.step(state, step, None)
    first = list(state.questions)
    assert len(first) == len(state.asked) == 8
    assert asked == [first[:4], first[4:]]
    assert all(question.path for question in first)
    for step in range(2, 6):
        both.step(state, step, None)
    assert sorted(q.id for group in asked[2:] for q in group) == sorted(q.id for q in first)
    both.step(state, 6, None)
    assert state.iteration == 1
    assert not {q.id for q in first} & {q.id for q in state.questions}
    # Without a new one the last ones stay.
    SelfPlay._keep(state, [], set(), 2)
    assert state.iteration == 1
    assert state.questions


def test_without_a_question_the_student_s_step_is_skipped_and_says_so(tmp_path, monkeypatch):
    roles = scripted_roles(monkeypatch, says_nothing)
    run(tmp_path, "steps=3")
    steps = [line for line in lines_of(tmp_path) if "pi_play/iteration" in line]
    assert [line["phase"] for line in steps] == ["examiner", "skipped", "skipped"]
    assert steps[0]["pi_play/rejected_format"] == 8
    assert steps[0]["reward"] == 0
    assert steps[0]["optimizer_steps"] == 0
    assert "pi_play/success" not in steps[0]
    assert all(documented(name) for line in steps for name in line)
    assert roles[0].average.distance() == 0


def test_twenty_steps_stay_finite_and_move_towards_the_teacher(tmp_path, roles):
    """Scripts play the same rollouts under either weight: what is left of the divergence is the weight's doing."""
    left = {}
    for weight in (1.0, 1e-9):
        run(
            tmp_path / f"{weight}",
            "steps=20",
            "self_play.student_steps=4",
            "self_play.seeds=1",
            f"credit.weight={weight}",
        )
        steps = [line for line in lines_of(tmp_path / f"{weight}") if line["phase"] in ("examiner", "grpo")]
        assert len(steps) == 20
        assert all(math.isfinite(v) for line in steps for v in line.values() if isinstance(v, float))
        left[weight] = [line["pi_play/loss"] for line in steps if line["phase"] == "grpo"]
    assert left[1.0][0] == left[1e-9][0] > 0
    assert sum(left[1.0][-4:]) < 0.9 * sum(left[1e-9][-4:])


def test_the_examiner_moves_towards_what_earned_most(roles):
    both = SelfPlay(pi_config(), scripted_parts())
    walks, rollout, parts = [], both.engine.rollout, both.parts
    both.engine.rollout = lambda *rest, **more: walks.extend(rollout(*rest, **more)) or walks
    before = PolicyScorer(frozen_copy(parts.model), parts.tokenizer, parts.scorer.protocol)
    both.step(State(), 0, None)
    batch = RolloutBatch.pack(walks)
    after, start = (
        score_tokens(batch, scorer, batch.policy_mask, temperature=1.0) for scorer in (parts.scorer, before)
    )
    rises = [float(rise.sum()) for rise in (after - start).split(batch.cu_seqlens.diff().tolist())]
    for first in (0, 4):
        rewards = [walk.reward for walk in walks[first : first + 4]]
        assert rewards == pytest.approx([0.85, 0.1, 0, 0])
        assert rises[first] == max(rises[first : first + 4]) > 0


def test_the_warm_start_speaks_the_students_grammar(tmp_path, roles):
    """With several queries a search the student is shown several, as without self-play."""
    several = ("environment.protocol=multi_search", "warm_start.several=1")
    config = pi_config(*several, "warm_start.steps=1", "warm_start.batch=8")
    parts = scripted_parts()
    parts.environment.protocol = config.environment.grammar
    SelfPlay(config, parts).warm_start(State(), MetricsLog(tmp_path / "m.jsonl"))
    (line,) = MetricsLog(tmp_path / "m.jsonl").read()
    assert line["reward_multi_query"] > 0


def test_another_credit_needs_no_average(roles):
    both, state = SelfPlay(dataclasses.replace(pi_config(), credit=SearchR1()), scripted_parts()), State()
    assert both.average is None
    both.step(state, 0, None)
    metrics = both.step(state, 1, None)
    assert metrics["phase"] == "grpo"
    assert "pi_play/ema_distance" not in metrics


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_run_resumes_inside_an_iteration_bit_for_bit(tmp_path, roles, dtype):
    options = ("checkpoint_every=1", "loss.kl_coef=0.1")
    whole = run(tmp_path / "whole", "steps=4", *options, dtype=dtype)
    run(tmp_path / "parts", "steps=2", *options, dtype=dtype)
    resumed = run(tmp_path / "parts", "steps=4", *options, resume=True, dtype=dtype)
    average, _, again = (both.average for both in roles)
    assert same(whole.optimizer.state(), resumed.optimizer.state())
    assert same(average.state(), again.state())
    assert same(average.scorer.model.state_dict(), again.scorer.model.state_dict())
    assert not same(average.state(), {name: m.detach() for name, m in whole.optimizer.masters.items()})
    found, states = [], []
    for name in ("whole", "parts"):
        untimed = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines_of(tmp_path / name)]
        found.append(untimed)
        states.append(load_checkpoint(tmp_path / name / "checkpoint", whole.optimizer))
    assert found[0] == found[1]
    assert states[0].questions == states[1].questions
    assert states[0].questions[0].path[0][0] == ""
    assert states[0].asked == states[1].asked
    assert (tmp_path / "whole/checkpoint/average.safetensors").is_file()


def test_steps_after_the_checkpoint_are_logged_once(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step, phase in enumerate(("examiner", "grpo", "skipped", "examiner"), 1):
        log.write({"phase": phase, "step": step})
    log.drop_after(2)
    assert [line["step"] for line in log.read()] == [1, 2]


# The command


class Untouchable(list):
    """Questions that may not even be counted."""

    def _refuse(self, *args):
        raise AssertionError("training questions were read")

    __iter__ = __getitem__ = __len__ = __bool__ = __contains__ = _refuse


def test_the_recipe_runs_end_to_end_and_no_training_question_is_read(tmp_path, monkeypatch):
    """Tiny and random, with the real engines, from a data set whose training questions may not be touched."""
    from stepcredit.data import atlas

    world = dataclasses.replace(atlas.build_atlas(0), train=Untouchable())
    monkeypatch.setattr(atlas, "build_atlas", lambda seed: world)
    words = ["pi_play", *SMALL, "warm_start.steps=2", "warm_start.batch=4", "steps=3", "checkpoint_every=2"]
    assert command.main([*words, f"output_dir={tmp_path}/run"]) == 0
    lines = lines_of(tmp_path / "run")
    phases = [line["phase"] for line in lines]
    assert phases[:5] == ["data", "warm_start", "warm_start", "evaluation", "examiner"]
    assert len(phases) == 8
    assert lines[0]["data_train"] == 0
    assert {name for line in lines for name in line if not documented(name)} == set()
    assert json.loads((tmp_path / "run/config.json").read_text())["credit"] == "pi_play"
    assert command.main(["--resume", f"{tmp_path}/run", "steps=4"]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4
    with pytest.raises(AssertionError, match="training questions were read"):  # the trap is one
        command.main(["tiny", f"output_dir={tmp_path}/other"])


def test_a_student_has_one_episode(capsys, tmp_path):
    words = ["pi_play", "model.name=tiny", "environment.episodes=2", f"output_dir={tmp_path}/run"]
    assert command.main(words) == 2
    assert "environment.episodes must be 1 with self_play.examiner_steps, got 2" in capsys.readouterr().err


def test_scenes_have_nothing_to_walk(capsys, tmp_path):
    words = ["clarify", "model.name=tiny", "self_play.examiner_steps=1", f"output_dir={tmp_path}/run"]
    assert command.main(words) == 2
    assert "self_play.examiner_steps must be 0 where there are no passages to walk, got 1" in capsys.readouterr().err


def test_the_configuration_round_trips_and_is_checked():
    config = pi_config("self_play.difficulty=hard")
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert [config.self_play.place(step) for step in range(4)] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert not TrainConfig().self_play.enabled
    recipe = get_recipe("pi_play")
    assert recipe.steps == 3 * (recipe.self_play.examiner_steps + recipe.self_play.student_steps)
    for override, message in (
        ("self_play.attempts=1", "self_play.attempts must be at least 2, got 1"),
        ("self_play.difficulty=easy", "self_play.difficulty must be one of medium, hard, got 'easy'"),
        ("self_play.format=inf", "self_play.format must be finite, got inf"),
        ("self_play.student_steps=0", "self_play.student_steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pi_config(override)
