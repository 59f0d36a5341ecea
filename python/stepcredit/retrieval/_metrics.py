"""What the server counts, as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Counter:
    """Grows. One value, or one for each value of a label."""

    def __init__(self, name: str, help: str, label: str | None = None) -> None:
        self.name, self.help, self.label = name, help, label
        self._values: dict[str, int] = {} if label else {"": 0}
        self._lock = threading.Lock()

    def add(self, count: int = 1, value: str = "") -> None:
        with self._lock:
            self._values[value] = self._values.get(value, 0) + count

    def lines(self) -> list[str]:
        with self._lock:
            values = sorted(self._values.items())
        named = [(f'{self.name}{{{self.label}="{value}"}}' if self.label else self.name, n) for value, n in values]
        return [*_head(self.name, "counter", self.help), *(f"{name} {n}" for name, n in named)]


class Histogram:
    """How often a value was at most each of `bounds`, the sum of all values and their number."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name, self.help, self.bounds = name, help, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._sum += value

    def lines(self) -> list[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        lines, below = _head(self.name, "histogram", self.help), 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], counts, strict=True):
            below += count
            lines.append(f'{self.name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{self.name}_sum {total!r}", f"{self.name}_count {below}"]


class Gauge:
    """What a function returns when it is asked."""

    def __init__(self, name: str, help: str, read: Callable[[], int]) -> None:
        self.name, self.help, self.read = name, help, read

    def lines(self) -> list[str]:
        return [*_head(self.name, "gauge", self.help), f"{self.name} {self.read()}"]


def _head(name: str, kind: str, help: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


class ServerMetrics:
    """Everything that `/metrics` shows but the length of the queue; docs/retrieval_server.md lists the names."""

    def __init__(self) -> None:
        prefix = "stepcredit_retrieval_"
        self.requests = Counter(
            f"{prefix}requests_total",
            "Requests to /retrieve by status; 499: the client left before its answer.",
            "status",
        )
        self.queries = Counter(f"{prefix}queries_total", "Queries of answered requests.")
        self.blank_queries = Counter(f"{prefix}blank_queries_total", "Of these, blank ones: answered with no hit.")
        self.failed_batches = Counter(
            f"{prefix}failed_batches_total", "Searches that raised; a batch of several requests is then split."
        )
        self.request_seconds = Histogram(
            f"{prefix}request_seconds", "From a request's head to its answer, whatever its status.", _SECONDS
        )
        self.search_seconds = Histogram(f"{prefix}search_seconds", "Time of a batch in the engine.", _SECONDS)
        self.batch_queries = Histogram(f"{prefix}batch_queries", "Queries of a searched batch.", _QUERIES)

    def text(self, *gauges: Gauge) -> str:
        parts: tuple[Counter | Gauge | Histogram, ...] = (
            self.requests,
            self.queries,
            self.blank_queries,
            self.failed_batches,
            *gauges,
            self.request_seconds,
            self.search_seconds,
            self.batch_queries,
        )
        return "".join(f"{line}\n" for part in parts for line in part.lines())
