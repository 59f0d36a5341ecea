"""The benchmark of credit methods on its small shape."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_methods


@pytest.mark.parametrize("wrong", ["environment", "advantages", "turns", None])
def test_a_method_that_is_wrong_has_no_speed(wrong, monkeypatch):
    step = bench_methods.step_of("small", torch.float32)

    class Wrong(bench_methods.SDSearch):
        __slots__ = ()

        def __call__(self, *args, **options):
            credit = bench_methods.SDSearch.__call__(self, *args, **options)
            credit.advantages[:1] += wrong == "environment"
            credit.advantages[-1:] *= 1.5 if wrong == "advantages" else 1.0
            return credit

    monkeypatch.setattr(bench_methods, "METHODS", {"search_r1": bench_methods.SearchR1(), "wrong": Wrong()})
    if wrong == "turns":
        monkeypatch.setattr(step.script, "written", ([0] * 7, [0] * 3))
    if wrong is None:
        bench_methods.check(step, "one_update", torch.float32)
    else:
        message = {"environment": "credits the environment", "advantages": "changes advantages", "turns": "turns have"}
        with pytest.raises(AssertionError, match=message[wrong]):
            bench_methods.check(step, "one_update", torch.float32)


def test_methods_share_an_update_only_if_it_is_the_same_work():
    step = bench_methods.step_of("small", torch.float32)
    works = {}
    for updates in bench_methods.UPDATES:
        for name, method in bench_methods.METHODS.items():
            works.setdefault(updates, {})[name] = step.work(name, step.credit(method, updates))
    plain = {name for name, work in works["one_update"].items() if work == works["one_update"]["search_r1"]}
    assert {"ig_search", "igpo", "gigpo", "tips", "mr_search"} <= plain
    assert "sd_search" not in plain
    folded = {name for name, work in works["two_updates"].items() if work == works["two_updates"]["ig_search"]}
    assert {"ig_search", "igpo", "tips"} <= folded  # their log-probs save the update a pass
    assert not folded & {"search_r1", "sd_search", "gigpo", "mr_search"}
    batch = step.batch
    assert len(batch) == 6
    assert batch.num_steps == 12
    assert {len(rollout.episodes) for rollout in batch.rollouts} == {3}
    assert bench_methods.Script.protocol.name == "search_r1"
