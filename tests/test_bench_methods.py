"""The benchmark of credit methods on its small shape."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_methods


@pytest.mark.parametrize("wrong", ["environment", "advantages", "rollouts", "turns", None])
def test_a_method_that_is_wrong_has_no_speed(wrong, monkeypatch):
    step = bench_methods.step_of("small", torch.float32)

    class Wrong(bench_methods.SDSearch):
        __slots__ = ()

        def __call__(self, *args, **options):
            credit = bench_methods.SDSearch.__call__(self, *args, **options)
            credit.advantages[:1] += wrong == "environment"
            credit.advantages[-1:] *= 1.5 if wrong == "advantages" else 1.0
            credit.metrics["sd/too_long"] += wrong == "rollouts"
            return credit

    monkeypatch.setattr(bench_methods, "METHODS", {"search_r1": bench_methods.SearchR1(), "wrong": Wrong()})
    if wrong == "turns":
        monkeypatch.setattr(step.script, "written", ([0] * 7, [0] * 3))
    if wrong is None:
        bench_methods.check(step, "one_update", torch.float32)
    else:
        message = {
            "environment": "credits the environment",
            "advantages": "changes advantages",
            "rollouts": "leaves out rollouts: .*too_long",
            "turns": "turns have",
        }
        with pytest.raises(AssertionError, match=message[wrong]):
            bench_methods.check(step, "one_update", torch.float32)


def test_methods_share_an_update_only_if_it_is_the_same_work():
    step = bench_methods.step_of("small", torch.float32)
    works = {}
    for updates in bench_methods.UPDATES:
        for name, method in bench_methods.METHODS.items():
            works.setdefault(updates, {})[name] = step.work(name, step.credit(method, updates))
    plain = {name for name, work in works["one_update"].items() if work == works["one_update"]["search_r1"]}
    assert {"ig_search", "igpo", "gigpo", "tips", "mr_search", "clarify"} <= plain
    assert not plain & {"sd_search", "pi_play"}
    assert works["one_update"]["sd_search"] != works["one_update"]["pi_play"]
    folded = {name for name, work in works["two_updates"].items() if work == works["two_updates"]["ig_search"]}
    assert {"ig_search", "igpo", "tips"} <= folded  # their log-probs save the update a pass
    assert not folded & {"search_r1", "sd_search", "gigpo", "mr_search", "pi_play", "clarify"}
    batch = step.batch
    assert len(batch) == 6
    assert batch.num_steps == 12
    assert {len(rollout.episodes) for rollout in batch.rollouts} == {3}
    assert bench_methods.Script.protocol.name == "search_r1"


def test_dialogues_are_the_batch_but_for_what_its_spans_are():
    step = bench_methods.step_of("small", torch.float32)
    for name in ("tokens", "cu_seqlens", "policy_mask", "groups", "rewards", "sampling_logprobs"):
        assert torch.equal(getattr(step.dialogues, name), getattr(step.batch, name)), name
    plain = bench_methods.METHODS["search_r1"]
    assert torch.equal(plain(step.dialogues, step.scorer).advantages, step.credit(plain, "one_update").advantages)
    credit = step.credit(bench_methods.METHODS["clarify"], "one_update")
    assert credit.metrics["clarify/share"] == 0.5
    assert credit.metrics["clarify/turn_value"] == pytest.approx(0.5 - 0.1)  # each question tells one of two bits
    assert credit.metrics["tokens_forwarded"] > 0


def test_the_student_of_pi_play_is_taught_all_it_wrote_by_an_average_that_moves(monkeypatch):
    step = bench_methods.step_of("small", torch.float32)
    moves = []
    monkeypatch.setattr(step.average, "update", lambda: moves.append("update"))
    monkeypatch.setattr(step.average, "distance", lambda: moves.append("distance"))
    before = step.average.scorer.tokens_forwarded
    credits = {name: step.credit(bench_methods.METHODS[name], "one_update") for name in ("search_r1", "pi_play")}
    metrics = credits["pi_play"].metrics
    assert metrics["pi_play/tokens_distilled"] == int(step.batch.policy_mask.sum())
    assert metrics["tokens_forwarded"] == step.average.scorer.tokens_forwarded - before > 0
    found = {name: step.update(name, credit, "one_update") for name, credit in credits.items()}
    assert moves == ["update", "distance"]  # of pi_play alone
    assert found["pi_play"]["pi_play/loss"] > 0
    assert found["pi_play"]["tokens_forwarded"] == found["search_r1"]["tokens_forwarded"]
