"""`python -m benchmarks.gpu` where there is no GPU: what it would run, and what it says."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import gpu


def test_the_parts_are_all_there_and_fit_into_nine_minutes() -> None:
    parts = gpu.parts()
    benchmarks = {path.stem.removeprefix("bench_") for path in (gpu.ROOT / "benchmarks").glob("bench_*.py")}
    of_a_cpu = {"dense_index", "server"}
    assert set(parts) == {"tests", "memcheck", "racecheck"} | (benchmarks - of_a_cpu)
    assert sum(part.limit for part in parts.values()) < 9 * 60
    assert (gpu.ROOT / "tests/test_on_device.py").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "build", lambda: pytest.fail("built"))
    assert gpu.main([]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def python(code: str, limit: int = 60, **options: bool) -> gpu.Part:
        return gpu.Part((sys.executable, "-c", code), limit, **options)

    caching = "import os; raise SystemExit(os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING') != '1')"
    parts = {
        "fails": python("raise SystemExit(7)"),
        "hangs": python("import time; time.sleep(60)", 1),
        "missing": gpu.Part(("no-such-sanitizer",), 60),
        "works": python(caching, unhidden=True),
    }
    monkeypatch.setattr(gpu, "parts", lambda: parts)
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "build", lambda: "ok")
    assert gpu.main([]) == 1
    table = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines() if not line.startswith("---")]
    assert {row[0]: row[3] for row in table} == {
        "build": "ok",
        "fails": "failed, exit status 7",
        "hangs": "stopped after 1 s",
        "missing": "no-such-sanitizer is not installed",
        "works": "ok",
    }
    assert gpu.main(["--only", "works"]) == 0
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])
