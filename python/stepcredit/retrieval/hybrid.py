"""Several retrievers as one: passages ranked by where each retriever ranks them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stepcredit.retrieval import Hits, Passage, Retriever, check_search, ragged_hits
from stepcredit.retrieval.wire import Row

#: What is added to a rank before its reciprocal is taken: the value of Cormack et al. 2009.
RANK_CONSTANT = 60


class HybridRetriever:
    """Reciprocal rank fusion: a passage's score is the sum, over the retrievers that find it, of 1 / (60 + rank), where
    the best rank is 1. Scores of different engines, which have no common unit, do not matter.

    Passages with one id are one passage, shown as the first of the retrievers that found it has it. Equal scores go to
    the passage with the best single rank, and then to the earlier retriever.

    Args:
        retrievers: at least one, asked one after another.
        depth: hits that each is asked for, or `k` when that is more: a passage that only one retriever ranks high
            should still meet the ranks that the others give it.

    A retriever that raises RetrievalError fails the search: a fusion of fewer would be another engine.

    Raises:
        ValueError: no retriever, or `depth` below 1.

    Source: Cormack, Clarke and Büttcher 2009, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank
    Learning Methods", SIGIR.
    """

    def __init__(self, retrievers: Sequence[Retriever], *, depth: int = 100) -> None:
        if not retrievers:
            raise ValueError("retrievers is empty: fusion needs at least one")
        if depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1")
        self.retrievers = list(retrievers)
        self.depth = depth

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The `k` best passages of every query. Errors as in `Retriever.search`."""
        check_search(queries, k)
        found = [retriever.search(queries, max(k, self.depth)).passages for retriever in self.retrievers]
        return ragged_hits([fuse(lists)[:k] for lists in zip(*found, strict=True)], k)


def fuse(lists: Sequence[Sequence[Passage]]) -> Row:
    """The passages of several rankings, and their scores, in the fused order; of a passage that one ranking holds twice
    the first counts."""
    ranks: dict[str, dict[int, int]] = {}
    passages: dict[str, Passage] = {}
    for i, ranking in enumerate(lists):
        for rank, passage in enumerate(ranking, 1):
            passages.setdefault(passage.id, passage)
            ranks.setdefault(passage.id, {}).setdefault(i, rank)
    # fsum rounds once, so that equal sums are equal whatever the order of their terms.
    scores = {name: math.fsum(1 / (RANK_CONSTANT + rank) for rank in own.values()) for name, own in ranks.items()}
    best = {name: min((rank, i) for i, rank in own.items()) for name, own in ranks.items()}
    order = sorted(ranks, key=lambda name: (-scores[name], best[name]))
    return [(passages[name], scores[name]) for name in order]
