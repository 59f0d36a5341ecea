"""Measures ops against their baselines on this machine: `python -m benchmarks.report [--op OP] [--quick]`.

Each `bench_<op>.py` runs through pytest-benchmark; what it measured replaces `results/<device>/<op>.json` and is
compared with what is committed there; with `--only` or `--seconds` the rows of other cases stay. A ratio is a
baseline's time over ours: above 1 ours is faster. An op whose benchmark fails, above all because a result is wrong, has
no rows: its file stays as it was and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import DEVICE

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ROOT / "benchmarks"
#: They change what runs under the name of an implementation or of a baseline, so rows measured under them are not kept.
MISLEADING = ("STEPCREDIT_IMPL", "TORCH_COMPILE_DISABLE")

#: What says which case a row is, such as shape and dtype, is text; what was measured is a number.
Row = dict[str, Any]


def rows_of(dump: dict[str, Any], commit: str) -> list[Row]:
    """The rows of pytest-benchmark's dump: parameters, best seconds and `extra_info`, floats to four digits."""
    rows = []
    for bench in dump["benchmarks"]:
        case = {name: _plain(value) for name, value in (bench["params"] or {}).items()}
        measured = {"seconds": bench["stats"]["min"], **bench["extra_info"]}
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in measured.items()}
        rows.append({**case, "commit": commit, **rounded})
    return rows


def _plain(value: object) -> str:
    """A parameter as text; pytest-benchmark wraps what JSON cannot hold, such as a dtype."""
    return re.sub(r"^UNSERIALIZABLE\[(?:torch\.)?(.*)\]$", r"\1", str(value))


def case_of(row: Row) -> str:
    return " ".join(value for name, value in row.items() if isinstance(value, str) and name != "commit")


def merged(result: dict[str, Any], stored: dict[str, Any]) -> list[Row]:
    """The stored rows, those that were measured again replaced where they stood, and new cases after them. Without the
    stored ones when these were measured under another torch or number of threads."""
    new = {case_of(row): row for row in result["rows"]}
    same = all(result[name] == stored[name] for name in ("torch", "threads"))
    return [new.pop(case_of(row), row) for row in stored["rows"] if same] + list(new.values())


def line(row: Row, old: Row | None) -> str:
    """A row with its ratios and, where the case was measured before, old seconds over new ones."""
    ratios = [f"{name.removesuffix('_over_ours')} {row[name]:.2f}x" for name in row if name.endswith("_over_ours")]
    parts = [f"{case_of(row):<44}{_duration(row['seconds']):>9}", *ratios]
    if "difference" in row:
        parts.append(f"{row['tokens']} tokens, differing by {row['difference']:.1g}")
    if "step_overhead" in row:
        parts.append(_overheads(row))
    parts += [_served(row, prefix) for prefix in ("", "plain_") if f"{prefix}queries_per_second" in row]
    if "logits_bytes" in row:
        above, logits = row["peak_above_search_r1_bytes"], row["logits_bytes"]
        parts.append(f"{above / 1e6:+.3g} MB over search_r1, logits of its queries {logits / 1e6:.3g} MB")
    if "peak_bytes" in row:
        parts.append(f"peak {row['peak_bytes'] / 1e6:.3g} MB")
    if old is not None and "seconds" in old:  # a row of memory alone may have none
        parts.append(f"before {_duration(old['seconds'])} at {old['commit']}, {old['seconds'] / row['seconds']:.2f}x")
    return "  ".join(parts)


def _overheads(row: Row) -> str:
    """What a credit method adds to a training step."""
    step, rest = f"{row['step_overhead']:+.1%}", f"{row['credit_and_update_overhead']:+.1%}"
    paper = f" (paper {row['paper_step_overhead']:+.1%})" if "paper_step_overhead" in row else ""
    return f"{row['credit_tokens']} + {row['update_tokens']} tokens, {step} of the step{paper}, {rest} without rollout"


def _served(row: Row, prefix: str) -> str:
    """What clients of a server saw."""
    p50, p99 = (_duration(row[f"{prefix}{name}_seconds"]) for name in ("p50", "p99"))
    return f"{prefix.rstrip('_')} {row[f'{prefix}queries_per_second']:.4g} queries/s p50 {p50} p99 {p99}".lstrip()


def _duration(seconds: float) -> str:
    factor, unit = next(((f, u) for f, u in ((1, "s"), (1e3, "ms")) if seconds * f >= 1), (1e6, "us"))
    return f"{seconds * factor:.4g} {unit}"


def lines(result: dict[str, Any], committed: dict[str, Any] | None) -> list[str]:
    """A heading and a line per row."""
    conditions = "torch {torch}, {threads} threads"
    heading = f"{result['op']} on {result['device']}: {conditions.format_map(result)}"
    old = {case_of(row): row for row in committed["rows"]} if committed else {}
    if committed:
        heading += f"; before: {conditions.format_map(committed)}"
    return [heading, *(f"  {line(row, old.get(case_of(row)))}" for row in result["rows"])]


