"""The retrieval server under load, beside one of the original's structure: `pytest benchmarks/bench_server.py`.

Clients on loopback, each a thread with its own `RemoteRetriever` and `SearchEnvironment`, run groups of rollouts that
search together, in groups of mixed size. A rollout is lost when one of its searches failed, and wrong when it was shown
other passages than a direct search finds: either stops the benchmark. What a client waits for is a turn of its group.
With faults the server answers a tenth of the requests with 500 and some too late, is killed after a third of the turns
and started again.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import interleave
from benchmarks.server_process import build_retriever
from benchmarks.shapes import SHAPES
from stepcredit.environments.search import SearchEnvironment
from stepcredit.protocol import PROTOCOLS
from stepcredit.retrieval.remote import RemoteRetriever
from stepcredit.rollout import Search

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = PROTOCOLS["search_r1"]
#: Rollouts of a group, each as likely.
SIZES = (1, 1, 2, 4, 8, 16)
TURNS = 3
#: Different queries of all clients.
POOL = 1000
#: How clients see a server through what `faulty` does and through a restart.
PATIENCE = {"timeout": 3.0, "retries": 100, "backoff": 0.1, "max_backoff": 1.0}


@dataclass
class Process:
    """A server that can be killed and started again on its port."""

    kind: str
    size: dict[str, int]
    port: int = 0
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/retrieve"

    def start(self) -> None:
        arguments = [self.kind, str(self.port), str(self.size["passages"]), str(self.size["width"])]
        command = [sys.executable, "-m", "benchmarks.server_process", *arguments]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)

    def wait(self) -> None:
        """Until it listens."""
        assert self.process is not None
        assert self.process.stdout is not None
        said = self.process.stdout.readline().split()
        assert said[:1] == ["PORT"], f"the {self.kind} server did not start"
        self.port = int(said[1])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@contextmanager
def servers(size: dict[str, int], *kinds: str) -> Iterator[list[Process]]:
    processes = [Process(kind, size) for kind in kinds]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.wait()
        yield processes
    finally:
        for process in processes:
            process.kill()


@dataclass
class Load:
    """What clients do to a server, and what they saw in all runs so far."""

    size: dict[str, int]
    right: dict[str, list[str]]
    options: dict[str, Any]
    waits: list[float] = field(default_factory=list)  # seconds a turn
    queries: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, url: str) -> None:
        """All clients, to their end. Raises AssertionError for a rollout that is lost or wrong."""
        began = time.perf_counter()
        with ThreadPoolExecutor(self.size["clients"]) as pool:
            for done in [pool.submit(self._client, url, i) for i in range(self.size["clients"])]:
                done.result()
        self.seconds += time.perf_counter() - began

    def _client(self, url: str, number: int) -> None:
        rng = random.Random(number)
        names = list(self.right)
        with RemoteRetriever(url, cache_size=0, **self.options) as retriever:
            environment = SearchEnvironment(retriever, PROTOCOL, top_k=self.size["k"], max_searches=TURNS + 1)
            for _ in range(self.size["groups"]):
                rollouts: list[list[Search]] = [[] for _ in range(rng.choice(SIZES))]
                for _ in range(TURNS):
                    self._turn(environment, [rng.choice(names) for _ in rollouts], rollouts)
            with self.lock:
                self.counts += retriever.counts

    def _turn(self, environment: SearchEnvironment, queries: list[str], rollouts: list[list[Search]]) -> None:
        turns = [PROTOCOL.parse_turn(f"<search>{query}</search>") for query in queries]
        began = time.perf_counter()
        responses = environment.respond(turns, rollouts, [0] * len(queries), [False] * len(queries))
        waited = time.perf_counter() - began
        for query, response, searches in zip(queries, responses, rollouts, strict=True):
            search = response.search
            assert search is not None, "a rollout is lost"
            assert not search.failed, "a rollout is lost: its retrieval failed"
            assert search == Search(len(searches), query, tuple(self.right[query])), f"wrong passages: {search}"
            searches.append(search)
        with self.lock:
            self.waits.append(waited)
            self.queries += len(queries)

    def report(self, info: dict[str, Any], prefix: str = "") -> None:
        p50, p99 = np.percentile(self.waits, [50, 99])
        info |= {f"{prefix}p50_seconds": float(p50), f"{prefix}p99_seconds": float(p99)}
        info[f"{prefix}queries_per_second"] = self.queries / self.seconds


def direct(size: dict[str, int]) -> dict[str, list[str]]:
    """Each query and the passages that a search without a server finds."""
    queries = [f"what is number {i}" for i in range(POOL)]
    hits = build_retriever(size["passages"], size["width"]).search(queries, size["k"])
    return dict(zip(queries, hits.ids, strict=True))


@pytest.mark.parametrize("shape", SHAPES["server"])
def test_server(benchmark: Any, shape: str) -> None:
    size = SHAPES["server"][shape]
    right = direct(size)
    ours, plain = Load(size, right, {"timeout": 60.0, "retries": 0}), Load(size, right, {"timeout": 60.0, "retries": 0})
    with servers(size, "ours", "plain") as (our_server, plain_server):
        interleave(benchmark, lambda: ours.run(our_server.url), {"plain": lambda: plain.run(plain_server.url)})
    ours.report(benchmark.extra_info)
    plain.report(benchmark.extra_info, "plain_")


@pytest.mark.parametrize("shape", SHAPES["server"])
@pytest.mark.parametrize("faults", ["500s, late answers, a kill"])
def test_server_with_faults(benchmark: Any, shape: str, faults: str) -> None:
    size = SHAPES["server"][shape]
    load = Load(size, direct(size), PATIENCE)
    turns = size["clients"] * size["groups"] * TURNS
    restarts = 0
    with servers(size, "faulty") as (process,):

        def killer() -> None:
            nonlocal restarts
            while len(load.waits) < turns // 3:
                time.sleep(0.01)
            process.kill()
            process.start()
            process.wait()
            restarts += 1

        thread = threading.Thread(target=killer, daemon=True)
        thread.start()
        benchmark.pedantic(load.run, args=(process.url,), rounds=1)
        thread.join(60)
    assert restarts == 1
    assert len(load.waits) == turns
    load.report(benchmark.extra_info)
    benchmark.extra_info |= {"retries": load.counts["retries"], "restarts": restarts}
