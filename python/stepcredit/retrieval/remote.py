"""A retriever on another machine, by Search-R1's `/retrieve`: our server's, Search-R1's own, or whoever speaks it."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from types import TracebackType

from stepcredit._validate import at_least
from stepcredit.retrieval import Hits, RetrievalError, check_search, ragged_hits
from stepcredit.retrieval._http import Endpoint, Reply, TransportError
from stepcredit.retrieval.wire import Row, check_token, encode_request, parse_response, quoted


class RemoteRetriever:
    """Searches through a server and answers only with what was checked: a list for each query, at most `k` hits in it,
    finite scores that do not increase, passages of text, no more than `max_response_bytes`.

    * Equal queries of a call are sent once, what is cached is not sent, and the rest in requests of `max_batch`.
    * A request that fails in a way another attempt may cure (no connection, too slow, broken off, status 408, 429 or
      5xx, an answer that fails the checks) is repeated up to `retries` times; any other status is a refusal. Before
      attempt n + 1 it waits for a time drawn evenly between 0 and `backoff * 2**(n - 1)` seconds, at most
      `max_backoff`; a Retry-After of the server makes it longer, up to `max_backoff`. The defaults see a server through
      a restart of some twenty seconds; where loading an index takes longer, more retries do.
    * When `breaker` searches in a row have failed for good, searches fail at once for `cooldown` seconds. Then one is
      let through; the others fail at once until it has succeeded. A server that refuses a request has not failed.
    * A search that fails, for whatever reason, raises RetrievalError, which `SearchEnvironment` turns into a notice to
      the rollout and counts as `failed_retrievals`.

    Against a server that finds fewer than `k` for some queries the hits are ragged (see `Hits`). Safe for several
    threads; a process that is forked needs one of its own. Proxies of the environment are not used.

    Args:
        url: of the endpoint, path included, such as http://127.0.0.1:8000/retrieve.
        token: sent as `Authorization: Bearer <token>`.
        timeout: seconds for an attempt, from sending to the last byte of the answer.
        connect_timeout: seconds for a connection, within `timeout`.
        retries: attempts after the first.
        backoff, max_backoff: seconds.
        breaker: failed searches in a row.
        cooldown: seconds.
        cache_size: queries whose hits are kept, those used last; 0 keeps none.
        max_batch: queries a request.
        max_response_bytes: of an answer.
        clock, sleep, uniform: `time.monotonic`, `time.sleep` and `random.uniform`, unless a test brings its own.

    Attributes:
        counts: by name: "requests" (attempts included), "retries", "failures" (searches that failed after trying),
            "rejected" (failed at once, as the server has been failing), "cache_hits" (queries, repeated ones included).

    Raises:
        ValueError: a URL that is none, a token that no header can hold, or a number out of its range.

    Source: the waiting is the "full jitter" of Brooker 2015, "Exponential Backoff And Jitter", AWS Architecture Blog.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        retries: int = 8,
        backoff: float = 0.2,
        max_backoff: float = 30.0,
        breaker: int = 3,
        cooldown: float = 30.0,
        cache_size: int = 10_000,
        max_batch: int = 256,
        max_response_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.url = url
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        self.retries = retries
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.breaker = breaker
        self.cooldown = cooldown
        self.cache_size = cache_size
        self.max_batch = max_batch
        self.max_response_bytes = max_response_bytes
        at_least(self, "", timeout=0.001, connect_timeout=0.001, retries=0, backoff=0, max_backoff=0, breaker=1)
        at_least(self, "", cooldown=0, cache_size=0, max_batch=1, max_response_bytes=1)
        check_token(token)
        self.counts: Counter[str] = Counter()
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._endpoint = Endpoint(url, connect_timeout=connect_timeout, max_bytes=max_response_bytes)
        self._circuit = _Circuit(breaker, cooldown, clock)
        self._sleep, self._uniform = sleep, uniform
        self._cache: OrderedDict[tuple[str, int], Row] = OrderedDict()
        self._lock = threading.Lock()  # of counts and cache

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The `k` best passages of every query, as the server ranks them. Errors as in `Retriever.search`."""
        check_search(queries, k)
        found = self._cached(queries, k)
        missing = list(dict.fromkeys(query for query in queries if query not in found))
        self._count("cache_hits", len(queries) - len(missing))
        for start in range(0, len(missing), self.max_batch):
            part = missing[start : start + self.max_batch]
            rows = dict(zip(part, self._guarded(part, k), strict=True))
            self._store(rows, k)
            found |= rows
        return ragged_hits([found[query] for query in queries], k)

    def close(self) -> None:
        """Close the idle connections. A later search opens new ones."""
        self._endpoint.close()

    def __enter__(self) -> RemoteRetriever:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guarded(self, queries: list[str], k: int) -> list[Row]:
        reason = self._circuit.enter()
        if reason is not None:
            self._count("rejected")
            raise RetrievalError(f"{self.url} was not asked: {reason}")
        try:
            rows = self._attempts(queries, k)
        except _Refused:
            self._count("failures")
            self._circuit.succeeded()  # the server is there
            raise
        except RetrievalError as error:
            self._count("failures")
            self._circuit.failed(str(error))
            raise
        except BaseException:  # an interrupt, which says nothing about the server
            self._circuit.gave_up()
            raise
        self._circuit.succeeded()
        return rows

    def _attempts(self, queries: list[str], k: int) -> list[Row]:
        body = encode_request(queries, k)
        for attempt in range(1, self.retries + 2):
            self._count("requests")
            least = 0.0
            try:
                reply = self._endpoint.post(body, self._headers, self.timeout)
            except TransportError as error:
                failure = str(error)
            else:
                if reply.status == 200:
                    try:
                        return parse_response(reply.body, len(queries), k)
                    except ValueError as error:
                        failure = str(error)
                else:
                    failure, least = f"status {reply.status}: {_detail(reply)}", reply.retry_after or 0.0
                    if reply.status < 500 and reply.status not in (408, 429):
                        raise _Refused(f"{self.url} refused {len(queries)} queries: {failure}")
            if attempt <= self.retries:
                self._count("retries")
                self._wait(attempt, least)
        raise RetrievalError(f"{self.url} failed {self.retries + 1} times, the last time: {failure}")

    def _wait(self, attempt: int, least: float) -> None:
        longest = min(self.max_backoff, math.ldexp(self.backoff, min(attempt - 1, 64)))
        self._sleep(min(self.max_backoff, least + self._uniform(0.0, longest)))

    def _count(self, name: str, count: int = 1) -> None:
        with self._lock:
            self.counts[name] += count

    def _cached(self, queries: Sequence[str], k: int) -> dict[str, Row]:
        found = {}
        with self._lock:
            for query in queries:
                if (query, k) in self._cache:
                    self._cache.move_to_end((query, k))
                    found[query] = self._cache[query, k]
        return found

    def _store(self, rows: dict[str, Row], k: int) -> None:
        with self._lock:
            for query, row in rows.items():
                self._cache[query, k] = row
                self._cache.move_to_end((query, k))
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)


class _Refused(RetrievalError):
    """The server is there and does not take this request, however often."""


class _Circuit:
    """Keeps searches from a server that has been failing. Safe for several threads."""

    def __init__(self, threshold: int, cooldown: float, clock: Callable[[], float]) -> None:
        self.threshold, self.cooldown, self.clock = threshold, cooldown, clock
        self._failures = 0  # in a row
        self._reason = ""
        self._opened = 0.0
        self._probing = False
        self._lock = threading.Lock()

    def enter(self) -> str | None:
        """None for a search that may try, and then says how it went; else why it may not."""
        with self._lock:
            if self._failures < self.threshold:
                return None
            left = self._opened + self.cooldown - self.clock()
            if left <= 0 and not self._probing:
                self._probing = True
                return None
            until = "until one search is back" if left <= 0 else f"for {left:.1f} more seconds"
            return f"its last {self._failures} searches failed, so none is made {until}; {self._reason}"

    def succeeded(self) -> None:
        with self._lock:
            self._probing, self._failures = False, 0

    def failed(self, reason: str) -> None:
        with self._lock:
            self._probing, self._failures = False, self._failures + 1
            self._reason, self._opened = reason, self.clock()

    def gave_up(self) -> None:
        with self._lock:
            self._probing = False


def _detail(reply: Reply) -> str:
    """What an error says about itself: a FastAPI server's `detail`, or how its body starts."""
    try:
        record = json.loads(reply.body)
    except (ValueError, RecursionError):
        return quoted(reply.body.decode(errors="replace"))
    return quoted(record.get("detail", record) if isinstance(record, dict) else record)
