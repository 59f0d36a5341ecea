"""Reciprocal rank fusion: scores, ties, and passages that several retrievers find."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stepcredit.retrieval import Passage, RetrievalError, Retriever, ragged_hits
from stepcredit.retrieval.bm25 import BM25Retriever
from stepcredit.retrieval.hybrid import RANK_CONSTANT, HybridRetriever


class Ranked:
    """Ranks the same for every query."""

    def __init__(self, names, text="x"):
        self.names, self.text, self.asked = names, text, []

    def search(self, queries, k):
        self.asked.append((list(queries), k))
        row = [(Passage(name, name.upper(), self.text), -float(i)) for i, name in enumerate(self.names[:k])]
        return ragged_hits([row] * len(queries), k)


def fused(*rankings, k=10, **options):
    hits = HybridRetriever([Ranked(names) for names in rankings], **options).search(["q"], k)
    return hits.ids[0], hits.scores[0]


def test_scores_are_sums_of_reciprocal_ranks():
    ids, scores = fused("abc", "bd")
    assert ids == ["b", "a", "d", "c"]
    expected = [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63]
    np.testing.assert_array_equal(scores, np.array(expected, np.float32))
    assert RANK_CONSTANT == 60


def test_ties_go_to_the_best_single_rank_and_then_to_the_earlier_retriever():
    assert fused("ab", "ba")[0] == ["a", "b"]
    assert fused("ba", "ab")[0] == ["b", "a"]
    assert fused("ab", "cd")[0] == ["a", "c", "b", "d"]
    for rankings in itertools.permutations(["abc", "bca", "cab"]):
        ids, scores = fused(*rankings)
        assert ids == [names[0] for names in rankings]
        assert len(set(scores.tolist())) == 1


def test_the_order_in_which_ranks_are_summed_makes_no_difference():
    """From left to right ranks 2, 1, 7 of a sum to the double above that of 1, 7, 2 of b, which wins the tie."""
    ids, scores = fused("ba", "a01234b", "5b6789a", k=2)
    assert ids == ["b", "a"]
    assert scores[0] == scores[1]


def test_equal_ids_are_one_passage_as_the_first_retriever_has_it():
    hybrid = HybridRetriever([Ranked("a", "first"), Ranked("ba", "second")])
    hits = hybrid.search(["q"], 5)
    assert hits.passages == [[Passage("a", "A", "first"), Passage("b", "B", "second")]]
    assert fused("aab", "c")[0] == ["a", "c", "b"]  # twice in one ranking counts once


def test_each_retriever_is_asked_once_for_all_queries_and_deeper_than_k():
    engines = [Ranked("abc"), Ranked("cab")]
    hybrid = HybridRetriever(engines, depth=5)
    assert isinstance(hybrid, Retriever)
    hits = hybrid.search(["p", "q"], 2)
    assert hits.scores.shape == (2, 2)
    assert hits.ids == [["a", "c"]] * 2
    hybrid.search(["r"], 7)
    assert [engine.asked for engine in engines] == [[(["p", "q"], 5), (["r"], 7)]] * 2
    assert fused("abcd", "dcba", k=1, depth=1)[0] == ["a"]


def test_more_hits_are_the_same_hits_and_more():
    passages = [Passage(f"{i}", f"t{i % 5}", f"word{i % 3} word{i % 7} word{i % 11}") for i in range(40)]
    hybrid = HybridRetriever([BM25Retriever(passages), BM25Retriever(passages[::-1])])
    queries = ["word1 word4", "word2 word9 t3"]
    longest = hybrid.search(queries, 40)
    assert [sorted(row, key=int) for row in longest.ids] == [[f"{i}" for i in range(40)]] * 2
    assert (np.diff(longest.scores, axis=1) <= 0).all()
    for k in (1, 3, 20):
        hits = hybrid.search(queries, k)
        assert hits.ids == [row[:k] for row in longest.ids]
        np.testing.assert_array_equal(hits.scores, longest.scores[:, :k])


def test_no_queries():
    hits = HybridRetriever([Ranked("abc")]).search([], 3)
    assert hits.scores.shape == (0, 3)
    assert hits.ids == hits.passages == []


def test_a_retriever_that_fails_fails_the_search():
    class Failing:
        def search(self, queries, k):
            raise RetrievalError("not reached")

    with pytest.raises(RetrievalError, match="not reached"):
        HybridRetriever([Ranked("a"), Failing()]).search(["q"], 1)


def test_bad_input():
    with pytest.raises(ValueError, match="retrievers is empty"):
        HybridRetriever([])
    with pytest.raises(ValueError, match="depth is 0; it must be at least 1"):
        HybridRetriever([Ranked("a")], depth=0)
    with pytest.raises(ValueError, match=r"queries\[0\] is blank"):
        HybridRetriever([Ranked("a")]).search([" "], 1)
