from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    bench_gather_logprobs,
    bench_information_gain,
    bench_masked_advantages,
    bench_topk_search,
    bench_tree_attention,
    measure,
    report,
)
from serving import MISSING, Echo, serving

ROOT = Path(__file__).resolve().parents[1]
OPS = ["dense_index", "gather_logprobs", "information_gain", "masked_advantages", "methods", "server", "topk_search"]


#: The quick report as from the command line, in the fewest rounds; then again with a kernel that is off by one.
DRIVER = """
from benchmarks import measure, report
from stepcredit import dispatch

measure.SECONDS = 0.0
right = report.main(["--quick"])
print("BROKEN")
kernel = dispatch.function("masked_advantages", "cpu")
dispatch.register("masked_advantages", "cpu", dispatch.always)(lambda *args, **options: kernel(*args, **options) + 1)
wrong = report.main(["--quick", "--op", "masked_advantages"])
print("EXIT", right, wrong)
"""


def stored():
    return {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").rglob("*.json")}


def dump(*benches):
    return {
        "machine_info": {"cpu": {"brand_raw": "Some(R) CPU @ 2.10GHz"}},
        "benchmarks": [{"params": p, "stats": {"min": s, "max": 9.0}, "extra_info": e} for p, s, e in benches],
    }


def result(*rows, **fields):
    return {"op": "op", "device": "cpu", "torch": "2.13", "threads": 2, "rows": list(rows), **fields}


def test_quick_report():
    """Every benchmark on its small shape. That torch compiles is for the measurement: it takes a minute."""
    before = stored()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST") and k not in report.MISLEADING}
    plain = {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=ROOT, env={**kept, **plain}, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("EXIT 0 1\n"), done.stdout + done.stderr
    right, wrong = done.stdout.split("BROKEN\n")
    for op in OPS:
        assert f"\n{op} on " in right
    rows = [line for line in right.splitlines() if line.startswith("  small ")]
    assert len(rows) >= 9
    assert all(re.search(r"\b[\d.]+x|[+-][\d.]+% of the step|[+-][\d.e]+ MB over search_r1", row) for row in rows)
    assert "failed, so without a row: masked_advantages" in wrong
    assert "  small " not in wrong
    assert stored() == before


def test_results_are_written_and_compared(tmp_path, monkeypatch, capsys):
    """One file an op; an op whose benchmark failed keeps its old one."""
    for op in ("right", "wrong"):
        (tmp_path / f"bench_{op}.py").touch()
    committed = report.text_of(result({"shape": "small", "commit": "old", "seconds": 3.0}))
    dumps = {"right": dump(({"shape": "small"}, 1.5, {})), "wrong": None}
    monkeypatch.setattr(report, "BENCHES", tmp_path)
    monkeypatch.setattr(report, "DEVICE", "cpu")
    monkeypatch.setattr(report, "measure", lambda op, **_: dumps[op])
    said = {"show": committed, "rev-parse": "abc\n", "status": ""}
    monkeypatch.setattr(report, "git", lambda command, *_: said[command])
    for name in report.MISLEADING:
        monkeypatch.delenv(name, raising=False)
    assert report.main([]) == 1
    (path,) = (tmp_path / "results").rglob("*.json")
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    folder = report.slug(f"Some(R) CPU(TM) @ 2.10GHz, {instructions}")
    assert path.relative_to(tmp_path / "results") == Path(folder, "right.json")
    written = json.loads(path.read_text())
    assert written["rows"] == [{"shape": "small", "commit": "abc", "seconds": 1.5}]
    out = capsys.readouterr().out
    assert "before 3 s at old, 2.00x" in out
    assert out.endswith("failed, so without a row: wrong\n")


def test_measuring_some_cases_keeps_the_other_rows():
    stored = result({"shape": "a", "commit": "old", "seconds": 1.0}, {"shape": "b", "commit": "old", "seconds": 2.0})
    new = result({"shape": "c", "commit": "new", "seconds": 3.0}, {"shape": "b", "commit": "new", "seconds": 4.0})
    assert [(r["shape"], r["commit"], r["seconds"]) for r in report.merged(new, stored)] == [
        ("a", "old", 1.0),
        ("b", "new", 4.0),
        ("c", "new", 3.0),
    ]
    assert report.merged(new, {**stored, "threads": 1}) == new["rows"]


def test_out_of_time_the_rows_that_were_measured_are_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench_slow.py").write_text(SLOW)
    monkeypatch.setattr(report, "BENCHES", tmp_path)
    monkeypatch.setattr(report, "DEVICE", "cpu")
    for name in report.MISLEADING:
        monkeypatch.delenv(name, raising=False)
    arguments = ["--op", "slow", "--seconds"]
    assert report.main([*arguments, "60"]) == 0
    (path,) = (tmp_path / "results").rglob("*.json")
    before = json.loads(path.read_text())
    assert [row["n"] for row in before["rows"]] == ["1", "2"]
    for row in before["rows"]:
        row["seconds"] = 9.0
    path.write_text(report.text_of(before))
    assert report.main([*arguments, "0.5"]) == 0
    first, second = json.loads(path.read_text())["rows"]
    assert first["seconds"] < 9
    assert second == before["rows"][1]
    assert "slow: 0.5 s are over, so without a row of now: test_slow[2]" in capsys.readouterr().out
    assert report.main([*arguments, "0"]) == 1  # nothing was measured, so nothing is written
    assert json.loads(path.read_text())["rows"] == [first, second]


SLOW = """
import time, pytest

@pytest.mark.parametrize("n", [1, 2])
def test_slow(benchmark, n):
    benchmark.pedantic(time.sleep, (0.6,), rounds=1)
"""


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_answers_or_is_none(tmp_path, monkeypatch):
    assert report.git("version").startswith("git version")
    assert report.git("no-such-command") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.git("version") is None


def test_rows_of():
    params = {"shape": "small", "dtype": "UNSERIALIZABLE[torch.bfloat16]", "window": 4}
    rows = report.rows_of(
        dump((params, 0.00123456, {"flops": 123456789, "eager_over_ours": 1.23456}), (None, 2.0, {})), "abc"
    )
    assert rows == [
        {
            "shape": "small",
            "dtype": "bfloat16",
            "window": "4",
            "commit": "abc",
            "seconds": 0.001235,
            "flops": 123456789,
            "eager_over_ours": 1.235,
        },
        {"commit": "abc", "seconds": 2.0},
    ]
    assert report.case_of(rows[0]) == "small bfloat16 4"


def test_lines_compare_with_what_is_committed():
    row = {
        "shape": "small",
        "dtype": "float32",
        "commit": "abc",
        "seconds": 0.002,
        "eager_seconds": 0.001,
        "eager_over_ours": 0.5,
    }
    new = result(row, {**row, "shape": "large", "peak_bytes": 2_000_000}, threads=1)
    old = result({**row, "commit": "old", "seconds": 0.003})
    heading, small, large = report.lines(new, old)
    assert "1 threads; before: torch 2.13, 2 threads" in heading
    assert small.split() == [
        "small",
        "float32",
        "2",
        "ms",
        "eager",
        "0.50x",
        "before",
        "3",
        "ms",
        "at",
        "old,",
        "1.50x",
    ]
    assert large.split() == ["large", "float32", "2", "ms", "eager", "0.50x", "peak", "2", "MB"]
    assert "before" not in "".join(report.lines(new, None))


def test_what_clients_of_a_server_saw_is_in_its_line():
    row = {"shape": "small", "seconds": 2.0, "plain_over_ours": 3.0, "retries": 7}
    for prefix, factor in (("", 1), ("plain_", 10)):
        seen = {"p50_seconds": 0.002 * factor, "p99_seconds": 0.3 * factor, "queries_per_second": 900 / factor}
        row |= {prefix + name: value for name, value in seen.items()}
    line = report.line(row, None)
    assert "plain 3.00x  900 queries/s p50 2 ms p99 300 ms  plain 90 queries/s p50 20 ms p99 3 s" in line


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0125, "12.5 ms"), (3e-6, "3 us"), (4e-8, "0.04 us")])
def test_durations(seconds, text):
    assert report.line({"seconds": seconds}, None).split() == text.split()


