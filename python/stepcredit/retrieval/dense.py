"""Dense retrieval: passages ranked by the inner product of their vectors with the query's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from stepcredit.retrieval import Hits, Passage, check_corpus, check_search, collect_hits
from stepcredit.retrieval.encoder import Encoder
from stepcredit.retrieval.index import DenseIndex


class DenseRetriever:
    """An encoder and an exact index over a corpus.

    Args:
        passages: the corpus; ids unique, at least one passage.
        encoder: encodes the queries, and the passages unless `vectors` is given.
        vectors: [P, D] float32, what `encoder.encode_passages(passages)` returned earlier; encoding a corpus takes
            minutes, so keep it (`retriever.index.vectors`).
        progress: called with the number of passages encoded since its last call.

    Raises:
        ValueError: empty corpus, repeated id, or `vectors` that do not fit `passages` and `encoder`.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        encoder: Encoder,
        *,
        vectors: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.passages = check_corpus(passages)
        self.encoder = encoder
        expected = (len(self.passages), encoder.width)
        if vectors is None:
            vectors = encoder.encode_passages(self.passages, progress)
        elif tuple(vectors.shape) != expected:
            raise ValueError(f"vectors has shape {tuple(vectors.shape)}; these passages and encoder need {expected}")
        self.index = DenseIndex(vectors)

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The `k` best passages of every query; scores are inner products. Errors as in `Retriever.search`."""
        check_search(queries, k)
        scores, rows = self.index.search(self.encoder.encode_queries(queries).to(self.index.vectors.device), k)
        return collect_hits(self.passages, scores.cpu().numpy(), rows.cpu().numpy())
