"""What every benchmark shares: its device, how a call is timed, how baselines are interleaved, what memory it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Where the tensors of a benchmark live. A GPU that is present is what gets measured; hide it to measure the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Rounds of a benchmark: as many as fit into this many seconds, baselines included, within these bounds.
SECONDS = 0.5
ROUNDS = (3, 100)
#: A round longer than this, in seconds, is not repeated: it averages out by itself what shorter ones repeat for.
LONG = 20.0

#: A case whose ways take seconds to minutes each runs rounds of all of them: these many where one round is at most
#: `LONG_ROUND` seconds, else one, and more as long as they would end within `CASE_SECONDS`.
CASE_ROUNDS = (2, 10)
CASE_SECONDS = 60.0 if DEVICE == "cpu" else 4.0
LONG_ROUND = 420.0


def another_round(done: int, elapsed: float) -> bool:
    """Whether such a case, after so many rounds in so many seconds, runs another."""
    one = elapsed / done
    fewest, most = CASE_ROUNDS
    return one <= LONG_ROUND if done < fewest else done < most and elapsed + one <= CASE_SECONDS


def synchronised(function: Callable[[], object]) -> Callable[[], None]:
    """`function` as its caller waits for it: with the work it queued on a GPU."""

    def run() -> None:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(function: Callable[[], object]) -> float:
    """What a caller of `function` waits."""
    run = synchronised(function)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of torch's allocator alive at once that `function` allocated."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        synchronised(function)()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def interleave(benchmark: Any, ours: Callable[[], object], baselines: Mapping[str, Callable[[], object]]) -> None:
    """Times `ours` with pytest-benchmark and each baseline once before every round of it, so that all of them see the
    same machine. The best seconds of the baselines and their ratios to our best go to `extra_info`."""
    for run in (*baselines.values(), ours):  # compiles, and fills caches
        run()
    best = {name: seconds(run) for name, run in baselines.items()}
    fewest, most = ROUNDS
    one = sum(best.values()) + seconds(ours)
    rounds = 1 if one > LONG else min(most, max(fewest, int(SECONDS / one)))

    def between() -> None:
        for name, run in baselines.items():
            best[name] = min(best[name], seconds(run))

    benchmark.pedantic(synchronised(ours), setup=between, rounds=rounds)
    for name, value in best.items():
        benchmark.extra_info[f"{name}_seconds"] = value
        benchmark.extra_info[f"{name}_over_ours"] = value / benchmark.stats.stats.min


def record_peaks(benchmark: Any, ours: Callable[[], object], baselines: Mapping[str, Callable[[], object]]) -> None:
    """Peak bytes of `ours` and of each baseline go to `extra_info`; all of them have run before."""
    benchmark.extra_info["peak_bytes"] = peak_bytes(ours)
    for name, run in baselines.items():
        benchmark.extra_info[f"{name}_peak_bytes"] = peak_bytes(run)


def size_bytes(*tensors: torch.Tensor) -> int:
    """What it takes to read or write each of these once."""
    return sum(t.numel() * t.element_size() for t in tensors)
