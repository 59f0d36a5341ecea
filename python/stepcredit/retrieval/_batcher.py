"""Searches of many requests in few batches, on one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from stepcredit.retrieval import Retriever
from stepcredit.retrieval._metrics import ServerMetrics
from stepcredit.retrieval.wire import Row

_LOG = logging.getLogger(__name__)


class Busy(Exception):
    """No search is taken now: the queue is full, or the server is shutting down."""


@dataclass(eq=False, slots=True)
class Job:
    """The queries of one request; `future` gets their hits, or what the retriever raised."""

    queries: Sequence[str]
    k: int
    arrived: float
    future: Future[list[Row]] = field(default_factory=Future)
    rows: list[Row] = field(default_factory=list)
    taken: int = 0  # queries that are in a batch or have been

    @property
    def waiting(self) -> int:
        return len(self.queries) - self.taken


#: Queries [start, stop) of a job.
Piece = tuple[Job, int, int]


class Batcher:
    """Collects queries of all requests and searches them in batches, first come first served, on a thread of its own.

    A batch holds queries with one `k`, since the best `k` need not be the first of a longer list with every engine. It
    is searched when it is full or its first request has waited for `max_wait`; while one is searched the next collects.
    A request beyond `max_batch` takes several batches. When a batch fails, its requests are searched one by one, so
    that a query that an engine cannot stand fails nobody else's.

    Args:
        retriever: searched by this thread alone, so it need not be safe for several.
        metrics: gets what batches hold and take, and what fails.
        max_batch: queries a batch.
        max_wait: seconds.
        max_queue: queries that wait at once; a request that would be more is refused.
    """

    def __init__(
        self, retriever: Retriever, metrics: ServerMetrics, *, max_batch: int, max_wait: float, max_queue: int
    ) -> None:
        self.retriever = retriever
        self.metrics = metrics
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.max_queue = max_queue
        self._jobs: deque[Job] = deque()
        self._waiting: Counter[int] = Counter()  # queries by their k
        self._changed = threading.Condition()
        self._closed = False
        # A daemon: a search that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="stepcredit-search", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether searches are taken and the thread runs."""
        return self._thread.is_alive() and not self._closed

    @property
    def depth(self) -> int:
        """Queries that wait."""
        return self._waiting.total()

    def submit(self, queries: Sequence[str], k: int) -> Job:
        """A job whose future will be done. Raises Busy."""
        with self._changed:
            if self._closed:
                raise Busy("the server is shutting down")
            if self.depth + len(queries) > self.max_queue:
                raise Busy(
                    f"{self.depth} queries wait already, and with these {len(queries)} it would be more than "
                    f"{self.max_queue}"
                )
            job = Job(queries, k, time.monotonic())
            if queries:
                self._jobs.append(job)
                self._waiting[k] += len(queries)
                self._changed.notify()
            else:
                job.future.set_result([])
        return job

    def abandon(self, job: Job) -> None:
        """Nobody waits for the job any more: what of it is not searched yet never is."""
        job.future.cancel()
        with self._changed:
            self._drop(job)

    def close(self, timeout: float | None = None) -> bool:
        """Take no more, search what waits, end the thread. Whether that was done in `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _drop(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            self._waiting[job.k] -= job.waiting

    def _run(self) -> None:
        while pieces := self._next_batch():
            self._search(pieces)

    def _next_batch(self) -> list[Piece]:
        """Waits for a batch and takes it from the queue; empty when closed and drained."""
        with self._changed:
            while not self._ready():
                if not self._jobs and self._closed:
                    return []
                self._changed.wait(self._patience())
            k, room, pieces = self._jobs[0].k, self.max_batch, []
            for job in [job for job in self._jobs if job.k == k]:
                start, job.taken = job.taken, min(len(job.queries), job.taken + room)
                pieces.append((job, start, job.taken))
                if not job.waiting:
                    self._jobs.remove(job)
                room -= job.taken - start
                if not room:
                    break
            self._waiting[k] -= self.max_batch - room
            return pieces

    def _ready(self) -> bool:
        if not self._jobs:
            return False
        full = self._waiting[self._jobs[0].k] >= self.max_batch
        return full or self._closed or self._jobs[0].arrived + self.max_wait <= time.monotonic()

    def _patience(self) -> float | None:
        return max(0.0, self._jobs[0].arrived + self.max_wait - time.monotonic()) if self._jobs else None

    def _search(self, pieces: list[Piece]) -> None:
        queries = [query for job, start, stop in pieces for query in job.queries[start:stop]]
        began = time.monotonic()
        try:
            rows = self._rows(queries, pieces[0][0].k)
        except Exception as error:  # whatever an engine raises fails its request and no other
            self.metrics.failed_batches.add()
            if len(pieces) > 1:
                _LOG.warning("a batch of %d requests failed, now one by one: %r", len(pieces), error)
                for piece in pieces:
                    self._search([piece])
            else:
                _LOG.error("a search of %d queries failed", len(queries), exc_info=error)
                self._fail(pieces[0][0], error)
            return
        self.metrics.search_seconds.observe(time.monotonic() - began)
        self.metrics.batch_queries.observe(len(queries))
        for job, start, stop in pieces:
            job.rows += rows[: stop - start]
            del rows[: stop - start]
            if len(job.rows) == len(job.queries) and job.future.set_running_or_notify_cancel():
                job.future.set_result(job.rows)

    def _fail(self, job: Job, error: Exception) -> None:
        with self._changed:
            self._drop(job)
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)

    def _rows(self, queries: list[str], k: int) -> list[Row]:
        hits = self.retriever.search(queries, k)
        if len(hits.passages) != len(queries) or len(hits.scores) != len(queries):
            raise ValueError(
                f"the retriever answered {len(queries)} queries with {len(hits.passages)} rows of passages and scores "
                f"of shape {hits.scores.shape}"
            )
        rows = zip(hits.passages, hits.scores.tolist(), strict=True)
        return [list(zip(passages, scores[: len(passages)], strict=True)) for passages, scores in rows]
