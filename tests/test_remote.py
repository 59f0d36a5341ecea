"""The client of `/retrieve`: what it sends, what it believes, and what it does when the server is not there."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serving import GOOD, Echo, answer, dies_after, hit, scripted, serving
from stepcredit.environments.search import SearchEnvironment
from stepcredit.protocol import PROTOCOLS
from stepcredit.retrieval import Passage, RetrievalError, Retriever
from stepcredit.retrieval.bm25 import BM25Retriever
from stepcredit.retrieval.remote import RemoteRetriever
from stepcredit.retrieval.wire import Limits
from stepcredit.rollout import Search, SpanKind

#: Nothing listens here: the port is bound, and never listened on.
DEAD = socket.socket()
DEAD.bind(("127.0.0.1", 0))
UNREACHABLE = f"http://127.0.0.1:{DEAD.getsockname()[1]}/retrieve"


class Clock:
    """Time passes only by sleeping; the largest jitter."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    @property
    def options(self):
        return {"clock": lambda: self.now, "sleep": self.sleep, "uniform": lambda low, high: high}


# --- right answers ----------------------------------------------------------------------------------------

PASSAGES = [
    Passage("lima", "Lima", "The capital of Peru."),
    Passage("你好", 'Zoë "Z"', "Größe — naïve café, 北京.\nA second line."),
    Passage("bare", "", "Untitled text about Norway."),
    Passage("lines", "two\nlines", "and a text"),
]


def test_it_finds_what_the_servers_retriever_finds():
    direct = BM25Retriever(PASSAGES)
    queries = ["capital of Peru", "café naïve 北京", "Norway", "two lines", "capital of Peru"]
    with serving(direct) as running, RemoteRetriever(running.url) as remote:
        assert isinstance(remote, Retriever)
        for k in (1, 3, 9):
            hits, expected = remote.search(queries, k), direct.search(queries, k)
            assert hits.ids == expected.ids
            assert hits.passages == expected.passages
            np.testing.assert_array_equal(hits.scores, expected.scores)
            assert hits.scores.dtype == np.float32


def test_hits_without_any_score_and_rows_of_different_length():
    body = {"result": [[{"document": {"contents": "A\nx"}}, {"document": {"contents": "B\ny"}}], []]}
    with scripted(answer(body)) as server:
        hits = RemoteRetriever(server.url).search(["a", "b"], 3)
    np.testing.assert_array_equal(hits.scores, np.array([[-1, -2], [-np.inf, -np.inf]], np.float32))
    assert [[p.title for p in row] for row in hits.passages] == [["A", "B"], []]
    assert [len(row) for row in hits.ids] == [2, 0]


def test_no_queries_are_not_sent():
    hits = RemoteRetriever(UNREACHABLE).search([], 3)
    assert hits.scores.shape == (0, 3)
    assert hits.ids == hits.passages == []


@pytest.mark.parametrize(
    ("queries", "k", "error"), [("a", 1, TypeError), (["a"], 0, ValueError), (["a", " "], 1, ValueError)]
)
def test_mistakes_of_the_caller_are_not_failed_retrievals(queries, k, error):
    with pytest.raises(error):
        RemoteRetriever(UNREACHABLE).search(queries, k)


def test_connections_are_kept_and_replaced_when_the_server_has_closed_them():
    with scripted(GOOD, GOOD, dies_after(b""), GOOD) as server, RemoteRetriever(server.url) as remote:
        for query in "abc":  # the third comes on a connection that is closed under it
            assert remote.search([query], 1).ids == [["a"]]
        assert server.connections == 2
        assert remote.counts == {"requests": 3, "cache_hits": 0}


def test_large_batches_are_split_and_equal_queries_sent_once():
    echo = Echo()
    queries = [f"q{i % 7}." for i in range(20)]
    with serving(echo, limits=Limits(max_queries=3)) as running, RemoteRetriever(running.url, max_batch=3) as remote:
        assert remote.search(queries, 1).ids == [[f"{query}0"] for query in queries]
        assert remote.counts == {"requests": 3, "cache_hits": 13}
    assert sorted(query for batch, _ in echo.calls for query in batch) == sorted(set(queries))


