"""Dense retrieval: passages ranked by the inner product of their vectors with the query's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stepcredit.retrieval import Hits, Passage, check_corpus, check_search, collect_hits
from stepcredit.retrieval.encoder import Encoder
from stepcredit.retrieval.index import DenseIndex
from stepcredit.retrieval.int8 import DenseHits


class VectorIndex(Protocol):
    """What finds vectors: `index.DenseIndex`, `sharded.ShardedIndex`, `faiss.FaissIndex`."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def device(self) -> torch.device:
        """Where queries have to be."""
        ...

    def search(self, queries: Tensor, k: int) -> DenseHits:
        """The min(k, P) rows of largest inner product with each of the float32 queries [Q, D]."""
        ...


class DenseRetriever:
    """An encoder and an index of a corpus.

    Args:
        passages: the corpus; ids unique, at least one passage.
        encoder: encodes the queries, and the passages unless `index` is given.
        index: of the passages' vectors, row by row; None: an exact one in memory, of what the encoder makes of the
            passages, which takes minutes for a large corpus.
        progress: called with the number of passages encoded since its last call.

    Raises:
        ValueError: empty corpus, repeated id, or an index that does not fit `passages` and `encoder`.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        encoder: Encoder,
        *,
        index: VectorIndex | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.passages = check_corpus(passages)
        self.encoder = encoder
        expected = (len(self.passages), encoder.width)
        if index is not None and (len(index), index.width) != expected:
            raise ValueError(
                f"index has {len(index)} rows of {index.width}; these passages and encoder need {expected}"
            )
        self.index: VectorIndex = index or DenseIndex.build(encoder.encode_passages(self.passages, progress))

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The `k` best passages of every query; scores are inner products. Errors as in `Retriever.search`."""
        check_search(queries, k)
        hits = self.index.search(self.encoder.encode_queries(queries).to(self.index.device), k)
        return collect_hits(self.passages, hits.scores.cpu().numpy(), hits.ids.cpu().numpy())
