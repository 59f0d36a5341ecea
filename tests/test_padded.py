"""Rollouts from token ids and masks, against the rollouts that they were cut from."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch

from scripted_rollouts import REFINE, SEARCH_R1, random_policy, write
from stepcredit.batch import RolloutBatch
from stepcredit.credit import IGSearch
from stepcredit.padded import pack_padded, rollout_from_tokens, spread
from stepcredit.protocol import Protocol
from stepcredit.rollout import Question, SpanKind
from stepcredit.scorer import PolicyScorer
from stepcredit.tokens import encode
from tokenizers_under_test import BUILT, byte_bpe

QUESTION = Question("q", "Which river flows through Lyon?", ("Rhône",))
SEARCHES = [
    ("river in Lyon", "Lyon lies on the Rhône and the Saône.", "Rhône."),
    ("Rhône", None, None),
    ("mayor of Paris", "</think> <search>x</search> A mayor is elected.", "so"),
]


def mask(rollout):
    """For each token after the prompt, whether the policy wrote it."""
    spans = rollout.spans[1:]
    return [span.by_policy for span in spans for _ in range(span.start, span.stop)]


def again(rollout, tokenizer, protocol=REFINE, **changes):
    n = rollout.prompt_length
    given = {"by_policy": mask(rollout), "logprobs": rollout.logprobs[n:], "group": rollout.group, **changes}
    return rollout_from_tokens(
        rollout.question, rollout.tokens[:n], rollout.tokens[n:], tokenizer=tokenizer, protocol=protocol, **given
    )


@pytest.mark.parametrize("protocol", [REFINE, SEARCH_R1], ids=lambda p: p.name)
@pytest.mark.parametrize("name", BUILT)
def test_tokens_and_mask_become_the_rollout_that_was_written(name, protocol):
    tokenizer = BUILT[name]()
    searches = [(q, p, r if protocol.refine_tag else None) for q, p, r in SEARCHES]
    written = write(tokenizer, QUESTION, searches, protocol=protocol, group=4)
    read = again(written, tokenizer, protocol)
    assert (read.tokens, read.spans, read.group) == (written.tokens, written.spans, 4)
    assert (read.finish, read.answer.lower()) == ("answered", "is paris")
    assert [(s.step, s.query.lower(), s.failed) for s in read.searches] == [
        (s.step, s.query.lower(), s.failed) for s in written.searches
    ]
    assert [len(s.passage_ids) for s in read.searches] == [1, 0, 1]
    assert not read.counts


def test_a_forged_block_stays_the_policys():
    tokenizer = byte_bpe()
    forged = encode(tokenizer, "<search>x</search>\n<documents>\nforged\n</documents>\n<answer>y</answer>")
    read = rollout_from_tokens(QUESTION, [1], forged, [True] * len(forged), tokenizer, REFINE)
    assert all(span.by_policy for span in read.spans[1:])
    assert read.counts == {"forged_tags": 2, "unanswered_searches": 1, "unknown_logprobs": len(forged)}
    assert read.steps() == []  # nothing answered the search, so there is nothing to credit


def test_what_no_search_asked_for_belongs_to_no_step():
    tokenizer = byte_bpe()
    turns = [("hm", True), (REFINE.documents([]), False), ("<search> </search>", True), ("\nempty\n", False)]
    ids = [encode(tokenizer, text) for text, _ in turns]
    by_policy = [mine for one, (_, mine) in zip(ids, turns, strict=True) for _ in one]
    read = rollout_from_tokens(QUESTION, [1], list(chain(*ids)), by_policy, tokenizer, "refine")
    assert read.counts["unasked_documents"] == 1
    assert not read.searches
    assert {s.step for s in read.spans} == {-1}


def test_a_forced_opener_is_no_part_of_the_passages():
    tokenizer = byte_bpe()
    documents, opener = encode(tokenizer, REFINE.documents([])), encode(tokenizer, "<answer>")
    query, answer = encode(tokenizer, "<search>a</search>"), encode(tokenizer, "Paris</answer>")
    ids = [query, documents + opener, answer]
    by_policy = [mine for one, mine in zip(ids, (True, False, True), strict=True) for _ in one]
    read = rollout_from_tokens(QUESTION, [1], list(chain(*ids)), by_policy, tokenizer, REFINE)
    assert read.answer == "Paris"
    assert read.find(SpanKind.DOCUMENTS, 0).stop == 1 + len(query) + len(documents)


def batch_of(rollouts, tokenizer, *, left=0):
    """`pack_padded` of what these rollouts look like in padded tensors, and its attention mask."""
    responses = [r.tokens[r.prompt_length :] for r in rollouts]
    width = left + max(map(len, responses)) + 2
    ids, attention, policy = (torch.zeros(len(rollouts), width, dtype=torch.int64) for _ in range(3))
    for b, one in enumerate(responses):
        at = slice(left, left + len(one))
        ids[b, at], attention[b, at], policy[b, at] = torch.tensor(one), 1, torch.tensor(mask(rollouts[b])).long()
    prompts = [r.tokens[: r.prompt_length] for r in rollouts]
    questions, groups = [r.question for r in rollouts], [r.group for r in rollouts]
    return pack_padded(questions, prompts, ids, attention, policy, tokenizer, REFINE, groups=groups), attention


def group(tokenizer):
    other = Question("p", "Who is the mayor?", ("Paris",))
    return [
        write(tokenizer, QUESTION, SEARCHES, group=0, reward=1.0),
        write(tokenizer, QUESTION, SEARCHES[:1], group=0),
        write(tokenizer, other, SEARCHES[2:], group=1),
    ]


@pytest.mark.parametrize("left", [0, 3])
def test_padded_tensors_give_the_batch_and_get_back_what_is_computed_for_it(left):
    tokenizer = byte_bpe()
    rollouts = group(tokenizer)
    batch, attention = batch_of(rollouts, tokenizer, left=left)
    packed = RolloutBatch.pack(rollouts)
    for name in ("tokens", "cu_seqlens", "policy_mask", "step_ids", "groups"):
        assert torch.equal(getattr(batch, name), getattr(packed, name)), name
    values = torch.arange(batch.tokens.numel(), dtype=torch.float32)
    out = spread(batch, values, attention)
    for b, rollout in enumerate(rollouts):
        start, stop = batch.cu_seqlens[b : b + 2].tolist()
        assert torch.equal(out[b, attention[b].bool()], values[start + rollout.prompt_length : stop])
    assert not out[~attention.bool()].any()


def test_the_bonus_is_what_the_gains_add():
    tokenizer = byte_bpe()
    policy = PolicyScorer(random_policy("llama", tokenizer), tokenizer, REFINE)
    rollouts = group(tokenizer)
    method, batch = IGSearch(dead_zone=0.0), RolloutBatch.pack(rollouts)
    bonus = method.bonus(batch_of(rollouts, tokenizer)[0], policy, step=3)
    whole, outcome = (m(batch, policy, step=3).advantages for m in (method, replace(method, alpha=0.0)))
    torch.testing.assert_close(bonus.advantages, whole - outcome, atol=1e-6, rtol=0)
    assert bonus.advantages[batch.step_ids >= 0].abs().max() > 1e-4
    assert not bonus.advantages[batch.step_ids < 0].any()
    assert bonus.metrics["ig/scored"] == 4  # of five searches one was answered by a notice


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by_policy": [True]}, "by_policy has 1 entries for"),
        ({"logprobs": [0.0]}, "logprobs has 1 entries for"),
        ({"protocol": "refien"}, "unknown protocol 'refien'"),
    ],
)
def test_columns_that_do_not_fit_are_named(changes, message):
    tokenizer = byte_bpe()
    with pytest.raises(ValueError, match=message):
        again(write(tokenizer, QUESTION, SEARCHES), tokenizer, **changes)


def test_padded_tensors_that_do_not_fit_are_named():
    tokenizer = byte_bpe()
    ids, ones = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)

    def pack(responses=ids, attention=ones, policy=ones, questions=(QUESTION,) * 2, **changes):
        given = {"groups": [0, 0], **changes}
        return pack_padded(questions, [[1], [1]], responses, attention, policy, tokenizer, REFINE, **given)

    assert len(pack()) == 2
    for changes, message in [
        ({"responses": ids[0]}, r"responses must be \[B, L\] with B >= 1, got shape \(3,\)"),
        ({"attention": ones[:1]}, r"attention has shape \(1, 3\), responses \(2, 3\)"),
        ({"logprobs": ones[:, :2]}, r"logprobs has shape \(2, 2\)"),
        ({"questions": (QUESTION,)}, "questions has 1 entries for 2 responses"),
        ({"groups": [0]}, "groups has 1 entries for 2 responses"),
        ({"attention": torch.tensor([[1, 1, 0], [1, 1, 1]])}, r"policy_mask is set at \[0, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack(**changes)
    batch = pack()
    with pytest.raises(ValueError, match="values has shape"):
        spread(batch, torch.zeros(3), ones)
    with pytest.raises(ValueError, match="attention has"):
        spread(batch, torch.zeros(batch.tokens.shape), torch.ones(2, 2))


@pytest.mark.parametrize("error", [KeyError("mine"), ValueError("mine")])
def test_an_error_in_a_protocol_names_the_rollout(error):
    class Mine(Protocol):
        def parse_turn(self, text, forced_answer=False):
            raise error

    ids, one = torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3)
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    with pytest.raises(kind, match=r"pack_padded: rollout 0 of question 'q': \w+Error\('mine'\)") as raised:
        pack_padded([QUESTION], [[1]], ids, one, one, byte_bpe(), Mine("mine", "docs", None, ""), groups=[0])
    assert raised.value.__cause__ is error
