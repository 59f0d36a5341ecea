"""The output of a run, kept window by window, so that a run that was killed goes on where it was.

Beside the output OUT lie OUT.partial, the lines so far, and OUT.run.json, the record: what is scored and how, and how
far the run is. A window counts once the record says so; what a killed run wrote beyond is cut off. When all is done
OUT.partial becomes OUT.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

#: What an error calls these fields of a record.
_MEANING = {"input_sha256": "input", "weights": "model"}


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        windows, rollouts: scored and written.
        bytes, sha256: of the lines written.
        counts: `StepGains.counts`, and those of the rollouts, summed.
        tokens: `StepGains.tokens_forwarded`, summed.
        seconds: wall time of the scoring.
        difference: with verify, the largest so far, nats per answer token.
    """

    windows: int = 0
    rollouts: int = 0
    bytes: int = 0
    sha256: str = field(default_factory=lambda: sha256().hexdigest())
    counts: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    difference: float | None = None


class Journal:
    """The output of one run; a context manager, under which no other process can write to it.

    Args:
        out: the output.
        run: what is scored and how; JSON.

    Attributes:
        progress: how far the run is, earlier processes included.
        done: whether the output is complete.

    Raises:
        ValueError: what is there is of another run, or is not what its record says.
        OSError: what is there has no record, or another process writes it.
    """

    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        self.out = out
        self.partial = out.with_name(f"{out.name}.partial")
        self.record = out.with_name(f"{out.name}.run.json")
        self.run = dict(run)
        self.done = out.exists()
        self.progress = Progress()
        self._digest = sha256()

    def __enter__(self) -> Journal:
        self._stream: IO[bytes] = open(self.out if self.done else self.partial, "rb" if self.done else "a+b")
        try:
            if not self.done:
                self._lock()
            self._resume()
            if not self.done:
                self._stream.truncate(self.progress.bytes)
                self._save()
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def append(self, lines: Sequence[str], progress: Progress) -> None:
        """Keep the lines of a window. `progress` is that of the run with them; its bytes and hash are set here."""
        data = "".join(f"{line}\n" for line in lines).encode()
        self._stream.write(data)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._digest.update(data)
        progress.bytes = self.progress.bytes + len(data)
        progress.sha256 = self._digest.hexdigest()
        self.progress = progress
        self._save()

    def finish(self) -> None:
        """Give the output its name: every rollout has its line."""
        os.replace(self.partial, self.out)
        self.done = True

    def _lock(self) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{self.partial}: another process writes it") from error

    def _resume(self) -> None:
        """Set `progress` by the record, and check that the lines it speaks of are there."""
        lines = self.out if self.done else self.partial
        if not self.record.exists():
            if self.done or lines.stat().st_size:
                raise FileExistsError(f"{lines} is there, but not its record {self.record.name}: choose another --out")
            return
        try:
            known = json.loads(self.record.read_text(encoding="utf-8"))
            run, progress = known["run"], Progress(**known["progress"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.record} is not readable as the record of a run: {error!r}") from error
        for name in [*self.run, *run]:
            if run.get(name) != self.run.get(name):
                raise ValueError(
                    f"{lines} is of a run with another {_MEANING.get(name, name)} ({name}={run.get(name)!r}, now "
                    f"{self.run.get(name)!r}): run that one, choose another --out, or delete {lines.name} and "
                    f"{self.record.name}"
                )
        left = progress.bytes
        self._stream.seek(0)
        while left and (block := self._stream.read(min(left, 1 << 20))):
            self._digest.update(block)
            left -= len(block)
        beyond = self.done and bool(self._stream.read(1))  # a killed run may have written more, a complete one not
        if beyond or self._digest.hexdigest() != progress.sha256:
            raise ValueError(
                f"{lines} does not hold the {progress.bytes} bytes that {self.record.name} speaks of: delete both to "
                "begin anew"
            )
        self.progress = progress

    def _save(self) -> None:
        scratch = self.record.with_name(f"{self.record.name}.scratch")
        with open(scratch, "w", encoding="utf-8") as stream:
            json.dump({"run": self.run, "progress": asdict(self.progress)}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, self.record)
