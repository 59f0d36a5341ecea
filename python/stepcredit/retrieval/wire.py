"""The JSON of Search-R1's `/retrieve`, which the server writes and the client reads.

    POST /retrieve   {"queries": ["who ...", ...], "topk": 3, "return_scores": true}
    200              {"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\ntext"}, "score": 0.8}, ...], ...]}

One list per query, in order, best hit first; `topk` may be left out, null or 0 for the server's own, `return_scores`
may be left out for false. Without scores a list holds the documents themselves. That is what Search-R1's server means
to return, though it answers such a request with an error. Source: Search-R1, search_r1/search/retrieval_server.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from stepcredit._validate import at_least
from stepcredit.retrieval import Passage

#: The hits of one query, best first.
Row = list[tuple[Passage, float]]

_LARGEST = float(np.finfo(np.float32).max)
#: What messages quote of what somebody else wrote, in characters.
_QUOTED = 200
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, _QUOTED, _QUOTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest request that the server takes; the defaults hold a whole training batch of Search-R1.

    Attributes:
        max_bytes: of a request's body.
        max_queries: of a request.
        max_query_chars: of a query.
        max_topk: hits a query.
    """

    max_bytes: int = 16 << 20
    max_queries: int = 8192
    max_query_chars: int = 32_768
    max_topk: int = 100

    def __post_init__(self) -> None:
        at_least(self, "", max_bytes=1, max_queries=1, max_query_chars=1, max_topk=1)


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for, within the limits; queries may be blank."""

    queries: list[str]
    k: int
    return_scores: bool


class BadRequest(Exception):
    """A request that is refused with this status: 400 no JSON object, 413 too large, 422 a field is wrong."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def quoted(value: object) -> str:
    """The value as Python would write it, with most of what is long left out."""
    return _REPR.repr(value)


def check_token(token: str | None) -> None:
    """ValueError, which does not show the token, for one that a header cannot hold."""
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError("token must be printable ASCII without spaces, at least one character, or None")


def parse_request(body: bytes, limits: Limits, default_k: int) -> Request:
    """The request in `body`. Raises BadRequest."""
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the body is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadRequest(400, f"the body must be a JSON object, got {quoted(record)}")
    queries, k, scores = record.get("queries"), record.get("topk"), record.get("return_scores", False)
    if not isinstance(queries, list):
        raise BadRequest(422, f"queries must be a list of strings, got {quoted(queries)}")
    if len(queries) > limits.max_queries:
        raise BadRequest(413, f"queries holds {len(queries)}; a request may hold {limits.max_queries}")
    for position, query in enumerate(queries):
        _check_query(f"queries[{position}]", query, limits.max_query_chars)
    if isinstance(k, bool) or not isinstance(k, int | None) or (k is not None and not 0 <= k <= limits.max_topk):
        raise BadRequest(422, f"topk must be an integer from 1 to {limits.max_topk}, or null, got {quoted(k)}")
    if not isinstance(scores, bool):
        raise BadRequest(422, f"return_scores must be true or false, got {quoted(scores)}")
    return Request(queries, k or default_k, scores)


def _check_query(name: str, query: object, most: int) -> None:
    if not isinstance(query, str):
        raise BadRequest(422, f"{name} must be a string, got {quoted(query)}")
    if len(query) > most:
        raise BadRequest(413, f"{name} has {len(query)} characters; a query may have {most}")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(422, f"{name} is not Unicode text: {error}") from error


def encode_request(queries: Sequence[str], k: int) -> bytes:
    return json.dumps({"queries": list(queries), "topk": k, "return_scores": True}).encode()


def encode_rows(rows: Sequence[Row], return_scores: bool) -> bytes:
    """Elements of `result`, as compact as FastAPI writes them. ValueError for a score that is not finite, and for text
    that is not Unicode."""
    result: list[list[dict[str, Any]]]
    if return_scores:
        result = [[{"document": document_of(passage), "score": score} for passage, score in row] for row in rows]
    else:
        result = [[document_of(passage) for passage, _ in row] for row in rows]
    return json.dumps(result, ensure_ascii=False, allow_nan=False, separators=(",", ":"))[1:-1].encode()


