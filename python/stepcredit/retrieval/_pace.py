"""Progress of long work: units done, their rate, and the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from stepcredit.train.progress import Advance, Reporter

_MEGABYTE = 1_000_000


@contextmanager
def progress_task(reporter: Reporter, name: str, total: int, unit: str, done: int = 0) -> Iterator[Pace]:
    """A task over `total` units, of which an earlier process did `done`; "bytes" are shown as megabytes."""
    name, scale = (f"{name} (MB)", _MEGABYTE) if unit == "bytes" else (name, 1)
    with reporter.task(name, max(1, total // scale)) as advance:
        yield Pace(advance, total, unit, done)


class Pace:
    """Shows units done on a progress task, with the rate of this process and the time left; bytes as megabytes."""

    def __init__(self, advance: Advance, total: int, unit: str, done: int) -> None:
        self._advance = advance
        self._total = total
        self._scale, self._unit = (_MEGABYTE, "MB") if unit == "bytes" else (1, unit)
        self._begun_at = self._done = done
        self._since = time.monotonic()
        self._shown = 0
        self(0)

    def __call__(self, count: int) -> None:
        self._done += count
        steps = self._done // self._scale if self._done < self._total else max(1, self._total // self._scale)
        rate = (self._done - self._begun_at) / max(time.monotonic() - self._since, 1e-6)
        note = ""
        if rate:
            left = (self._total - self._done) / rate
            time_left = (
                f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min" if left < 7200 else f"{left / 3600:.1f} h"
            )
            note = f"{rate / self._scale:,.1f} {self._unit}/s, {time_left} left"
        self._advance(steps - self._shown, note)
        self._shown = steps
