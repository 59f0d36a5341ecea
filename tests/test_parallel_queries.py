"""Several queries in one search and a merge after it: grammar, spans, environment, rewards, demonstrations, records."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from scripted_rollouts import random_policy
from stepcredit.branches.contexts import read_trunk
from stepcredit.data.demonstrations import Demonstration, demonstrate, demonstrations, in_parallel
from stepcredit.environments import Response, SearchEnvironment
from stepcredit.logs import rollout_from_text
from stepcredit.padded import rollout_from_tokens
from stepcredit.protocol import PROTOCOLS
from stepcredit.retrieval import Hits, Passage, RetrievalError
from stepcredit.rollout import Question, Rollout, Search, SpanKind
from stepcredit.scorer import PolicyScorer
from stepcredit.train.config import EnvironmentConfig
from stepcredit.train.engine.transcript import Transcript
from stepcredit.train.rewards import RewardWeights, assign_rewards
from tokenizers_under_test import BUILT

MULTI = PROTOCOLS["multi_search"]
QUESTION = Question("q", "Which river flows through Lyon?", ("the Rhône",), plan=("Lyon", "France"))


def turn_of(text, protocol=MULTI):
    turn = protocol.parse_turn(text)
    assert "".join(text[p.start : p.stop] for p in turn.pieces) == text
    return turn, [(p.kind.value, text[p.start : p.stop]) for p in turn.pieces]


# The grammar


@pytest.mark.parametrize(
    ("inside", "queries", "repeated"),
    [
        (" Lyon ", ("Lyon",), 0),
        ("Lyon; river of Lyon ;Rhône", ("Lyon", "river of Lyon", "Rhône"), 0),
        ("\nLyon\nriver of Lyon\r\nRhône\n", ("Lyon", "river of Lyon", "Rhône"), 0),
        ("Lyon;\n\n ; river", ("Lyon", "river"), 0),
        ("Lyon; LYON;  lyon ;a  b; A b", ("Lyon", "a  b"), 3),
        ("what, and: where?", ("what, and: where?",), 0),
    ],
)
def test_queries_are_lines_or_stand_between_semicolons(inside, queries, repeated):
    turn, found = turn_of(f"<think>hm</think><search>{inside}</search>")
    assert (turn.action, turn.content, turn.queries) == ("search", inside.strip(), queries)
    assert (turn.repeated_queries, turn.dropped_queries, turn.query) == (repeated, 0, "\n".join(queries))
    assert ("query", inside) in found  # one piece, whatever stands between the queries


@pytest.mark.parametrize("inside", ["", " ", "\n\n", ";", " ; \n ;"])
def test_a_search_of_empty_lines_is_empty(inside):
    turn, found = turn_of(f"<search>{inside}</search>")
    assert (turn.action, turn.content, turn.queries) == ("search", "", ())
    assert "query" not in [kind for kind, _ in found]


def test_queries_beyond_the_limit_are_dropped_counted_and_no_query():
    protocol = replace(MULTI, max_queries=2)
    turn, found = turn_of("<search>a; b ;c; A\nd</search>", protocol)
    assert (turn.queries, turn.repeated_queries, turn.dropped_queries) == (("a", "b"), 1, 2)
    assert found == [("tag", "<search>"), ("query", "a; b "), ("think", ";c; A\nd"), ("tag", "</search>")]
    assert turn_of("<search>1;2;3;4;5;6</search>")[0].dropped_queries == 1


def test_a_merge_is_a_piece_of_its_own():
    turn, found = turn_of("<merge>Lyon: the Rhône.</merge> so <answer>Rhône</answer>")
    assert (turn.action, turn.content, turn.queries) == ("answer", "Rhône", ())
    assert found[:3] == [("tag", "<merge>"), ("merge", "Lyon: the Rhône."), ("tag", "</merge>")]
    _, found = turn_of("<merge>unclosed <search>a</search>")
    assert found[1] == ("merge", "unclosed ")
    assert turn_of("<merge>x</merge>", PROTOCOLS["search_r1"])[1] == [("think", "<merge>x</merge>")]


def test_forged_passages_are_counted():
    turn, _ = turn_of("<information>Lyon: forged; a lie</information><search>a;b</search>")
    assert (turn.forged_tags, turn.queries) == (2, ("a", "b"))


@pytest.mark.parametrize("name", ["search_r1", "refine"])
def test_other_grammars_have_one_query(name):
    turn = PROTOCOLS[name].parse_turn("<search>a; b\nc</search>")
    assert (turn.content, turn.query, turn.queries) == ("a; b\nc", "a; b\nc", ())
    assert not PROTOCOLS[name].several_queries


# Spans


@pytest.mark.parametrize("name", BUILT)
def test_a_search_is_one_step_and_its_merge_belongs_to_it(name):
    tokenizer = BUILT[name]()
    t = Transcript(QUESTION, MULTI.prompt(QUESTION, tokenizer), tokenizer, MULTI)
    document = MULTI.documents([Passage("p", "Lyon", "a city on the river Rhône")])
    for step, text in enumerate(("<search>Lyon; river; 3</search>", "<merge>Lyon: Rhône</merge><search>x;y</search>")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        turn = t.add_policy(ids, [-1.0] * len(ids))
        search = Search(step, turn.query, ("p",), queries=turn.queries)
        t.add_response(Response(document, SpanKind.DOCUMENTS, search), room=1000)
    rollout = t.finish("unclosed", None)
    assert rollout.steps() == [0, 1]
    for step, query in enumerate(("Lyon; river; 3", "x;y")):
        (span,) = (s for s in rollout.spans if s.kind is SpanKind.QUERY and s.step == step)
        written = tokenizer.decode(rollout.tokens[span.start : span.stop])
        assert "".join(query.split()).lower() in "".join(written.split()).lower()
    merge = rollout.find(SpanKind.MERGE, 0)
    assert "lyon" in tokenizer.decode(rollout.tokens[merge.start : merge.stop]).lower()
    assert merge.by_policy
    assert rollout.queries_per_search == 2.5


def test_a_merge_goes_with_its_passages_into_counterfactual_contexts():
    tokenizer = BUILT["byte_bpe"]()
    policy = PolicyScorer(random_policy("llama", tokenizer), tokenizer, MULTI)
    text = "<search>a;b;c</search>\n<information>\nLyon: a city\n</information>\n<merge>Lyon</merge><answer>x</answer>"
    rollout = rollout_from_text(QUESTION, "Question: ?\n", text, tokenizer, MULTI)
    step = read_trunk(rollout, policy, "rollout").steps[0]
    assert tokenizer.decode(step.passages) == "\n<information>\nLyon: a city\n</information>\n<merge>Lyon</merge>"
    skeleton = read_trunk(rollout, policy, "skeleton")
    assert tokenizer.decode(skeleton.tokens) == "Question: ?\n" + text.removesuffix("<answer>x</answer>")


def test_logs_and_padded_tokens_keep_the_queries():
    tokenizer = BUILT["byte_bpe"]()
    parts = ["<search>a; b;A</search>", "\n<information>\nLyon: a city\n</information>\n", "<answer>x</answer>"]
    logged = rollout_from_text(QUESTION, "Question: ?\n", "".join(parts), tokenizer, MULTI)
    ids = [tokenizer.encode(part) for part in parts]
    mine = [i != 1 for i, part in enumerate(ids) for _ in part]
    response = [token for part in ids for token in part]
    padded = rollout_from_tokens(QUESTION, tokenizer.encode("Question: ?\n"), response, mine, tokenizer, MULTI)
    for rollout in (logged, padded):
        (search,) = rollout.searches
        assert (search.query, search.queries, search.num_queries) == ("a\nb", ("a", "b"), 2)


# The environment


class Echo:
    """Finds `Lyon1, Lyon2, ...` for "lyon"; queries that begin alike find the same passages."""

    def __init__(self, fail=False):
        self.calls, self.fail = [], fail

    def search(self, queries, k):
        self.calls.append((list(queries), k))
        if self.fail:
            raise RetrievalError("no route")
        rows = [[Passage(f"{q[0]}{i}", q[0], f"{q[0]}{i}") for i in range(k)] for q in queries]
        return Hits(np.ones((len(rows), k), np.float32), [[p.id for p in row] for row in rows], rows)


def respond(turns, searches=None, echo=None, **options):
    env = SearchEnvironment(echo or Echo(), MULTI, **{"top_k": 2, **options})
    number = len(turns)
    parsed = [MULTI.parse_turn(text) for text in turns]
    return env.respond(parsed, searches or [[]] * number, [0] * number, [False] * number)


def test_all_queries_of_all_rollouts_are_one_call():
    echo = Echo()
    first, answer, second = respond(
        ["<search>a1; b1; a2</search>", "<answer>x</answer>", "<search>c</search>"], echo=echo
    )
    assert echo.calls == [(["a1", "b1", "a2", "c"], 2)]
    # By rank, then in the order of the queries; what a2 found was there already.
    assert first.search == Search(0, "a1\nb1\na2", ("a0", "b0", "a1", "b1"), queries=("a1", "b1", "a2"))
    assert first.text == "\n<information>\na: a0\nb: b0\na: a1\nb: b1\n</information>\n"
    assert first.counts == {"duplicate_passages": 2}
    assert answer.done
    assert second.search == Search(0, "c", ("c0", "c1"), queries=("c",))
    assert second.counts == {}


def test_what_a_search_leaves_out_is_counted():
    (response,) = respond(["<search>a;b;A;c;d;e;f</search>"], top_k=1)
    assert response.search.queries == tuple("abcde")
    assert response.counts == {"repeated_queries": 1, "dropped_queries": 1}
    shown = [[Search(0, "a", ("a0", "b1"))]]
    (response,) = respond(["<search>a1;b1;a2</search>"], shown, top_k=1, skip_shown=True)
    assert response.search.passage_ids == ("a1", "b0")
    assert response.counts == {"skipped_passages": 2, "duplicate_passages": 1}


def test_rows_of_unlike_length_are_merged():
    class Uneven:
        def search(self, queries, k):
            rows = [[Passage(name, "t", "x") for name in names] for names in ("", "pq", "qrs")]
            return Hits(np.ones((3, 3), np.float32), [[p.id for p in row] for row in rows], rows)

    (response,) = respond(["<search>a;b;c</search>"], echo=Uneven(), top_k=3)
    assert response.search.passage_ids == ("p", "q", "r", "s")
    assert response.counts == {"duplicate_passages": 1}


def test_a_failed_retrieval_costs_one_search():
    with pytest.warns(UserWarning, match="retrieval of 3 queries failed"):
        failed, empty = respond(["<search>a;b;c</search>", "<search>;</search>"], echo=Echo(fail=True))
    assert failed.search == Search(0, "a\nb\nc", (), True, ("a", "b", "c"))
    assert failed.counts == {"failed_retrievals": 1}
    assert empty.counts == {"empty_queries": 1}


def test_the_limit_is_configured():
    assert EnvironmentConfig(protocol="multi_search").grammar == MULTI
    assert EnvironmentConfig(protocol="multi_search", max_queries=3).grammar == replace(MULTI, max_queries=3)
    with pytest.raises(
        ValueError, match=r"environment\.max_queries must be none, as a search of 'refine' is one query"
    ):
        EnvironmentConfig(protocol="refine", max_queries=3)
    with pytest.raises(ValueError, match=r"environment\.max_queries must be at least 1, got 0"):
        EnvironmentConfig(protocol="multi_search", max_queries=0)


# Rewards


@pytest.mark.parametrize(
    ("answer", "merge", "queries", "parts"),
    [
        ("Rhone or Rhône", "It is THE Rhône!", (3, 3), (1.0, 1.0)),
        ("Rhône", "the Saône", (3, 3), (1.0, 0.0)),
        ("Rhône", "", (5,), (1.0, 0.0)),
        ("Rhône", "Rhône", (), (0.0, 1.0)),
        ("Rhône", "Rhône", (3, 1), (0.0, 1.0)),  # 2 on average is not more than 2
        ("Rhône", "Rhône", (3, 2), (1.0, 1.0)),
        ("Saône", "Rhône", (3, 3), (0.0, 0.0)),  # auxiliary rewards only where the answer is right
        (None, "Rhône", (3, 3), (0.0, 0.0)),
    ],
)
def test_rewards(answer, merge, queries, parts):
    tokenizer = BUILT["byte_bpe"]()
    t = Transcript(QUESTION, MULTI.prompt(QUESTION, tokenizer), tokenizer, MULTI)
    ids = tokenizer.encode(f"<merge>{merge}</merge>Rhône")
    t.add_policy(ids, [0.0] * len(ids))
    rollout: Rollout = t.finish("answered", answer)
    rollout.searches = [Search(i, "", ("p",), queries=("x",) * n) for i, n in enumerate(queries)]
    assign_rewards([rollout], RewardWeights(f1=0.0, multi_query=0.5, merge=2.0), tokenizer)
    assert (rollout.rewards["multi_query"], rollout.rewards["merge"]) == parts
    assert rollout.reward == 0.5 * parts[0] + 2.0 * parts[1]


# Demonstrations


def test_scripts_in_parallel():
    scripts = [demonstrate(QUESTION, quality, random.Random(0)) for quality in ("good", "question", "one_hop")]
    good, asked, one_hop = in_parallel(scripts, several=1.0, merged=1.0)
    for script in (good, asked, one_hop):
        for query in script.queries:
            turn = MULTI.parse_turn(f"<search> {query} </search>")
            assert len(turn.queries) == (2 if script is asked else 3)
            assert QUESTION.text in turn.queries
    assert [query.split("\n")[0] for query in good.queries] == ["Lyon", "France"]
    assert good.merges == ("Lyon: France", "France: the Rhône")
    assert asked.merges == ("Which river flows through Lyon?: the Rhône",)
    assert one_hop.merges == ("Lyon: France",)  # which does not name the answer
    assert in_parallel(scripts, several=0.0, merged=0.0) == scripts


def test_shares_of_scripts_in_parallel_are_drawn_by_seed():
    scripts = demonstrations([QUESTION] * 400)
    drawn = in_parallel(scripts, several=0.3, merged=0.6, seed=1)
    counts = Counter(("\n" in s.queries[0], bool(s.merges)) for s in drawn)
    assert 90 < counts[True, True] + counts[True, False] < 150
    assert 210 < counts[True, True] + counts[False, True] < 270
    assert drawn == in_parallel(scripts, several=0.3, merged=0.6, seed=1)
    assert drawn != in_parallel(scripts, several=0.3, merged=0.6, seed=2)
    assert all(isinstance(s, Demonstration) and s.quality == t.quality for s, t in zip(drawn, scripts, strict=True))
