"""Vectors as 8-bit rows that bound every inner product, so that few passages need their full precision.

A passage x is kept as x = c + s a + e: the centre c of the corpus, integers a in [-127, 127] with a scale s, and the
length of what is left out, |e|. With a query kept as q = t b + f likewise::

    |q.(x - c) - s t a.b|  <=  |q| |e| + |f| |s a|          (Cauchy-Schwarz, twice)

The centre adds the same q.c to every passage and changes no rank; the vectors of encoders such as E5 have much of their
length in common, which is then not rounded. Bounds are rounded outwards, and the ranks are those of the inner products
summed in double and rounded to float32, equal scores by lower row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepcredit.retrieval._vectors import SLICE, parts

#: Passages of a block, components of a group: the layout of `QuantizeParams` in csrc/params.h.
BLOCK, GROUP = 64, 4

#: Ways to multiply on this machine, by what `_C.int8_path` says, and the highest integer of a query for each.
LEVELS = {0: 127, 1: 63, 2: 127}

#: The same for a first, coarse product that leaves few blocks to the fine one, and from how many queries on there is
#: one. By AVX2 alone, where smaller integers need less widening; fewer queries wait for memory, whatever is multiplied.
COARSE_LEVELS, COARSE_QUERIES = {1: 32}, 16


class DenseHits(NamedTuple):
    """Hits of Q queries, best first, equal scores by lower row.

    Attributes:
        scores: float32 [Q, K], inner products.
        ids: int64 [Q, K], rows.
        rescored: int64 [Q], rows whose inner product was computed from the vectors themselves.
    """

    scores: Tensor
    ids: Tensor
    rescored: Tensor


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """P vectors of width D as 8-bit rows, on the CPU.

    Attributes:
        rows: uint8 [blocks, groups, 64, 4], integers + 128: component 4 g + i of row 64 b + r is [b, g, r, i].
        scale, error, norm: float32 [blocks * 64], s, |e| and |s a| of each row; 0 after the last.
        centre: float32 [D].
        num_rows: P.
    """

    rows: Tensor
    scale: Tensor
    error: Tensor
    norm: Tensor
    centre: Tensor
    num_rows: int

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return sum(t.nbytes for t in (self.rows, self.scale, self.error, self.norm, self.centre))

    @classmethod
    def empty(cls, num_rows: int, centre: Tensor) -> Int8Rows:
        """Room for this many rows, for `quantize_into`."""
        blocks, groups = -(-num_rows // BLOCK), -(-len(centre) // GROUP)
        rows = torch.empty(blocks, groups, BLOCK, GROUP, dtype=torch.uint8)
        scale, error, norm = (torch.empty(blocks * BLOCK) for _ in range(3))
        return cls(rows, scale, error, norm, centre.contiguous(), num_rows)

    def quantize_into(self, first: int, vectors: Tensor) -> None:
        """Quantizes float32 vectors [n, D] into the rows from `first`, a multiple of 64; n is one too, unless these are
        the last rows."""
        from stepcredit import _C

        block = first // BLOCK
        _C.quantize_cpu(
            vectors=vectors.contiguous().data_ptr(),
            centre=self.centre.data_ptr(),
            rows=self.rows[block:].data_ptr(),
            scale=self.scale[first:].data_ptr(),
            error=self.error[first:].data_ptr(),
            norm=self.norm[first:].data_ptr(),
            num_passages=vectors.shape[0],
            width=vectors.shape[1],
            groups=self.rows.shape[1],
            threads=torch.get_num_threads(),
        )


def quantize(vectors: Tensor) -> Int8Rows:
    """Float32 vectors [P, D] on the CPU as 8-bit rows; mapped ones are read once, slice by slice."""
    out = Int8Rows.empty(len(vectors), vectors[:SLICE].double().mean(0).float())
    for first, part in parts(vectors):
        out.quantize_into(first, part)
    return out


class _Queries(NamedTuple):
    """What `quantize_queries` says, and 128 times the sum of each query's integers, int32 [Q]."""

    rows: Tensor
    scale: Tensor
    error: Tensor
    offset: Tensor

    @classmethod
    def of(cls, queries: Tensor, levels: int, width: int) -> _Queries:
        rows, scale, error = quantize_queries(queries, levels, width)
        return cls(rows, scale, error, (128 * rows.sum(1, dtype=torch.int64)).to(torch.int32))

    @property
    def pointers(self) -> tuple[int, int, int, int]:
        return self.rows.data_ptr(), self.scale.data_ptr(), self.error.data_ptr(), self.offset.data_ptr()


