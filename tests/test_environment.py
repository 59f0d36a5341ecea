from __future__ import annotations

import numpy as np
import pytest

from stepcredit.environments import Response, SearchEnvironment
from stepcredit.protocol import PROTOCOLS
from stepcredit.retrieval import Hits, Passage, RetrievalError
from stepcredit.rollout import Search, SpanKind

PROTOCOL = PROTOCOLS["refine"]
SEARCH = PROTOCOL.parse_turn("<search> lyon </search>")
EMPTY = PROTOCOL.parse_turn("<search>  </search>")
ANSWER = PROTOCOL.parse_turn("<answer>Rome</answer>")
INVALID = PROTOCOL.parse_turn("hm")


class Echo:
    """Finds one passage per wanted hit, titled by the query; remembers its calls."""

    def __init__(self, fail: bool = False, found: bool = True) -> None:
        self.calls: list[tuple[list[str], int]] = []
        self.fail, self.found = fail, found

    def search(self, queries, k):
        self.calls.append((list(queries), k))
        if self.fail:
            raise RetrievalError("no route")
        rows = [[Passage(f"{q}{i}", q.title(), f"about {q} one two three") for i in range(k)] for q in queries]
        rows = rows if self.found else [[] for _ in rows]
        scores = np.ones((len(rows), k if self.found else 0), np.float32)
        return Hits(scores, [[p.id for p in row] for row in rows], rows)


def environment(retriever=None, **kwargs):
    return SearchEnvironment(retriever or Echo(), PROTOCOL, **kwargs)


def executed(count):
    return [Search(step, "x", (f"x{step}",)) for step in range(count)]


def one(env, turn, searches=0, faults=0, forced=False):
    return env.respond([turn], [executed(searches)], [faults], [forced])[0]


def test_one_batched_call_serves_all_rollouts():
    echo = Echo()
    paris = PROTOCOL.parse_turn("<search>paris</search>")
    turns = [SEARCH, ANSWER, paris, INVALID, EMPTY, SEARCH]
    env = environment(echo, top_k=2, max_searches=3)
    responses = env.respond(turns, [executed(n) for n in (0, 0, 1, 0, 0, 3)], [0] * 6, [False] * 6)
    assert echo.calls == [(["lyon", "paris"], 2)]
    assert responses[0] == Response(
        "\n<documents>\nLyon: about lyon one two three\nLyon: about lyon one two three\n</documents>\n",
        SpanKind.DOCUMENTS,
        Search(0, "lyon", ("lyon0", "lyon1")),
    )
    assert responses[1] == Response(done=True)
    assert responses[2].search == Search(1, "paris", ("paris0", "paris1"))
    assert responses[3] == Response(PROTOCOL.invalid_notice, fault=True, counts={"invalid_turns": 1})
    assert responses[4] == Response(PROTOCOL.empty_query_notice, fault=True, counts={"empty_queries": 1})
    assert responses[5] == Response(PROTOCOL.exhausted_notice, fault=True, counts={"excess_searches": 1})


def test_no_call_without_a_query():
    echo = Echo()
    environment(echo).respond([ANSWER, INVALID, EMPTY], [[]] * 3, [0] * 3, [False] * 3)
    assert environment(echo).respond([], [], [], []) == []
    assert echo.calls == []


def test_the_last_search_forces_the_answer():
    response = one(environment(max_searches=2), SEARCH, searches=1)
    assert response.kind is SpanKind.DOCUMENTS
    assert response.search is not None
    assert response.forced_answer
    assert response.counts == {"forced_answers": 1}
    assert not one(environment(max_searches=2), SEARCH, searches=0).forced_answer
    assert not one(environment(max_searches=2, force_answer=False), SEARCH, searches=1).forced_answer


def test_faults_force_the_answer_or_end_the_rollout():
    for turn, name in ((INVALID, "invalid_turns"), (EMPTY, "empty_queries")):
        env = environment(max_invalid=1)
        assert not one(env, turn, faults=0).forced_answer
        response = one(env, turn, faults=1)
        assert (response.forced_answer, response.fault, response.done) == (True, True, False)
        assert response.counts == {name: 1, "forced_answers": 1}
        assert one(environment(max_invalid=0), turn).forced_answer
        assert one(environment(max_invalid=0, force_answer=False), turn) == Response(
            done=True, fault=True, counts={name: 1}
        )


def test_after_a_forced_opener_the_rollout_ends():
    env = environment()
    assert one(env, PROTOCOL.parse_turn("Rome</answer>", True), forced=True) == Response(done=True)
    assert one(env, PROTOCOL.parse_turn("Rome", True), forced=True).done
    assert one(env, ANSWER, forced=True).done


