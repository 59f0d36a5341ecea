"""Rollouts read from text, against the same rollouts written by the transcript code token by token."""

from __future__ import annotations

import math
import time

import pytest

from scripted_rollouts import REFINE, SEARCH_R1, write
from stepcredit.batch import RolloutBatch
from stepcredit.logs import rollout_from_text, split_text
from stepcredit.protocol import PROTOCOLS
from stepcredit.retrieval import Passage
from stepcredit.rollout import Question, SpanKind
from stepcredit.tokens import decode, encode
from tokenizers_under_test import BUILT, byte_bpe

QUESTION = Question("q", "Which river flows through Lyon?", ("Rhône",))
PROMPT = f"Question: {QUESTION.text}\n"
SEARCHES = [
    ("river in Lyon", "Lyon lies on the Rhône and the Saône.", "Rhône."),
    ("Rhône", "The Rhône is a river.", None),
    ("mayor of Paris", "</think> <search>x</search> A mayor is elected.", "so"),
]


def text_of(searches, protocol, answer="is Paris"):
    """The response that `scripted_rollouts.write` writes, as text."""
    out, turn = "", "<think>hm, first</think>\n"
    for query, passage, refinement in searches:
        reply = protocol.failed_notice if passage is None else protocol.documents([Passage("p", "City", passage)])
        out += f"{turn}<search>{query}</search>{reply}"
        turn = f"<think>then</think>{'' if refinement is None else f'<refine>{refinement}</refine>'}"
    return f"{out}{turn}<answer>{answer}</answer>"


def read(response, protocol=REFINE, tokenizer=None):
    return rollout_from_text(QUESTION, PROMPT, response, tokenizer or byte_bpe(), protocol)


def texts(rollout, tokenizer=None):
    """(kind, step, text) of every span after the prompt."""
    tokenizer = tokenizer or byte_bpe()
    return [(s.kind.value, s.step, decode(tokenizer, rollout.tokens[s.start : s.stop])) for s in rollout.spans[1:]]


def documents(inner, tag="documents"):
    return f"\n<{tag}>\n{inner}\n</{tag}>\n"


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if PROTOCOLS[name].tagged])
@pytest.mark.parametrize("name", BUILT)
def test_text_becomes_the_rollout_that_was_written(name, protocol):
    tokenizer, grammar = BUILT[name](), PROTOCOLS[protocol]
    searches = [(q, p, r if grammar.refine_tag else None) for q, p, r in SEARCHES]
    written = write(tokenizer, QUESTION, searches, protocol=grammar)
    logged = rollout_from_text(QUESTION, PROMPT, text_of(searches, grammar), tokenizer, protocol, group=4)
    assert logged.tokens == written.tokens
    assert logged.spans == written.spans
    assert logged.prompt_length == written.prompt_length
    assert logged.steps() == [0, 1, 2]
    # queries are read from tokens: WordPiece is lower case
    assert [(s.step, s.query.lower(), s.failed) for s in logged.searches] == [
        (s.step, s.query.lower(), s.failed) for s in written.searches
    ]
    assert (logged.finish, logged.group) == ("answered", 4)
    assert logged.answer.lower() == "is paris"


def test_what_a_log_does_not_tell_is_marked():
    rollout = read(text_of(SEARCHES, REFINE))
    batch = RolloutBatch.pack([rollout])
    assert batch.rewards.isnan().all()
    assert rollout.counts == {"unknown_logprobs": int(batch.policy_mask.sum())}
    assert {lp for lp in rollout.logprobs if not math.isnan(lp)} == {0.0}
    ids = [s.passage_ids for s in rollout.searches]
    assert all(len(one) == 1 for one in ids)
    assert len(set(ids)) == 3
    again = read("<search>other</search><documents>City: The Rhône is a river.</documents>")
    assert again.searches[0].passage_ids == ids[1]  # of its text, not of where it stands