def document_of(passage: Passage) -> dict[str, str]:
    """A passage as in Search-R1's corpora: the quoted title is the first line of the contents. A title of several lines
    is given apart, too, as are then the text's."""
    document = {"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'}
    return {**document, "title": passage.title, "text": passage.text} if "\n" in passage.title else document


def parse_response(body: bytes, count: int, k: int) -> list[Row]:
    """The hits in the answer to `count` queries: at most `k` each, every score finite, none above the one before.

    A server that searches the web gives no scores: if no hit of an answer has one, a hit's score is minus its rank.
    Raises ValueError with a sentence on what is wrong.
    """
    try:
        record = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        start = body[:_QUOTED].decode(errors="replace")
        raise ValueError(f"the answer is not JSON ({error}); it starts {quoted(start)}") from error
    result = record.get("result") if isinstance(record, dict) else None
    if not isinstance(result, list):
        raise ValueError(f"the answer must be an object whose 'result' is a list, got {quoted(record)}")
    if len(result) != count:
        raise ValueError(f"result must have one list for each of {count} queries, got {len(result)}")
    rows = []
    for i, hits in enumerate(result):
        if not isinstance(hits, list) or len(hits) > k:
            raise ValueError(f"result[{i}] must be a list of at most {k} hits, got {quoted(hits)}")
        rows.append([_hit(hit, f"result[{i}][{rank}]") for rank, hit in enumerate(hits)])
    scored = {score is not None for row in rows for _, score in row}
    if len(scored) > 1:
        raise ValueError("some hits of the result have a score and some have none")
    if scored == {False}:
        return [[(passage, -float(rank)) for rank, (passage, _) in enumerate(row, 1)] for row in rows]
    return [_ordered(row, i) for i, row in enumerate(rows)]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _hit(hit: object, where: str) -> tuple[Passage, float | None]:
    if not isinstance(hit, dict):
        raise ValueError(f"{where} must be an object, got {quoted(hit)}")
    score = hit.get("score")
    if score is not None:
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not -_LARGEST <= score <= _LARGEST:
            raise ValueError(f"{where}.score must be a finite float32 number, got {quoted(score)}")
        score = float(score)
    return passage_of(hit.get("document"), f"{where}.document"), score


def _ordered(row: list[tuple[Passage, float | None]], i: int) -> Row:
    ordered: Row = []
    best = math.inf
    for rank, (passage, score) in enumerate(row):
        assert score is not None
        if score > best:
            raise ValueError(f"result[{i}][{rank}].score is {score}, above {best} of the hit before it")
        best = score
        ordered.append((passage, score))
    return ordered


def passage_of(document: object, where: str) -> Passage:
    """The passage of a document: its `title` and `text`, or else its `contents`, whose first line is the title, quoted
    or not; contents of one line have no title. Without an `id` the passage is named after a digest of what it says, so
    that it is the same passage each time. Raises ValueError."""
    if not isinstance(document, dict):
        raise ValueError(f"{where} must be an object, got {quoted(document)}")
    title, text, contents = document.get("title"), document.get("text"), document.get("contents")
    if not isinstance(title, str) or not isinstance(text, str):
        if not isinstance(contents, str):
            raise ValueError(f"{where} must have a string 'contents', or 'title' and 'text', got {quoted(document)}")
        title, text = _split(contents)
    name = document.get("id")
    if name is None:
        name = "sha256:" + hashlib.sha256(f"{title}\n{text}".encode(errors="surrogatepass")).hexdigest()[:32]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"{where}.id must be a string or an integer, got {quoted(name)}")
    try:
        f"{name}{title}{text}".encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not Unicode text: {error}") from error
    return Passage(str(name), title, text)


def _split(contents: str) -> tuple[str, str]:
    title, newline, text = contents.partition("\n")
    if not newline:
        return "", contents
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title, text
