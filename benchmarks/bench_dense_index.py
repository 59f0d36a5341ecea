"""Search of the exact index against faiss' `IndexFlatIP`: `pytest benchmarks/bench_dense_index.py`.

Vectors like E5's: of length 1, in clusters, all with much in common: cosines lie between .7 and .9, and the bounds
of 8-bit rows have little room. Queries are passages with noise. Results have to be those of float64, ties by lower row.

faiss multiplies queries by a BLAS only where they are many; few of them go over the vectors one by one. `faiss` is as
it comes, `faiss_blas` always multiplies, and a row whose ratio to both is above 1 is faster whichever way faiss is set
up.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks.measure import DEVICE, interleave
from benchmarks.shapes import SHAPES
from stepcredit.retrieval.index import DenseIndex, DType

try:
    import faiss
except ImportError:
    faiss = None
    warnings.warn("faiss is not installed, so the index is measured without it: pip install faiss-cpu", stacklevel=1)

#: Queries that are checked against float64.
CHECKED_QUERIES = 8
#: Clusters, and how much of a vector is what all share, its cluster's, and its own.
CLUSTERS, SHARES = 2000, (0.75, 0.17, 0.08)


@cache
def vectors_of(passages: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Passages, and queries near some of them."""
    torch.manual_seed(0)

    def directions(count: int) -> torch.Tensor:
        return normalize(torch.randn(count, width))

    common, clusters = directions(1), directions(CLUSTERS)
    shares = [share**0.5 for share in SHARES]
    vectors = torch.empty(passages, width)
    for first in range(0, passages, 1 << 16):
        part = vectors[first : first + (1 << 16)]
        of = torch.randint(CLUSTERS, (len(part),))
        part.copy_(normalize(shares[0] * common + shares[1] * clusters[of] + shares[2] * directions(len(part))))
    near = vectors[torch.randint(passages, (256,))]
    return vectors, normalize(near + 0.2 * directions(256))


@cache
def index_of(passages: int, width: int, dtype: DType) -> DenseIndex:
    return DenseIndex.build(vectors_of(passages, width)[0], dtype)


@cache
def faiss_index(passages: int, width: int) -> Any:
    index = faiss.IndexFlatIP(width)
    index.add(vectors_of(passages, width)[0].numpy())
    return index


def gate(ids: torch.Tensor, queries: torch.Tensor, vectors: torch.Tensor) -> None:
    products = torch.cat([(queries.double() @ part.double().T).float() for part in vectors.split(1 << 16)], 1)
    expected = products.sort(dim=1, descending=True, stable=True)[1][:, : ids.shape[1]]
    assert torch.equal(ids, expected), "hits differ from those of float64"


@pytest.mark.skipif(DEVICE != "cpu", reason="8-bit rows search on the CPU")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("k", [3, 10])
@pytest.mark.parametrize("shape", SHAPES["dense_index"])
def test_dense_index(benchmark: Any, shape: str, k: int, dtype: DType) -> None:
    size = SHAPES["dense_index"][shape]
    passages, width = size["passages"], size["width"]
    vectors, queries = vectors_of(passages, width)
    queries = queries[: size["queries"]].contiguous()
    index = index_of(passages, width, dtype)
    hits = index.search(queries, k)
    gate(hits.ids[:CHECKED_QUERIES], queries[:CHECKED_QUERIES], vectors)  # a wrong result has no speed
    baselines: dict[str, Callable[[], object]] = {}
    if faiss is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        theirs = faiss_index(passages, width)
        asked, threshold = queries.numpy(), faiss.cvar.distance_compute_blas_threshold

        def by_blas() -> None:
            faiss.cvar.distance_compute_blas_threshold = 0
            theirs.search(asked, k)
            faiss.cvar.distance_compute_blas_threshold = threshold

        baselines |= {"faiss": lambda: theirs.search(asked, k), "faiss_blas": by_blas}
    info = benchmark.extra_info
    info["bytes"] = index.nbytes
    info["share_of_float32"] = index.nbytes / vectors.nbytes
    info["rescored"] = float(hits.rescored.double().mean())
    interleave(benchmark, lambda: index.search(queries, k), baselines)
