"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu`.

It builds the package where it is missing or lacks its CUDA kernels, then runs the parts: `tests` (the kernels against
their references, on the device), `memcheck` and `racecheck` (compute-sanitizer over one small case of each kernel), and
every benchmark, whose rows go to `results/<device>/`. A part that fails or runs out of its time does not stop the
others; `--only PART ...` runs some of them again. One table ends it.

Needs torch, triton, pytest and pytest-benchmark, and nvcc to build. Outside a git checkout STEPCREDIT_COMMIT says which
commit the rows are of.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Of each benchmark, seconds.
LIMITS = {
    "masked_advantages": 20,
    "information_gain": 20,
    "gather_logprobs": 100,
    "tree_attention": 30,
    "topk_search": 50,
    "counterfactual": 60,
}
#: CUDA's tools are often not on the path.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_on_device.py")


@dataclass(frozen=True, slots=True)
class Part:
    """A command and how long it may take, seconds; `unhidden`: torch allocates each tensor on its own, so that reading
    past one is seen."""

    command: tuple[str, ...]
    limit: int
    unhidden: bool = False


def parts() -> dict[str, Part]:
    """Their limits, which leave room for none of them to hang, add up to less than nine minutes."""

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
        return Part((sys.executable, "-m", "benchmarks.report", "--op", op), limit)

    return {
        "tests": Part(PYTEST, 130),
        "memcheck": sanitizer("memcheck"),
        "racecheck": sanitizer("racecheck"),
        **{op: benchmark(op, limit) for op, limit in LIMITS.items()},
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


def build() -> str:
    """ "ok" when an importable package has its CUDA kernels, or this checkout was installed; else what went wrong, and
    Triton's kernels are left to be measured."""
    probe = "from stepcredit import _C; raise SystemExit(not _C.has_cuda)"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."]
        install += ["--config-settings=cmake.define.STEPCREDIT_CUDA=ON"]
        return run(Part(tuple(install), 180))
    return "ok"


def run(part: Part) -> str:
    """ "ok", or what went wrong."""
    if (tool := shutil.which(part.command[0], path=PATH)) is None:
        return f"{part.command[0]} is not installed"
    command = (tool, *part.command[1:])
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if part.unhidden else None
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(part.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started: nothing of it may share the GPU with the next
        process.wait()
        return f"stopped after {part.limit} s"
    return "ok" if status == 0 else f"failed, exit status {status}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 when a part failed, 2 when nothing can run here."""
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=known, metavar="PART", help=f"some of {', '.join(known)}")
    chosen = parser.parse_args(arguments).only or list(known)
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    rows = []
    start = time.perf_counter()
    rows.append(("build", build(), time.perf_counter() - start))
    for name in chosen:
        print(f"--- {name}", flush=True)
        start = time.perf_counter()
        rows.append((name, run(known[name]), time.perf_counter() - start))
        print(f"--- {name}: {rows[-1][1]}", flush=True)
    print("\n".join(f"{name:<20}{seconds:>7.1f} s  {result}" for name, result, seconds in rows))
    return int(any(result != "ok" for _, result, _ in rows))


if __name__ == "__main__":
    raise SystemExit(main())