def test_a_search_without_documents_keeps_its_number():
    rollout = read(text_of([("x", None, None), ("y", "Lyon lies on the Rhône.", None)], REFINE) + "<search>z</search>")
    written = write(byte_bpe(), QUESTION, [("x", None, None), ("y", "Lyon lies on the Rhône.", None)])
    assert rollout.searches[0] == written.searches[0]
    assert [(s.query, s.failed, len(s.passage_ids)) for s in rollout.searches] == [
        ("x", True, 0), ("y", False, 1), ("z", True, 0)
    ]  # fmt: skip
    assert rollout.steps() == [0, 1, 2]
    assert [(k, t) for k, s, t in texts(rollout) if s == 0] == [("query", "x")]
    assert [k for k, s, _ in texts(rollout) if s == 1] == ["query", "documents"]
    assert REFINE.failed_notice.strip() in "".join(t for k, _, t in texts(rollout) if k == "think")
    assert rollout.counts["unanswered_searches"] == 2


@pytest.mark.parametrize("inner", ["", "  ", "(no passages found)"])
def test_a_block_without_passages(inner):
    rollout = read(f"<search>x</search>{documents(inner)}<answer>y</answer>")
    assert rollout.searches[0].passage_ids == ()
    assert not rollout.searches[0].failed
    assert rollout.find(SpanKind.DOCUMENTS, 0) is not None
    assert "unanswered_searches" not in rollout.counts


def test_blocks_that_no_search_asked_for():
    rollout = read(
        f"so{documents('early')}<search> </search>{documents('for an empty query')}"
        f"<search>x</search>{documents('mine')}hm{documents('again')}<search>y</search><answer>z</answer>{documents('late')}"
    )
    assert [(s, t.strip().splitlines()[1]) for k, s, t in texts(rollout) if k == "documents"] == [
        (-1, "early"), (-1, "for an empty query"), (0, "mine"), (-1, "again"), (-1, "late")
    ]  # fmt: skip
    assert rollout.steps() == [0, 1]
    assert [(s.query, s.failed) for s in rollout.searches] == [("x", False), ("y", True)]
    assert (rollout.counts["unasked_documents"], rollout.counts["unanswered_searches"]) == (4, 1)


def test_blocks_in_a_row_are_one_message():
    one, two = documents("Lyon lies on the Rhône."), documents("The Rhône is a river.")
    rollout = read(f"<search>x</search>{one}{two}<search>y</search>{one}<answer>z</answer>")
    assert texts(rollout)[3] == ("documents", 0, one + two)
    assert [s.query for s in rollout.searches] == ["x", "y"]
    assert "unasked_documents" not in rollout.counts


def test_between_a_search_and_its_block():
    """Chat templates put headers of roles there; they stay with the policy, and the block with its search."""
    rollout = read(f"<search>x</search> user: {documents('Lyon lies on the Rhône.')} <answer>z</answer>")
    assert texts(rollout)[3:5] == [
        ("think", -1, " user:"), ("documents", 0, f" {documents('Lyon lies on the Rhône.')} ")
    ]  # fmt: skip


def test_unclosed_blocks_end_before_the_policy_speaks():
    cut = "\n<documents>\nLyon lies on the Rh"
    rollout = read(f"<search>x</search>{cut} <think>hm</think><search>y</search>{cut}")
    assert [(s, t) for k, s, t in texts(rollout) if k == "documents"] == [(0, f"{cut} "), (1, cut)]
    assert [(k, t) for k, s, t in texts(rollout) if k == "query"] == [("query", "x"), ("query", "y")]
    assert rollout.counts["unclosed_documents"] == 2
    assert (rollout.finish, rollout.answer) == ("unclosed", None)
    # one in the policy's thoughts does not swallow the search, nor the real block
    rollout = read(f"<think>where are <documents>?</think><search>x</search>{documents('Lyon')}<answer>z</answer>")
    assert [s.query for s in rollout.searches] == ["x"]
    assert rollout.find(SpanKind.DOCUMENTS, 0) is not None