def test_text_has_a_row_a_line():
    value = result({"shape": "small", "seconds": 1.0}, {"shape": "large", "seconds": 2.0})
    text = report.text_of(value)
    assert json.loads(text) == value
    assert '\n{"shape": "large", "seconds": 2.0}\n' in text


@pytest.mark.parametrize(
    ("device", "slug"), [("Some(R) CPU(TM) @ 2.10GHz", "some-cpu-2-10ghz"), ("NVIDIA H200", "nvidia-h200")]
)
def test_slug(device, slug):
    assert report.slug(device) == slug


@pytest.mark.parametrize("name", report.MISLEADING)
def test_misleading_results_are_not_kept(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    assert f"{name}=1" in capsys.readouterr().err


class Benchmark:
    """As much of the fixture as benchmarks use, without a table at the end of the tests."""

    def __init__(self):
        self.extra_info = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(min=2.0))
        self.measured = False

    def pedantic(self, function, *, setup, rounds):
        self.measured = True
        for _ in range(rounds):
            setup()
            function()


def wrong_gather(*args):
    return bench_gather_logprobs.eager(*args) + 0.01


def wrong_last_token(*batch, **_):
    out = bench_masked_advantages.eager(*batch)
    out[-1] += 0.01
    return out


def wrong_last_step(*layout, **options):
    out = bench_information_gain.reference.information_gain(*layout, **options)
    out.gain[-1] += 0.01
    return out