def certified_search(
    queries: Tensor, rows: Int8Rows, vectors: Tensor | None, k: int, *, path: int | None = None
) -> DenseHits:
    """The k rows of largest inner product.

    Args:
        queries: float32 [Q, D], finite, contiguous.
        rows: what `vectors` were quantized to.
        vectors: float32 [P, D], contiguous; may be mapped from a file, of which little is read. None: rank by the
            8-bit products alone, which is not exact.
        k: 1 to P.
        path: how to multiply (`LEVELS`); None is the fastest that this processor has.
    """
    from stepcredit import _C

    path = _C.int8_path if path is None else path
    exact, padded = queries.double(), rows.rows.shape[1] * GROUP
    fine = _Queries.of(exact, LEVELS[path], padded)
    coarse = None
    if vectors is not None and path in COARSE_LEVELS and len(queries) >= COARSE_QUERIES:
        coarse = _Queries.of(exact, COARSE_LEVELS[path], padded)
    mean, norm = (exact @ rows.centre.double()).float(), round_up(exact.norm(dim=1))
    count = queries.shape[0]
    scores = torch.empty(count, k)
    ids, rescored = torch.empty(count, k, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    _C.certified_search_cpu(
        rows=rows.rows.data_ptr(),
        scale=rows.scale.data_ptr(),
        error=rows.error.data_ptr(),
        norm=rows.norm.data_ptr(),
        queries=fine.pointers,
        coarse=coarse.pointers if coarse else (0, 0, 0, 0),
        query_norm=norm.data_ptr(),
        query_mean=mean.data_ptr(),
        exact_queries=queries.data_ptr(),
        vectors=0 if vectors is None else vectors.data_ptr(),
        scores=scores.data_ptr(),
        ids=ids.data_ptr(),
        rescored=rescored.data_ptr(),
        num_queries=count,
        num_passages=rows.num_rows,
        width=queries.shape[1],
        groups=rows.rows.shape[1],
        k=k,
        exact=vectors is not None,
        path=path,
        threads=torch.get_num_threads(),
    )
    return DenseHits(scores, ids, rescored)


def exact_scores(queries: Tensor, vectors: Tensor, ids: Tensor) -> Tensor:
    """Inner products [Q, n] of float32 queries [Q, D] with rows `ids` [Q, n] of float32 vectors [P, D], summed in
    double in a fixed order and rounded to float32. All contiguous, on the CPU."""
    from stepcredit import _C

    scores = torch.empty(ids.shape)
    _C.exact_scores_cpu(
        queries=queries.data_ptr(),
        vectors=vectors.data_ptr(),
        ids=ids.data_ptr(),
        scores=scores.data_ptr(),
        num_queries=ids.shape[0],
        count=ids.shape[1],
        width=queries.shape[1],
        threads=torch.get_num_threads(),
    )
    return scores


def quantize_queries(queries: Tensor, levels: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of float64 [Q, D]: int8 [Q, width] (zeros after D), scale [Q], at least the length of what is left out [Q]."""
    scale = (queries.abs().amax(1) / levels).float()
    steps = scale.double()[:, None]
    whole = torch.where(steps > 0, queries / steps, 0.0).round().clamp(-levels, levels)
    integers = torch.zeros(queries.shape[0], width, dtype=torch.int8, device=queries.device)
    integers[:, : queries.shape[1]] = whole.to(torch.int8)
    return integers, scale, round_up((queries - whole * steps).norm(dim=1))


def round_up(lengths: Tensor) -> Tensor:
    """float32, at least these float64 lengths."""
    rounded = (lengths * (1 + 1e-12)).float()
    return torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
