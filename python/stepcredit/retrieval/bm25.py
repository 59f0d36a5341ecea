"""BM25: passages ranked by the words they share with the query. Scores are computed by `bm25s`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcredit.retrieval import Hits, Passage, check_corpus, check_search, collect_hits


class NoIndexableWord(ValueError):
    """A corpus of nothing but stop words, single letters and punctuation."""


class BM25Retriever:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over the titles and texts of a corpus.

    Words are lower-cased runs of two or more word characters, without the language's stop words, stemmed by
    PyStemmer. Scores are sums of term weights, at least 0. A passage that shares no term with the query scores
    exactly 0 and is only returned when fewer than `k` passages share one (in corpus order), so that every query
    has its K hits. Equal scores go to the earlier passage. Without PyStemmer words stay as they are, which
    finds less: a warning says so.

    Args:
        passages: the corpus; ids unique, at least one passage with an indexable word.
        language: stop words and stemmer, by the language's English name.

    Raises:
        ImportError: `bm25s` is not installed.
        NoIndexableWord: a ValueError, of a corpus in which no passage has an indexable word.
        ValueError: empty corpus, repeated id, or a language without stop words or stemmer.

    Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond"; Lu 2024,
    "BM25S: Orders of magnitude faster lexical search via eager sparse scoring".
    """

    def __init__(self, passages: Sequence[Passage], language: str = "english") -> None:
        self._begin(passages, language)
        words = self._tokenize(
            (passage.contents for passage in self.passages),
            stopwords=language,
            stemmer=self._stemmer,
            show_progress=False,
        )
        if not words.vocab:
            raise NoIndexableWord(
                f"passages: none of the {len(self.passages)} passages holds a word that BM25 can index"
            )
        self._index = require_bm25s().BM25(method="lucene", k1=1.5, b=0.75)
        self._index.index(words, show_progress=False)

    @classmethod
    def load(
        cls, directory: Path, passages: Sequence[Passage], *, language: str = "english", stemmed: bool = True
    ) -> BM25Retriever:
        """The retriever whose `save` wrote `directory`, over the same passages; what it weighs stays on disk.

        Raises ValueError where `passages` are not as many, or words can now not be stemmed as they were.
        """
        retriever = cls.__new__(cls)
        retriever._begin(passages, language)
        if retriever.stemmed != stemmed:
            raise ValueError(
                f"{directory} was written {'with' if stemmed else 'without'} PyStemmer, which is now "
                f"{'missing: pip install PyStemmer' if stemmed else 'installed: words would not match'}"
            )
        retriever._index = require_bm25s().BM25.load(directory, mmap=True, show_progress=False)
        count = retriever._index.scores["num_docs"]
        if count != len(passages):
            raise ValueError(f"{directory} indexes {count} passages, not {len(passages)}")
        return retriever

    def save(self, directory: Path) -> None:
        """Write what `load` reads. The passages are not in it."""
        self._index.save(directory, show_progress=False)

    def _begin(self, passages: Sequence[Passage], language: str) -> None:
        self._tokenize = require_bm25s().tokenize
        self.passages = check_corpus(passages)
        self.language = language
        self._stemmer = _stemmer(language)
        self.stemmed = self._stemmer is not None

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The `k` best passages of every query. Errors as in `Retriever.search`."""
        check_search(queries, k)
        width = min(k, len(self.passages))
        scores = np.zeros((len(queries), width), dtype=np.float32)
        rows = np.zeros((len(queries), width), dtype=np.int64)
        words = self._tokenize(
            list(queries), stopwords=self.language, stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        for i, query_words in enumerate(words):
            relevance = self._relevance(query_words)
            rows[i] = _best(relevance, width)
            scores[i] = relevance[rows[i]]
        return collect_hits(self.passages, scores, rows)

    def _relevance(self, words: list[str]) -> NDArray[np.float32]:
        """The score of every passage, [P]."""
        term_ids = self._index.get_tokens_ids(words)
        if not term_ids:
            return np.zeros(len(self.passages), dtype=np.float32)
        relevance: NDArray[np.float32] = self._index.get_scores_from_ids(term_ids)
        return relevance


def require_bm25s() -> Any:
    """The package, or ImportError with the command that installs it."""
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("BM25Retriever needs the package bm25s: pip install 'stepcredit[retrieval]'") from error
    return bm25s


def _stemmer(language: str) -> Any:
    """PyStemmer's stemmer for `language`, or None (with a warning) when PyStemmer is not installed."""
    import bm25s

    try:
        bm25s.tokenize([], stopwords=language, show_progress=False)
    except ValueError as error:
        raise ValueError(f"language is {language!r}, for which bm25s has no stop words") from error
    try:
        import Stemmer
    except ImportError:
        warnings.warn(
            "PyStemmer is not installed, so BM25 matches unstemmed words: pip install 'stepcredit[retrieval]'",
            stacklevel=4,
        )
        return None
    if language not in Stemmer.algorithms():
        raise ValueError(f"language is {language!r}; PyStemmer has {', '.join(sorted(Stemmer.algorithms()))}")
    return Stemmer.Stemmer(language)


def _best(relevance: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the `k` highest scores, best first, equal scores by position.

    Scores are not negative and most are 0, so only the others are ever sorted.
    """
    found = np.flatnonzero(relevance)
    if found.size > k:
        floor = np.partition(relevance[found], -k)[-k]
        found = found[relevance[found] >= floor]
    elif found.size < k:
        found = np.concatenate([found, np.flatnonzero(relevance == 0)[: k - found.size]])
    order = np.argsort(-relevance[found], kind="stable")
    return found[order[:k]]
