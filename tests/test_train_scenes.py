"""The recipe `clarify` in the trainer, with the tiny policy."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from stepcredit.data.demonstrations import DemonstrationMix, demonstrations
from stepcredit.environments import ClarifyEnvironment
from stepcredit.rollout import SpanKind
from stepcredit.train.checkpoint import State
from stepcredit.train.engine import HFEngine
from stepcredit.train.loop import train, train_step, warm_start
from stepcredit.train.metrics import MetricsLog, documented
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.overrides import apply_overrides
from stepcredit.train.progress import Reporter
from stepcredit.train.recipes import get_recipe
from stepcredit.train.setup import Parts, build
from stepcredit.train.summary import summary_line
from stepcredit.train.warm_start import play

WORDS = ["model.name=tiny", "model.dtype=float32", "model.device=cpu", "sampling.max_turn_tokens=24", "group_size=4",
         "questions_per_step=2", "steps=2", "optimizer.learning_rate=1e-3", "warm_start.learning_rate=1e-2",
         "warm_start.batch=8", "warm_start.steps=6", "evaluation.questions=3", "evaluation.samples=1"]  # fmt: skip


def scenes_config(*words: str):
    return apply_overrides(get_recipe("clarify"), [*WORDS, *words])


@functools.cache
def built() -> Parts:
    return build(scenes_config(), Reporter())


def parts_of(parts: Parts) -> Parts:
    """Fresh parts of the same weights."""
    model, scorer = copy.deepcopy(parts.model), copy.copy(parts.scorer)
    scorer.model = model
    engine = HFEngine(model, parts.tokenizer, parts.environment.protocol)
    return replace(parts, model=model, scorer=scorer, engine=engine, optimizer=MasterAdamW(model))


def test_the_recipe_trains(tmp_path):
    parts = parts_of(built())
    assert isinstance(parts.environment, ClarifyEnvironment)
    assert parts.retriever is None
    assert len(parts.tokenizer.encode("<ask>")) <= 3  # a tag of its own
    summary = train(scenes_config("credit.teacher=reference"), parts, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line if not documented(name)} == set()
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    started = [line for line in lines if line["phase"] == "warm_start"]
    assert all(line["reward_iou"] == line["clarify/iou"] == 1.0 for line in started)  # demonstrations know the target
    assert 0 < sum(line["clarify/questions"] for line in started) / len(started) < 1.5  # some ask, some guess
    assert 0 < sum(line.get("clarify/idle", 0) for line in started) / len(started) < 1
    steps = [line for line in lines if line["phase"] == "grpo"]
    assert [line["clarify/share"] for line in steps] == [0.5, 0.25]
    assert all(line["reward"] == line["reward_iou"] for line in steps)
    assert {"iou_before", "iou_after"} <= set(summary)
    assert summary_line(summary).startswith("held-out EM ")
    assert f"IoU {summary['iou_before']:.2f} -> ".replace("0.", ".") in summary_line(summary)
    assert {line["when"] for line in lines if "greedy_clarify/iou" in line} == {"before", "after"}


def test_demonstrations_are_played_by_the_real_user():
    """Through the environment that trains: the questions are the policy's tokens, the replies are not."""
    parts = built()
    mix = DemonstrationMix(good=0.5, question=0, one_hop=0, repeat=0, guess=0.25, idle=0.25)
    scripts = demonstrations(parts.dataset.train[:40], mix)
    rollouts = play(scripts, parts.environment, parts.tokenizer)
    for script, rollout in zip(scripts, rollouts, strict=True):
        bits = [search.bits for search in rollout.searches]
        assert rollout.finish == "answered"
        assert rollout.rewards["iou"] == 1.0
        assert len(bits) == {"guess": 0, "idle": 1}.get(script.quality, len(script.question.plan))
        assert all(b > 0 for b in bits) == (script.quality != "idle")
        assert len([s for s in rollout.spans if s.kind is SpanKind.REPLY]) == len(bits)
        if script.quality == "good":
            assert rollout.searches[-1].remaining == (parts.environment.referrals[script.question.id].target,)


def test_the_turn_level_teaches_what_to_ask(tmp_path):
    """Where only colours tell the candidates apart, a policy that is credited for its questions alone comes to ask for
    them: fewer questions tell nothing, and what they are worth rises."""
    mix = [
        f"warm_start.mix.{name}={share}" for name, share in (("good", 0.4), ("one_hop", 0), ("guess", 0), ("idle", 0.6))
    ]
    config = scenes_config(*mix, "warm_start.steps=60", "questions_per_step=4", "group_size=8", "steps=12",
                           "environment.max_searches=1", "optimizer.learning_rate=3e-3", "credit.trajectory=0",
                           "credit.share_start=0")  # fmt: skip
    parts = parts_of(built())
    warm_start(config, parts, State(), MetricsLog(tmp_path / "metrics.jsonl"))
    colours = [q for q in parts.dataset.train if q.plan == ("What colour is it?",)]
    parts = replace(parts, dataset=replace(parts.dataset, train=colours))
    steps = [train_step(config, parts, State(), step, None) for step in range(config.steps)]
    idle, value = ([line[f"clarify/{name}"] for line in steps] for name in ("idle", "turn_value"))
    assert fmean(idle[-3:]) < fmean(idle[:3]) - 0.2
    assert fmean(value[-3:]) > fmean(value[:3]) + 0.2


def test_the_commands_of_the_documentation_are_right():
    section = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8").split("\n## `clarify`")[1]
    section = section.split("\n## ")[0]
    commands = re.findall(r"^python -m stepcredit\.train clarify(.*?)$", section.replace("\\\n", " "), re.MULTILINE)
    configs = [apply_overrides(get_recipe("clarify"), command.partition(" #")[0].split()) for command in commands]
    assert configs[0] == get_recipe("clarify")
    assert [(c.credit.trajectory, c.credit.turn, c.credit.share_start) for c in configs[1:3]] == [(1, 0, 0), (0, 1, 0)]
    assert configs[3].credit.teacher == "reference"
