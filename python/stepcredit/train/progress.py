"""Progress on the console: bars in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Seconds between two plain lines.
LINE_EVERY = 15.0

#: `advance(units, note)` moves a task and, unless the note is empty, sets what is shown beside it.
Advance = Callable[..., None]


class Reporter:
    """Shows named tasks with a note beside each, e.g. the current reward and EM; tasks may nest.

    Where stdout is not a terminal (CI, a pipe, a log file) there are no bars: an outer task prints a line at its end,
    and a task that takes long one every `LINE_EVERY` seconds.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._depth = 0
        self._last_line = 0.0

    def line(self, text: str) -> None:
        """Print one line, above the bars."""
        self.console.print(text, markup=False)
        self._last_line = time.monotonic()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """A task of `total` units; yields its `advance(units=1, note="")`."""
        show = self._bar if self.console.is_terminal else self._lines
        self._depth += 1
        try:
            with show(name, total) as advance:
                yield advance
        finally:
            self._depth -= 1

    @contextmanager
    def _lines(self, name: str, total: int) -> Iterator[Advance]:
        done, shown, start = 0, "", time.monotonic()

        def advance(units: int = 1, note: str = "") -> None:
            nonlocal done, shown
            done, shown = done + units, note or shown
            if done < total and time.monotonic() - max(self._last_line, start) >= LINE_EVERY:
                self.line(f"{name}: {done}/{total} {shown}".rstrip())

        yield advance
        if self._depth == 1:
            self.line(f"{name}: {done}/{total} in {time.monotonic() - start:.0f} s {shown}".rstrip())

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Advance]:
        bars = self._bars
        if bars is None:
            bars = self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            bars.start()
        bar = bars.add_task(name, total=total, note="")

        def advance(units: int = 1, note: str = "") -> None:
            bars.advance(bar, units)
            if note:
                bars.update(bar, note=note)

        try:
            yield advance
        finally:
            if self._depth == 1:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(bar)