def wrong_order(*args):
    scores, ids = bench_topk_search.eager(*args)
    return scores, ids.roll(1, dims=1)


def wrong_duplicates(*args):
    scores, ids = bench_topk_search.eager(*args)
    return scores[:, :1].expand_as(scores), ids[:, :1].expand_as(ids)


def wrong_query(q, k, v, tree, **_):
    out = bench_tree_attention.reference.tree_attention(
        q, k, v, tree.cu_segments, tree.cu_ranges, tree.ranges, tree.positions, scale=0.25, softcap=None, window=None
    )
    out[-1] += 0.01
    return out


@pytest.mark.parametrize(
    ("bench", "op", "wrong", "options"),
    [
        (bench_gather_logprobs, "gather_logprobs", wrong_gather, {"passes": "forward"}),
        (bench_masked_advantages, "masked_advantages", wrong_last_token, {}),
        (bench_information_gain, "information_gain", wrong_last_step, {}),
        (bench_topk_search, "topk_search", wrong_order, {}),
        (bench_topk_search, "topk_search", wrong_duplicates, {}),
        (bench_tree_attention, "tree_attention", wrong_query, {}),
    ],
)
def test_a_wrong_kernel_has_no_speed(bench, op, wrong, options, monkeypatch):
    monkeypatch.setattr(bench, op, wrong)
    benchmark = Benchmark()
    with pytest.raises(AssertionError):
        getattr(bench, f"test_{op}")(benchmark, "small", torch.float32, **options)
    assert not benchmark.measured


def test_what_a_method_adds_to_a_step_is_in_its_line():
    row = {"shape": "small", "method": "sd_search", "seconds": 2.0, "credit_tokens": 30, "update_tokens": 40}
    row |= {"step_overhead": 0.1234, "credit_and_update_overhead": -0.001}
    said = "2 s  30 + 40 tokens, +12.3% of the step{}, -0.1% without rollout"
    assert report.line(row, None).endswith(said.format(""))
    assert report.line({**row, "paper_step_overhead": 0.155}, None).endswith(said.format(" (paper +15.5%)"))


def test_a_server_that_is_wrong_or_loses_has_no_speed():
    pytest.importorskip("fastapi", reason=MISSING)
    from benchmarks.bench_server import TURNS, Load

    size, right = {"clients": 3, "groups": 2, "k": 2}, {"a": ["a0", "a1"]}
    with serving(Echo()) as running:
        load = Load(size, right, {"retries": 0})
        load.run(running.url)
        assert len(load.waits) == 3 * 2 * TURNS
        info = {}
        load.report(info, "plain_")
        assert info["plain_queries_per_second"] == load.queries / load.seconds
        assert 0 < info["plain_p50_seconds"] <= info["plain_p99_seconds"] <= max(load.waits)
        with pytest.raises(AssertionError, match="wrong passages"):
            Load(size, {"a": ["a1", "a0"]}, {"retries": 0}).run(running.url)
    with pytest.warns(UserWarning, match="retrieval of"), pytest.raises(AssertionError, match="a rollout is lost"):
        Load(size, right, {"retries": 0}).run(running.url)


def test_baselines_run_between_rounds(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "seconds", lambda run: run() or 3.0)
    benchmark, calls = Benchmark(), []
    baselines = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    measure.interleave(benchmark, lambda: calls.append("ours"), baselines)
    assert calls[-9:] == ["a", "b", "ours"] * 3
    assert benchmark.extra_info == {"a_seconds": 3.0, "a_over_ours": 1.5, "b_seconds": 3.0, "b_over_ours": 1.5}


def test_peak_bytes_is_the_most_alive_at_once():
    def function():
        kept = torch.ones(1024)
        for _ in range(3):
            kept = kept + torch.ones(1024)

    measured = measure.peak_bytes(function)
    assert 3 * 4096 <= measured < 4 * 4096
    assert measure.size_bytes(torch.ones(3), torch.ones(2, dtype=torch.bool)) == 14