def test_the_cache_keeps_what_was_used_last():
    echo = Echo()
    with serving(echo) as running, RemoteRetriever(running.url, cache_size=2) as remote:
        for queries, k in ((["a", "b"], 1), (["a"], 1), (["c"], 1), (["a"], 1), (["a"], 2), (["b"], 1)):
            assert remote.search(queries, k).ids == [[f"{query}{i}" for i in range(k)] for query in queries]
    assert echo.calls == [(["a", "b"], 1), (["c"], 1), (["a"], 2), (["b"], 1)]
    with serving(echo) as running, RemoteRetriever(running.url, cache_size=0) as remote:
        assert remote.search(["a"], 1).ids == remote.search(["a"], 1).ids
        assert remote.counts["requests"] == 2


def test_threads_share_a_retriever():
    with serving(Echo()) as running, RemoteRetriever(running.url, cache_size=50) as remote:

        def search(i):
            queries = [f"q{(i * j) % 60}." for j in range(1, 9)]
            return remote.search(queries, 2).ids == [[f"{query}0", f"{query}1"] for query in queries]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(search, range(200)))


def test_the_token_is_sent_and_never_shown():
    with serving(Echo(), token="s3cret") as running:
        assert RemoteRetriever(running.url, token="s3cret").search(["a"], 1).ids == [["a0"]]
        with pytest.raises(RetrievalError, match="refused 1 queries: status 401: 'this server needs") as wrong:
            RemoteRetriever(running.url, token="wr0ng").search(["a"], 1)
        assert "wr0ng" not in str(wrong.value)


# --- answers not to be believed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>Bad gateway</html>", "the answer is not JSON .*; it starts '<html>Bad gateway</html>'"),
        (b"\xff\xfe\xfa", "the answer is not JSON"),
        (b"[" * 100_000, "the answer is not JSON"),
        ([], "must be an object whose 'result' is a list"),
        ({"results": []}, "must be an object whose 'result' is a list"),
        ({"result": [[hit()], [hit()]]}, "one list for each of 1 queries, got 2"),
        ({"result": []}, "one list for each of 1 queries, got 0"),
        ({"result": [hit()]}, r"result\[0\] must be a list of at most 2 hits, got {"),
        ({"result": [[hit()] * 3]}, r"result\[0\] must be a list of at most 2 hits"),
        ({"result": [["a"]]}, r"result\[0\]\[0\] must be an object, got 'a'"),
        ({"result": [[{"score": 1.0}]]}, r"result\[0\]\[0\].document must be an object, got None"),
        ({"result": [[{"document": {"id": "a"}, "score": 1}]]}, "must have a string 'contents', or 'title' and 'text'"),
        ({"result": [[{"document": {"id": [], "contents": "x"}, "score": 1}]]}, r"document.id must be a string or an"),
        ({"result": [[{"document": {"contents": "\ud800"}, "score": 1}]]}, "document is not Unicode text"),
        ({"result": [[hit(score="1")]]}, r"score must be a finite float32 number, got '1'"),
        ({"result": [[hit(score=True)]]}, r"score must be a finite float32 number, got True"),
        ({"result": [[hit(score=1e39)]]}, r"score must be a finite float32 number, got 1e\+39"),
        ({"result": [[hit(score=float("nan"))]]}, "not JSON .NaN is not JSON"),
        (
            b'{"result": [[{"document": {"contents": "x"}, "score": 1e999}]]}',
            "must be a finite float32 number, got inf",
        ),
        ({"result": [[hit(score=1.0), hit(score=2.0)]]}, r"result\[0\]\[1\].score is 2.0, above 1.0 of the hit before"),
        ({"result": [[hit(), hit(score=None)]]}, "some hits of the result have a score and some have none"),
        ({"result": [[hit()]], "more": "x" * 2000}, "the answer is larger than 2000 bytes"),
    ],
)
def test_nonsense_is_a_failed_retrieval(body, message):
    limit = 2000 if b"x" * 2000 in answer(body) else 1 << 20
    with scripted(answer(body)) as server:
        remote = RemoteRetriever(server.url, retries=0, max_response_bytes=limit)
        with pytest.raises(RetrievalError, match=message) as failed:
            remote.search(["a"], 2)
    assert len(str(failed.value)) < 1000


