"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu`.

It builds the package where it is missing or lacks its CUDA kernels, then runs the parts: `tests` (the kernels against
their references, on the device), every benchmark, whose rows go to `results/<device>/`, and `memcheck` and `racecheck`
(compute-sanitizer over one small case of each kernel). All of it ends within nine minutes. A part that fails or runs
out of its time does not stop the others, and a benchmark keeps the rows that it has by then; `--only PART ...` runs
some of them again and adds to the rows. One table ends it.

Needs torch, triton, pytest, pytest-benchmark and hypothesis, and nvcc to build; with pytest-xdist the tests compile
their kernels on several cores. Outside a git checkout STEPCREDIT_COMMIT says which commit the rows are of.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Of everything, seconds.
BUDGET = 530
#: Of each benchmark, seconds; not yet run on a GPU.
LIMITS = {
    "gather_logprobs": 120,
    "topk_search": 70,
    "tree_attention": 60,
    "masked_advantages": 40,
    "information_gain": 40,
    "counterfactual": 70,
    "methods": 60,
}
#: Part of its time after which a benchmark starts no other case.
STARTING = 0.7
#: Cases of a benchmark that has too many, by `pytest -k`.
SOME = {"counterfactual": "3-searches", "methods": "smollm2 and one_update"}
#: CUDA's tools are often not on the path.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_on_device.py")


@dataclass(frozen=True, slots=True)
class Part:
    """A command and how long it may take, seconds; `unhidden`: torch allocates each tensor on its own, so that reading
    past one is seen; `told`: the command is told for how long it may start cases."""

    command: tuple[str, ...]
    limit: float
    unhidden: bool = False
    told: bool = False


def parts() -> dict[str, Part]:
    """In the order in which they run."""

    def sanitizer(tool: str) -> Part:
        check = (
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "3",
            "--report-api-errors",
            "no",
            "--target-processes",
            "all",
        )
        return Part((*check, *PYTEST, "-k", "once"), 60, unhidden=True)

    def benchmark(op: str, limit: int) -> Part:
        some = ("--only", SOME[op]) if op in SOME else ()
        return Part((sys.executable, "-m", "benchmarks.report", "--op", op, *some), limit, told=True)

    spread = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") is not None else ()
    return {
        "tests": Part((*PYTEST, *spread), 140),
        **{op: benchmark(op, limit) for op, limit in LIMITS.items()},
        "memcheck": sanitizer("memcheck"),
        "racecheck": sanitizer("racecheck"),
    }


def why_not() -> str | None:
    """Why nothing of this can run here."""
    probe = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if done.stdout.strip() != "True":
        return "torch finds no CUDA device (is there an NVIDIA GPU, and is this a CUDA build of torch?)"
    for module in ("triton", "pytest", "pytest_benchmark", "hypothesis"):
        if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode:
            return f"{module} cannot be imported (pip install -e '.[test,triton]')"
    return None


def build(limit: float) -> str:
    """ "ok" when an importable package has its CUDA kernels, or this checkout was installed; else what went wrong, and
    Triton's kernels are left to be measured."""
    probe = "from stepcredit import _C; raise SystemExit(not _C.has_cuda)"
    if not subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        return "ok"
    probe = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."]
    install += ["--config-settings=cmake.define.STEPCREDIT_CUDA=ON"]
    install += [f"--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES={found}"]
    return run(Part(tuple(install), limit))


def run(part: Part) -> str:
    """ "ok", or what went wrong."""
    if (tool := shutil.which(part.command[0], path=PATH)) is None:
        return f"{part.command[0]} is not installed"
    told = ("--seconds", f"{STARTING * part.limit:.0f}") if part.told else ()
    # Tests interpret Triton's kernels where they find no GPU; here that would hide that there is none.
    environment = {**os.environ, "PATH": PATH, "TRITON_INTERPRET": "0"}
    if part.unhidden:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    process = subprocess.Popen((tool, *part.command[1:], *told), cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(part.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started: nothing of it may share the GPU with the next
        process.wait()
        return f"stopped after {part.limit:.0f} s"
    return "ok" if status == 0 else f"failed, exit status {status}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 when a part failed, 2 when nothing can run here."""
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=known, metavar="PART", help=f"some of {', '.join(known)}")
    chosen = parser.parse_args(arguments).only or list(known)
    start = time.perf_counter()
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    rows = [("build", build(BUDGET), time.perf_counter() - start)]
    for name in chosen:
        before = time.perf_counter()
        left = BUDGET - (before - start)
        print(f"--- {name}", flush=True)
        result = run(replace(known[name], limit=min(known[name].limit, left))) if left > 0 else "not run: out of time"
        rows.append((name, result, time.perf_counter() - before))
        print(f"--- {name}: {result}", flush=True)
    print("\n".join(f"{name:<20}{seconds:>7.1f} s  {result}" for name, result, seconds in rows))
    return int(any(result != "ok" for _, result, _ in rows))


if __name__ == "__main__":
    raise SystemExit(main())