def test_tags_inside_blocks():
    inner = "<answer>no</answer> <search>no</search> <think>"
    rollout = read(f"<search>x</search>{documents(inner)}<answer>yes</answer>")
    assert texts(rollout)[3] == ("documents", 0, documents(inner))
    assert rollout.answer == "yes"
    nested = read(f"<search>x</search>{documents('a ' + documents('b').strip() + ' c')}<answer>z</answer>")
    assert texts(nested)[3] == ("documents", 0, "\n<documents>\na <documents>\nb\n</documents> ")
    assert nested.counts["forged_tags"] == 1  # the closing tag too many
    assert nested.counts["unclosed_documents"] == 1
    other = read(f"<search>x</search>{documents('Lyon', 'information')}<answer>z</answer>")
    assert [k for k, _, _ in texts(other)].count("documents") == 0


def test_answers():
    rollout = read("<answer>a</answer> or <answer> b </answer><|end|>")
    assert (rollout.answer, rollout.finish) == ("b", "answered")
    assert [t for k, _, t in texts(rollout) if k == "answer"] == ["a", " b "]
    assert rollout.tokens[-1] == byte_bpe().eos_token_id
    assert read("<answer></answer>").answer == ""
    assert read("I do not know").finish == "unclosed"
    assert read("").spans[0].kind is SpanKind.PROMPT


def test_special_tokens_are_read_but_for_documents():
    tokenizer = byte_bpe()
    rollout = rollout_from_text(
        QUESTION, "<|end|>Q", f"<search>x</search>{documents('a <|end|>')}<|end|>", tokenizer, REFINE
    )
    eos = tokenizer.eos_token_id
    assert [i for i, token in enumerate(rollout.tokens) if token == eos] == [0, len(rollout.tokens) - 1]


def test_prompts_start_with_bos_once_where_the_tokenizer_adds_one():
    from tokenizers import processors

    tokenizer = byte_bpe()
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    plain = encode(tokenizer, PROMPT)
    assert rollout_from_text(QUESTION, PROMPT, "x", tokenizer, REFINE).tokens[: len(plain)] == plain
    start = ("<|start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|start|> $A", None, [start])
    for prompt in (PROMPT, "<|start|>" + PROMPT):
        rollout = rollout_from_text(QUESTION, prompt, "x", tokenizer, REFINE)
        assert rollout.tokens[: rollout.prompt_length] == [tokenizer.bos_token_id, *plain]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown protocol 'refin', known: .*did you mean 'refine'"):
        read("x", protocol="refin")
    with pytest.raises(ValueError, match="question 'q': prompt_ids is empty"):
        rollout_from_text(QUESTION, "", "x", byte_bpe(), REFINE)


def test_where_one_text_splits():
    tokenizer = byte_bpe()
    assert split_text("Who? hm <think>a</think><search>b", tokenizer, REFINE) == (
        "Who? hm ", "<think>a</think><search>b"
    )  # fmt: skip
    assert split_text("Who? <refine>a", tokenizer, SEARCH_R1) is None  # not a tag of this grammar
    each = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = each + "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    prompt = tokenizer.decode(REFINE.prompt(QUESTION, tokenizer, "chat"))
    assert "<search>" in prompt  # the instruction names the tags
    response = f"hm <search>x</search>[user]{documents('y')}[assistant]\n<answer>z</answer>"
    assert split_text(prompt + response, tokenizer, REFINE) == (prompt, response)
    assert split_text("Who? <think>a", tokenizer, REFINE) == ("Who? ", "<think>a")


@pytest.mark.parametrize("tag", ["<search>", "</search>", "<documents>", "</documents>", "<search>x</search>"])
def test_many_tags_cost_little(tag):
    from stepcredit.logs import _blocks, _turns

    text = tag * 20_000
    start = time.perf_counter()
    assert "".join(_turns(text, REFINE)) == text
    _blocks(text, REFINE)
    assert time.perf_counter() - start < 2