@pytest.mark.parametrize(
    ("reaction", "message"),
    [
        (dies_after(b""), "RemoteDisconnected"),
        (dies_after(b"\x00\x01 nonsense\r\n\r\n"), "BadStatusLine"),
        (dies_after(GOOD[:-9]), "broke off 9 bytes before its end"),
        (dies_after(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"), "broke off"),
        (dies_after(b"HTTP/1.1 200 OK\r\n\r\n{"), "not JSON"),
    ],
    ids=["no answer", "no HTTP", "killed in the body", "killed in a chunk", "killed in a body without length"],
)
def test_a_server_that_dies_is_a_failed_retrieval_until_it_is_back(reaction, message):
    with scripted(reaction) as server, pytest.raises(RetrievalError, match=message):
        RemoteRetriever(server.url, retries=0).search(["a"], 1)
    with scripted(reaction, GOOD) as server:
        remote = RemoteRetriever(server.url, backoff=0.0)
        assert remote.search(["a"], 1).ids == [["a"]]
        assert remote.counts == {"requests": 2, "retries": 1, "cache_hits": 0}


def drip(start):
    def react(connection):
        connection.sendall(start)
        try:
            for _ in range(200):
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass  # the client has left

    return react


@pytest.mark.parametrize(
    "start",
    [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"],
    ids=["status", "header", "body"],
)
def test_the_timeout_is_for_all_of_an_answer(start):
    with scripted(drip(start)) as server:
        began = time.monotonic()
        with pytest.raises(RetrievalError, match="TimeoutError"):
            RemoteRetriever(server.url, timeout=0.3, retries=0).search(["a"], 1)
        assert 0.25 < time.monotonic() - began < 3


# --- trying again -----------------------------------------------------------------------------------------


def test_unreachable():
    clock = Clock()
    remote = RemoteRetriever(UNREACHABLE, retries=4, backoff=1.0, max_backoff=3.0, **clock.options)
    with pytest.raises(RetrievalError, match=r"failed 5 times, the last time: no connection: ConnectionRefusedError"):
        remote.search(["a"], 1)
    assert clock.slept == [1.0, 2.0, 3.0, 3.0]
    assert remote.counts == {"requests": 5, "retries": 4, "failures": 1, "cache_hits": 0}


def test_jitter_is_drawn_from_nothing_to_the_longest():
    drawn = []
    options = {"sleep": lambda seconds: None, "uniform": lambda *bounds: drawn.append(bounds) or 0.0}
    with pytest.raises(RetrievalError):
        RemoteRetriever(UNREACHABLE, retries=3, backoff=0.5, **options).search(["a"], 1)
    assert drawn == [(0.0, 0.5), (0.0, 1.0), (0.0, 2.0)]


@pytest.mark.parametrize("status", ["500 X", "503 X", "429 X", "408 X"])
def test_a_busy_server_is_asked_again_and_not_before_it_wants(status):
    clock = Clock()
    busy = answer({"detail": "busy"}, status, "Retry-After: 4")
    with scripted(busy, answer({}, status, "Retry-After: 900"), GOOD) as server:
        remote = RemoteRetriever(server.url, backoff=1.0, max_backoff=10.0, **clock.options)
        assert remote.search(["a"], 1).ids == [["a"]]
    assert clock.slept == [5.0, 10.0]


@pytest.mark.parametrize("status", ["400 X", "404 X", "422 X", "302 X", "204 X"])
def test_a_refusal_is_final(status):
    with scripted(answer({"detail": "queries must be nicer"}, status), GOOD) as server:
        remote = RemoteRetriever(server.url, breaker=1)
        with pytest.raises(RetrievalError, match=rf"refused 1 queries: status {status[:3]}"):
            remote.search(["a"], 1)
        assert remote.counts["requests"] == 1
        assert remote.search(["a"], 1).ids == [["a"]]  # and no reason to think that the server is down


def test_after_failures_in_a_row_searches_fail_at_once():
    clock = Clock()
    bad = answer({}, "500 X")
    with scripted(bad, GOOD, bad, bad, bad, GOOD) as server:
        remote = RemoteRetriever(server.url, retries=0, breaker=2, cooldown=10.0, cache_size=0, **clock.options)

        def outcome():
            before = remote.counts["requests"]
            try:
                remote.search(["a"], 1)
            except RetrievalError as error:
                return "failed" if remote.counts["requests"] > before else str(error)
            return "found"

        assert [outcome() for _ in range(4)] == ["failed", "found", "failed", "failed"]
        assert "its last 2 searches failed, so none is made for 10.0 more seconds; " in outcome()
        clock.now += 9.0
        assert "for 1.0 more seconds" in outcome()
        clock.now += 1.0
        assert outcome() == "failed"  # the one that is let through
        assert "its last 3 searches failed" in outcome()
        clock.now += 10.0
        assert [outcome() for _ in range(2)] == ["found", "found"]
        assert remote.counts["rejected"] == 3


def test_one_search_at_a_time_finds_out_whether_the_server_is_back():
    clock = Clock()
    arrived, go = threading.Event(), threading.Event()

    def late(connection):
        arrived.set()
        go.wait(20)
        connection.sendall(GOOD)

    with scripted(answer({}, "500 X"), late, GOOD) as server:
        remote = RemoteRetriever(server.url, retries=0, breaker=1, cooldown=10.0, cache_size=0, **clock.options)
        with pytest.raises(RetrievalError):
            remote.search(["a"], 1)
        clock.now += 10.0
        with ThreadPoolExecutor(1) as pool:
            probe = pool.submit(remote.search, ["a"], 1)
            assert arrived.wait(20)
            with pytest.raises(RetrievalError, match="until one search is back"):
                remote.search(["a"], 1)
            go.set()
            assert probe.result().ids == [["a"]]
        assert remote.search(["a"], 1).ids == [["a"]]


# --- to the end of a rollout ------------------------------------------------------------------------------


def test_a_failed_retrieval_becomes_a_notice_and_a_count():
    protocol = PROTOCOLS["search_r1"]
    turn = protocol.parse_turn("<search> lyon </search>")
    with scripted(answer({"detail": "no"}, "500 X"), GOOD) as server:
        environment = SearchEnvironment(RemoteRetriever(server.url, retries=0), protocol, top_k=1)
        with pytest.warns(UserWarning, match=r"retrieval of 1 queries failed: RetrievalError\("):
            (failed,) = environment.respond([turn], [[]], [0], [False])
        (found,) = environment.respond([turn], [[failed.search]], [0], [False])
    assert failed.text == protocol.failed_notice
    assert failed.kind is SpanKind.NOTICE
    assert failed.search == Search(0, "lyon", (), failed=True)
    assert failed.counts == {"failed_retrievals": 1}
    assert found.search == Search(1, "lyon", ("a",))
    assert "Ta" in found.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url is '127.0.0.1:8000'; it must be http://"),
        ({"url": "http://host:port/"}, "url is 'http://host:port/': "),
        ({"url": "http://host/a b"}, "it must be http://"),
        ({"url": "http://me:s3cret@host/"}, "url must have no user name, password or fragment"),
        ({"timeout": 0}, "timeout must be at least 0.001, got 0"),
        ({"timeout": float("inf")}, "timeout must be at least 0.001, got inf"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"breaker": 0}, "breaker must be at least 1, got 0"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"token": "s3cret\n"}, "token must be printable ASCII"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message) as wrong:
        RemoteRetriever(**{"url": UNREACHABLE, **options})
    assert "s3cret" not in str(wrong.value)
