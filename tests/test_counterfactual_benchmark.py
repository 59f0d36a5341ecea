from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_counterfactual, measure
from scripted_rollouts import random_policy
from stepcredit.counterfactual import score_steps
from stepcredit.scorer import PolicyScorer
from stepcredit.train.policy import tiny_policy

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("wrong", [0.0, 0.01])
def test_wrong_scores_have_no_speed(wrong, monkeypatch):
    """The counterfactual benchmark on a tiny policy; with scores that are off it ends before it measures a ratio."""
    tokenizer = tiny_policy([" ".join(bench_counterfactual.WORDS), "<think></think><search></search>"], 0)[1]
    policy = PolicyScorer(random_policy("llama", tokenizer), tokenizer, bench_counterfactual.PROTOCOL)

    def scored(*args, **options):
        gains = score_steps(*args, **options)
        gains.real[:1] += wrong if options["temperature"] else 0.0
        return gains

    monkeypatch.setattr(bench_counterfactual, "batch", bench_counterfactual.batch.__wrapped__)
    monkeypatch.setattr(bench_counterfactual, "policy", lambda *_, **__: policy)
    monkeypatch.setattr(bench_counterfactual, "score_steps", scored)
    runs = bench_counterfactual.ways("small", torch.float32)
    if wrong:
        with pytest.raises(AssertionError, match="both differs from separate"):
            bench_counterfactual.one_round(runs, 1e-4)
    else:
        found = bench_counterfactual.one_round(runs, 1e-4, count_bytes=True)
        assert found["ours"].tokens > found["old_logprobs"].tokens
        assert found["separate"].tokens >= found["trimmed"].tokens > found["cached"].tokens
        assert found["separate"].peak_bytes > found["trimmed"].peak_bytes  # logits of every position
        assert bench_counterfactual.one_round(runs, 1e-4)["ours"].peak_bytes is None


def test_folding_costs_what_it_adds_to_the_best_rounds():
    """Three rounds; in the second the pass without scores was disturbed, so that folding looks free."""
    times = {
        "ours": (5.0, 9.0, 6.0),
        "old_logprobs": (2.0, 8.0, 3.0),
        "both": (7.0, 8.0, 6.0),
        "separate": (40.0, 36.0, 48.0),
        "trimmed": (20.0, 20.0, 20.0),
        "cached": (8.0, 12.0, 10.0),
    }
    scores = torch.zeros(2, 3)
    found = [
        {name: bench_counterfactual.Way(scores, len(name), seconds[i], 100 + i) for name, seconds in times.items()}
        for i in range(3)
    ]
    found[1]["cached"] = replace(found[1]["cached"], scores=scores + 0.5)
    row = bench_counterfactual.figures(found, "folded")
    assert (row["seconds"], row["tokens"], row["peak_bytes"], row["rounds"]) == (4.0, 4 - 12, 100, 3)
    assert (row["separate_seconds"], row["separate_over_ours"]) == (36.0, 9.0)
    assert row["separate_median_over_ours"] == pytest.approx(16.0)  # of 8, infinity and 16
    assert row["difference"] == 0.5
    row = bench_counterfactual.figures(found, "unfolded")
    assert (row["seconds"], row["tokens"]) == (5.0, 4)
    assert row["cached_over_ours"] == 1.6
    assert row["cached_median_over_ours"] == pytest.approx(1.6)  # of 1.6, 1.33 and 1.67


def test_rounds_of_a_long_case_are_bounded_by_time(monkeypatch):
    monkeypatch.setattr(measure, "CASE_SECONDS", 240.0)
    assert [measure.another_round(1, seconds) for seconds in (1.0, 410.0, 430.0)] == [True, True, False]
    assert [measure.another_round(2, seconds) for seconds in (100.0, 160.0, 161.0, 580.0)] == [True, True, False, False]
    assert [measure.another_round(n, 2.0) for n in (9, 10)] == [True, False]


#: Page faults of the second of two calls that allocate 64 MB, outside `memory_kept`, inside and after it.
FAULTS = """
import resource
from benchmarks.allocator import memory_kept

def faults():
    bytearray(1 << 26)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with memory_kept():
    inside = faults()
print(outside, inside, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_kept_costs_no_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    outside, inside, after = map(int, done.stdout.split())
    assert inside < 100
    assert min(outside, after) > 1000