def test_an_empty_answer_ends_the_rollout_and_is_counted():
    response = one(environment(), PROTOCOL.parse_turn("<answer> </answer>"))
    assert response == Response(done=True, counts={"empty_answers": 1})


def test_failed_retrieval_is_said_counted_and_survived():
    env = environment(Echo(fail=True), max_searches=2)
    with pytest.warns(UserWarning, match=r"retrieval of 2 queries failed: RetrievalError\('no route'\)"):
        responses = env.respond([SEARCH, ANSWER, SEARCH], [[], [], executed(1)], [0] * 3, [False] * 3)
    assert responses[0] == Response(
        PROTOCOL.failed_notice,
        SpanKind.NOTICE,
        Search(0, "lyon", (), failed=True),
        counts={"failed_retrievals": 1},
    )
    assert responses[1].done
    assert responses[2].forced_answer  # a failed search uses up a search, so that rollouts end


def test_a_mistake_in_a_retriever_is_not_hidden():
    class Broken:
        def search(self, queries, k):
            return queries.no_such_attribute

    with pytest.raises(AttributeError, match="no_such_attribute"):
        one(environment(Broken()), SEARCH)


def test_nothing_found():
    response = one(environment(Echo(found=False)), SEARCH)
    assert response.counts == {"empty_results": 1}
    assert response.search == Search(0, "lyon", ())
    assert response.kind is SpanKind.DOCUMENTS


def test_passages_are_cut_to_words():
    response = one(environment(passage_words=3, top_k=2), SEARCH)
    assert response.text == "\n<documents>\nLyon: about lyon one\nLyon: about lyon one\n</documents>\n"
    assert response.counts == {"cut_passages": 2}
    assert one(environment(passage_words=5), SEARCH).counts == {}


def test_passages_shown_before_are_skipped_and_counted():
    """Rollouts of one call need not have been shown the same; what a search was shown stays shown, failed or not."""
    echo = Echo()
    searches = [[], [Search(0, "lyon", ("lyon0", "lyon2"))], [Search(0, "x", ("x0",)), Search(1, "y", ())]]
    env = environment(echo, top_k=2, skip_shown=True)
    responses = env.respond([SEARCH] * 3, searches, [0] * 3, [False] * 3)
    assert echo.calls == [(["lyon"] * 3, 4)]
    assert [r.search.passage_ids for r in responses] == [("lyon0", "lyon1"), ("lyon1", "lyon3"), ("lyon0", "lyon1")]
    assert [r.counts for r in responses] == [{}, {"skipped_passages": 2}, {}]

    echo = Echo()
    assert environment(echo, top_k=2).respond([SEARCH], searches[1:2], [0], [False])[0].counts == {}
    assert echo.calls == [(["lyon"], 2)]

    class One:
        def search(self, queries, k):
            return Hits(np.ones((1, 1), np.float32), [["lyon0"]], [[Passage("lyon0", "t", "x")]])

    (nothing,) = environment(One(), top_k=1, skip_shown=True).respond([SEARCH], searches[1:2], [0], [False])
    assert nothing.search == Search(1, "lyon", ())
    assert nothing.counts == {"empty_results": 1, "skipped_passages": 1}


def test_a_long_title_is_cut_and_counted():
    class Titled:
        def search(self, queries, k):
            rows = [[Passage("a", "x " * 9, "y"), Passage("b", "", "")]]
            return Hits(np.ones((1, 2), np.float32), [["a", "b"]], rows)

    response = one(environment(Titled(), passage_words=2, max_searches=1), SEARCH)
    assert response.text == "\n<documents>\nx x: y\n: \n</documents>\n"
    assert response.counts == {"cut_passages": 1, "forced_answers": 1}


def test_a_retriever_that_loses_queries_is_an_error():
    class Short:
        def search(self, queries, k):
            return Hits(np.ones((1, 1), np.float32), [["a"]], [[Passage("a", "t", "x")]])

    with pytest.raises(ValueError, match="returned 1 rows of passages for 2 queries"):
        environment(Short()).respond([SEARCH, SEARCH], [[], []], [0, 0], [False, False])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"max_searches": -1}, "max_searches must be at least 0, got -1"),
        ({"max_invalid": -1}, "max_invalid must be at least 0, got -1"),
        ({"passage_words": 0}, "passage_words must be at least 1, got 0"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        environment(**kwargs)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one length, got 1, 2, 1, 1"):
        environment().respond([SEARCH], [[], []], [0], [False])
