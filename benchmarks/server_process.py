"""The servers of `bench_server`, each a process: `python -m benchmarks.server_process KIND PORT PASSAGES WIDTH`.

`ours` is `stepcredit.retrieval.server`, `faulty` the same behind injected errors, and `plain` a server of the structure
that Search-R1's has: a synchronous handler that searches a request by itself, a round trip through NumPy a batch, a
lookup a hit. It searches one request at a time, as a GPU does, since on a CPU its forty threads would fight for the
cores. All have one engine, one corpus and one stand-in for an encoder. It says "PORT <number>" when it listens.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from stepcredit import topk_search
from stepcredit.retrieval import Passage
from stepcredit.retrieval.dense import DenseRetriever
from stepcredit.retrieval.index import DenseIndex
from stepcredit.retrieval.server import create_app, listen, server_of
from stepcredit.retrieval.wire import document_of

#: Shares of the requests that `faulty` answers with 500, or so late that a client has given up.
ERRORS, LATE = 0.10, 0.03
LATE_SECONDS = 6.0

#: A hundred words, as a passage of Wikipedia has.
_WORDS = "the river that runs through an old town of the plain " * 9


class HashEncoder:
    """Whole numbers drawn by a hash of the text: inner products of them are exact in float32, whatever the order of
    their sums, so that every server must find the same passages with the same scores."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode_queries(self, queries: Sequence[str]) -> torch.Tensor:
        vectors = np.empty((len(queries), self.width), dtype=np.float32)
        for row, query in zip(vectors, queries, strict=True):
            seed = int.from_bytes(hashlib.blake2b(query.encode(), digest_size=8).digest(), "little")
            row[:] = np.random.default_rng(seed).integers(-8, 9, self.width)
        return torch.from_numpy(vectors)


def build_retriever(passages: int, width: int) -> DenseRetriever:
    """The engine of all servers, and of the direct searches that their answers are compared with."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randint(-8, 9, (passages, width), generator=generator, dtype=torch.int8).float()
    corpus = [Passage(str(i), f"Town {i}", f"{i}: {_WORDS}") for i in range(passages)]
    encoder: Any = HashEncoder(width)  # as much of an Encoder as a search needs
    return DenseRetriever(corpus, encoder, index=DenseIndex.build(vectors))


class Asked(BaseModel):
    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


def plain_app(retriever: DenseRetriever) -> FastAPI:
    app = FastAPI()
    one = threading.Lock()

    @app.post("/retrieve")
    def retrieve(asked: Asked) -> Any:
        vectors = retriever.encoder.encode_queries(asked.queries).numpy()
        with one:
            found = topk_search(torch.from_numpy(vectors), retriever.index.vectors, asked.topk or 3)
        scores, rows = (values.numpy().tolist() for values in found)
        result = []
        for line, own in zip(rows, scores, strict=True):
            documents = [document_of(retriever.passages[row]) for row in line]
            result.append([{"document": d, "score": s} for d, s in zip(documents, own, strict=True)])
        return {"result": result}

    return app


class Faulty:
    """An application some of whose answers are errors or late."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        chance = random.random() if scope.get("path") == "/retrieve" else 1.0
        if chance < ERRORS:
            await send({"type": "http.response.start", "status": 500, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        if chance < ERRORS + LATE:
            await asyncio.sleep(LATE_SECONDS)
        await self.app(scope, receive, send)


def main(kind: str, port: str, passages: str, width: str) -> None:
    retriever = build_retriever(int(passages), int(width))
    with listen("127.0.0.1", int(port)) as opened:
        if kind == "plain":
            server = uvicorn.Server(uvicorn.Config(plain_app(retriever), log_level="warning", access_log=False))
        else:
            app: Any = create_app(retriever)
            server = server_of(app if kind == "ours" else Faulty(app))
        print(f"PORT {opened.getsockname()[1]}", flush=True)
        server.run(sockets=[opened])


if __name__ == "__main__":
    main(*sys.argv[1:])
