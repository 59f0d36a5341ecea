"""A retrieval server that speaks Search-R1's `/retrieve`: `python -m stepcredit.retrieval serve`, or `create_app`."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stepcredit._validate import require
from stepcredit.retrieval import Retriever
from stepcredit.retrieval._batcher import Batcher, Busy, Job
from stepcredit.retrieval._metrics import Gauge, ServerMetrics
from stepcredit.retrieval.wire import BadRequest, Limits, Row, check_token, encode_rows, parse_request

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
except ImportError as error:
    raise ImportError("the retrieval server needs FastAPI and uvicorn: pip install 'stepcredit[server]'") from error

#: Seconds that a client has for sending a request's body.
BODY_SECONDS = 30.0
#: What Retry-After says, in seconds: by then the queue has moved on or the client waits again, longer.
RETRY_SECONDS = 1
#: Rows of an answer that are written at a time.
_ROWS = 128

_LOG = logging.getLogger(__name__)


def create_app(
    retriever: Retriever,
    *,
    topk: int = 3,
    limits: Limits | None = None,
    max_batch: int = 256,
    max_wait: float = 0.002,
    max_queue: int = 16_384,
    drain_seconds: float = 30.0,
    token: str | None = None,
) -> FastAPI:
    """The server as an ASGI application, for uvicorn with one worker.

    * `POST /retrieve`: Search-R1's contract (see `wire`). Queries of all requests are searched in batches, by one
      thread. A blank query, which no engine takes, is answered with no hit, and counted.
    * `GET /health`: 200 while searches are taken, else 503. `GET /metrics`: counters for Prometheus.
    * An error is `{"detail": "a sentence"}`: 400 no JSON, 401 wrong token, 408 a body that does not come, 413 too
      large, 422 a wrong field, 500 the engine raised, 503 the queue is full or the server is shutting down (with
      Retry-After).

    Args:
        retriever: what is searched, by one thread.
        topk: hits a query of a request that does not say.
        limits: the largest request; None for the defaults of `Limits`.
        max_batch, max_wait, max_queue: as for `Batcher`; `max_queue` holds at least one request of `limits`.
        drain_seconds: at shutdown, how long what waits is still searched.
        token: required as `Authorization: Bearer <token>` by everything but /health; None for no token.

    Raises:
        ValueError: a number out of its range, or a token that no header can hold.
    """
    limits = limits or Limits()
    require(1 <= topk <= limits.max_topk, "topk", f"from 1 to {limits.max_topk}, the limit", topk)
    require(max_batch >= 1, "max_batch", "at least 1", max_batch)
    require(0 <= max_wait < math.inf, "max_wait", "finite and at least 0", max_wait)
    least = f"at least {limits.max_queries}, the queries that a request may hold"
    require(max_queue >= limits.max_queries, "max_queue", least, max_queue)
    require(0 <= drain_seconds < math.inf, "drain_seconds", "finite and at least 0", drain_seconds)
    check_token(token)
    metrics = ServerMetrics()
    batcher = Batcher(retriever, metrics, max_batch=max_batch, max_wait=max_wait, max_queue=max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close, drain_seconds)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def authorised(request: Request) -> bool:
        given = request.headers.get("authorization", "")
        return token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

    @app.post("/retrieve")
    async def retrieve(request: Request) -> Response:
        began = time.monotonic()
        response = await _retrieve(request, batcher, limits, topk) if authorised(request) else _unauthorised()
        metrics.requests.add(value=str(response.status_code))
        metrics.request_seconds.observe(time.monotonic() - began)
        return response

    @app.get("/health")
    async def health() -> Response:
        return _json(200, status="ok") if batcher.alive else _json(503, status="not taking searches")

    @app.get("/metrics")
    async def show_metrics(request: Request) -> Response:
        if not authorised(request):
            return _unauthorised()
        waiting = Gauge("stepcredit_retrieval_queue_queries", "Queries that wait for a batch.", lambda: batcher.depth)
        return Response(metrics.text(waiting), media_type="text/plain; version=0.0.4")

    return app


async def _retrieve(request: Request, batcher: Batcher, limits: Limits, topk: int) -> Response:
    try:
        body = await asyncio.wait_for(_body(request, limits.max_bytes), BODY_SECONDS)
        asked = parse_request(body, limits, topk)
    except BadRequest as error:
        return _json(error.status, detail=str(error))
    except asyncio.TimeoutError:  # before Python 3.11 it is not the built-in one
        return _json(408, detail=f"the body did not arrive within {BODY_SECONDS:g} seconds")
    except _Gone:
        return Response(status_code=499)
    worded = [query for query in asked.queries if query.strip()]
    try:
        job = batcher.submit(worded, asked.k)
    except Busy as error:
        return _json(503, {"Retry-After": str(RETRY_SECONDS)}, detail=str(error))
    try:
        found = iter(await _while_connected(request, job, batcher))
    except _Gone:
        return Response(status_code=499)
    except Exception as error:  # an engine may raise anything, which the batcher has logged
        return _failed(error)
    try:
        body = await _encoded([next(found) if query.strip() else [] for query in asked.queries], asked.return_scores)
    except ValueError as error:
        _LOG.error("hits that JSON cannot hold", exc_info=error)
        return _failed(error)
    batcher.metrics.queries.add(len(asked.queries))
    batcher.metrics.blank_queries.add(len(asked.queries) - len(worded))
    return Response(body, media_type="application/json")


class _Gone(Exception):
    """The client left."""


async def _body(request: Request, most: int) -> bytes:
    too_large = BadRequest(413, f"the body is larger than {most} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > most:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


async def _while_connected(request: Request, job: Job, batcher: Batcher) -> list[Row]:
    """The hits of a job. Once its client has left it is not searched: clients that time out and ask again would
    otherwise fill the queue with searches that nobody waits for. Raises _Gone."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    found = asyncio.wrap_future(job.future)
    watch = asyncio.ensure_future(left())
    try:
        await asyncio.wait((found, watch), return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            raise _Gone
        return found.result()
    finally:
        watch.cancel()
        if not job.future.done():
            batcher.abandon(job)


async def _encoded(rows: list[Row], return_scores: bool) -> bytes:
    """The body of an answer; between the parts of a large one other requests get their turn."""
    parts = []
    for start in range(0, len(rows), _ROWS):
        parts.append(encode_rows(rows[start : start + _ROWS], return_scores))
        await asyncio.sleep(0)
    return b'{"result":[' + b",".join(parts) + b"]}"


def _failed(error: Exception) -> Response:
    return _json(500, detail=f"the search failed ({type(error).__name__}); the server's log says why")


def _unauthorised() -> Response:
    return _json(401, {"WWW-Authenticate": "Bearer"}, detail="this server needs its token as Authorization: Bearer ...")


def _json(status: int, headers: dict[str, str] | None = None, /, **fields: str) -> Response:
    return Response(json.dumps(fields), status, headers, media_type="application/json")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. OSError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def server_of(app: FastAPI, *, drain_seconds: float = 30.0) -> uvicorn.Server:
    """uvicorn for the application: `.run(sockets=[listen(host, port)])` serves until SIGINT or SIGTERM (or, in another
    thread, until `.should_exit`), then takes no connection, answers what was asked, and returns."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=75,  # longer than a policy generates between two searches
            timeout_graceful_shutdown=max(1, round(drain_seconds)),
        )
    )