def text_of(result: dict[str, Any]) -> str:
    """JSON with a row a line, so that a diff shows which cases changed."""
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in result.items() if key != "rows")
    return f'{{\n{head}"rows": [\n' + ",\n".join(json.dumps(row) for row in result["rows"]) + "\n]\n}\n"


def device_name(dump: dict[str, Any]) -> str:
    """The device, of a CPU with its instructions: clouds call very different processors "AMD EPYC"."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    brand = dump["machine_info"]["cpu"].get("brand_raw") or f"{platform.machine()} CPU"
    return f"{brand}, {torch.backends.cpu.get_cpu_capability()}"


def drivers() -> dict[str, str]:
    """What else decides how fast a GPU is: versions of its driver and of Triton, and the command. Nothing on a CPU."""
    if DEVICE != "cuda":
        return {}
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    found = shutil.which(query[0]) and subprocess.run(query, capture_output=True, text=True).stdout.strip()
    command = " ".join(["python -m benchmarks.report", *sys.argv[1:]])
    return {"driver": found or "unknown", "triton": triton.__version__, "command": command}


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")


def git(*arguments: str) -> str | None:
    """Output of git, None outside a checkout or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=BENCHES, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def commit_name() -> str:
    """What is measured: the commit of this checkout, "-dirty" where anything but results differs from it; outside of a
    checkout what STEPCREDIT_COMMIT says, else "unknown"."""
    commit = git("rev-parse", "--short", "HEAD")
    if commit is None:
        return os.environ.get("STEPCREDIT_COMMIT", "unknown")
    changed = git("status", "--porcelain", "--", str(ROOT), f":(exclude){BENCHES / 'results'}")
    return commit.strip() + ("-dirty" if changed else "")


class Until:
    """Plugin of pytest that leaves out the cases that would start after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.stop = time.monotonic() + seconds
        self.left_out: list[str] = []

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() >= self.stop:
            self.left_out.append(item.name)
            pytest.skip(f"{self.seconds:g} s are over")


def measure(op: str, *, quick: bool, only: str | None = None, until: Until | None = None) -> dict[str, Any] | None:
    """pytest-benchmark's dump for one op, None when a benchmark failed or none was run; pytest has printed why."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump.json"
        options = ["-q", "--benchmark-quiet", f"--benchmark-json={dump}", "-W", "ignore::DeprecationWarning"]
        options += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", "-p", "no:cacheprovider"]
        if quick:
            options += ["-k", "small"]
        elif only is not None:
            options += ["-k", only]
        status = pytest.main([str(BENCHES / f"bench_{op}.py"), *options], plugins=[until] if until else [])
        return json.loads(dump.read_text()) if status == pytest.ExitCode.OK and dump.exists() else None


def main(arguments: list[str] | None = None) -> int:
    ops = sorted(path.stem.removeprefix("bench_") for path in BENCHES.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Ops against their baselines.")
    parser.add_argument("--op", choices=ops, help="measure one op (default: all)")
    parser.add_argument("--only", metavar="TEXT", help="cases that pytest -k TEXT selects; stored rows of others stay")
    parser.add_argument(
        "--seconds", type=float, help="start no case of an op after so many; stored rows of those left out stay"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes only, write nothing")
    options = parser.parse_args(arguments)
    for name in MISLEADING:
        if os.environ.get(name) and not options.quick:
            parser.error(f"results measured under {name}={os.environ[name]} must not be kept: unset it or use --quick")

    commit = commit_name()
    failed = []
    for op in [options.op] if options.op else ops:
        until = None if options.seconds is None else Until(options.seconds)
        dump = measure(op, quick=options.quick, only=options.only, until=until)
        if until is not None and until.left_out:
            print(f"{op}: {until.seconds:g} s are over, so without a row of now: {', '.join(until.left_out)}")
        if dump is None:
            failed.append(op)
            continue
        conditions = {"op": op, "device": device_name(dump), **drivers(), "torch": torch.__version__}
        result: dict[str, Any] = {**conditions, "threads": torch.get_num_threads(), "rows": rows_of(dump, commit)}
        path = BENCHES / "results" / slug(result["device"]) / f"{op}.json"
        before = git("show", f"HEAD:./{path.relative_to(BENCHES).as_posix()}")
        print("\n".join(lines(result, json.loads(before) if before else None)), flush=True)
        if not options.quick:
            path.parent.mkdir(parents=True, exist_ok=True)
            if (options.only or until) and path.exists():
                result["rows"] = merged(result, json.loads(path.read_text()))
            path.write_text(text_of(result))
    if failed:
        print(f"failed, so without a row: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
