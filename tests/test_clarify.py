"""`clarify`: the credit of three levels."""

from __future__ import annotations

import dataclasses
import math
import re
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clarify_rollouts import CLARIFY, QUESTION, answer, ask, converse
from scripted_rollouts import random_policy
from stepcredit.batch import RolloutBatch
from stepcredit.credit import Clarify, SearchR1, get_method
from stepcredit.credit.clarify import privileged_text, question_values, reweigh
from stepcredit.credit.hindsight import with_block
from stepcredit.rollout import SpanKind
from stepcredit.scorer import PolicyScorer
from stepcredit.train.metrics import documented
from tokenizers_under_test import BUILT

TOKENIZER = BUILT["byte_bpe"]()
COLOUR, SIZE, GUESS = ask("What colour is it?"), ask("What size is it?"), answer("large red circle")


@pytest.fixture(scope="module")
def policy() -> PolicyScorer:
    return PolicyScorer(random_policy("llama", TOKENIZER), TOKENIZER, CLARIFY)


def conversations(group=0):
    """Right after two questions, wrong after one that tells half and one that tells nothing, and a wrong guess."""
    return [
        converse(TOKENIZER, [COLOUR, SIZE, GUESS], group=group),
        converse(TOKENIZER, [COLOUR, ask("Which one?"), answer("small red circle")], group=group),
        converse(TOKENIZER, [answer("large blue circle")], group=group),
    ]


def spans_of(batch, kind):
    return [
        (b, slice(int(batch.cu_seqlens[b]) + s.start, int(batch.cu_seqlens[b]) + s.stop), s)
        for b, rollout in enumerate(batch.rollouts)
        for s in rollout.spans
        if s.kind is kind
    ]


def test_rlsd_by_hand():
    a = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0, 0.0, 1.0], dtype=torch.float64)
    gap = torch.tensor([0.1, 5.0, -0.1, 0.1, -0.1, 700.0, 3.0, 0.0], dtype=torch.float64)
    e = math.exp
    weights = [e(0.1), 1.2, e(-0.1), e(-0.1), e(0.1), 0.8, 1.0, 1.0]
    expected = [x * (0.5 + 0.5 * w) for x, w in zip(a.tolist(), weights, strict=True)]
    assert reweigh(a, gap, 0.5, 0.2).tolist() == pytest.approx(expected, abs=1e-15)
    assert reweigh(a, gap, 1.0, 0.2)[0] == 2 * e(0.1)
    assert torch.equal(reweigh(a, gap, 0.0, 0.2), a)
    assert torch.equal(reweigh(a, gap, 0.5, 0.0), a)
    assert reweigh(torch.zeros(3), torch.tensor([500.0, -500.0, 0.0]), 0.5, 0.2).tolist() == [0.0, 0.0, 0.0]


def test_the_share_falls_to_nothing():
    method = Clarify(share_start=0.5, share_end=0.5)
    assert [method.share(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.5, 0.25, 0.0, 0.0, 0.0]
    assert Clarify().share(0.0) == 0.5
    assert Clarify().share(1.0) == 0.0


def test_turn_values_by_hand(policy):
    batch = RolloutBatch.pack(conversations())
    asked, values = question_values(batch, 0.1)
    assert values.tolist() == pytest.approx([0.4, 0.4, 0.4, -0.1])
    outcome = SearchR1()(batch, policy).advantages
    credit = Clarify(turn=2.0, share_start=0.0)(batch, policy)
    bonus = credit.advantages - outcome
    for k, (_, where, span) in enumerate(spans_of(batch, SpanKind.ASK)):
        assert set(asked[where].tolist()) == {k}
        size = span.stop - span.start
        torch.testing.assert_close(bonus[where], torch.full((size,), 2 * float(values[k]) / size), rtol=0, atol=1e-6)
    assert not bonus[asked < 0].any()
    assert credit.metrics["clarify/turn_value"] == pytest.approx((3 * 0.4 - 0.1) / 4)
    assert credit.metrics["advantage/bonus_abs_mean"] == pytest.approx(float(bonus[asked >= 0].abs().mean()))


def test_turn_values_telescope(policy):
    """Whatever is asked, the values and costs of a rollout sum to the share of the ambiguity that was resolved."""
    turns = [ask(text) for text in ("Is it large?", "Which one?", "Is it red or green?", "What colour is it?")]
    batch = RolloutBatch.pack([converse(TOKENIZER, [*turns[:n], GUESS]) for n in range(1, 5)])
    _, values = question_values(batch, 0.25)
    at = 0
    for rollout in batch.rollouts:
        inquiries = rollout.searches
        resolved = math.log2(inquiries[0].before / len(inquiries[-1].remaining))
        assert sum(i.bits for i in inquiries) == pytest.approx(resolved)
        mine = values[at : at + len(inquiries)]
        assert float(mine.sum()) == pytest.approx(resolved / 2 - 0.25 * len(inquiries), abs=1e-6)
        at += len(inquiries)
    bonus = Clarify(share_start=0, turn=1)(batch, policy).advantages - SearchR1()(batch, policy).advantages
    assert float(bonus.sum()) == pytest.approx(float(question_values(batch, 0.1)[1].sum()), abs=1e-5)


def test_a_question_about_nothing_ambiguous_is_worth_its_cost():
    rollout = converse(TOKENIZER, [COLOUR, GUESS])
    rollout.searches = [dataclasses.replace(rollout.searches[0], before=1, remaining=(1,))]
    assert question_values(RolloutBatch.pack([rollout]), 0.25)[1].tolist() == [-0.25]


def told(rollout):
    return with_block(rollout, TOKENIZER.encode(privileged_text(rollout), add_special_tokens=False))


def test_token_level_is_that_of_separate_forwards(policy):
    batch = RolloutBatch.pack(conversations())
    outcome = SearchR1()(batch, policy).advantages
    credit = Clarify(turn=0.0, cost=0.0)(batch, policy, progress=0.4)
    share = 0.5 * 0.6
    pairs = [(r.tokens[: r.prompt_length], r.tokens[r.prompt_length :]) for x in batch.rollouts for r in (x, told(x))]
    found = policy.separate_logprobs(pairs)
    for b, rollout in enumerate(batch.rollouts):
        mine = slice(int(batch.cu_seqlens[b]) + rollout.prompt_length, int(batch.cu_seqlens[b + 1]))
        gap = (found[2 * b + 1] - found[2 * b]).double()
        expected = reweigh(outcome[mine].double(), gap, share, 0.2) * batch.policy_mask[mine]
        torch.testing.assert_close(credit.advantages[mine], expected.float(), rtol=1e-5, atol=1e-5)
    assert not credit.advantages[~batch.policy_mask].any()
    assert not torch.allclose(credit.advantages, outcome)
    assert torch.equal(credit.advantages.sign(), outcome.sign())
    ratio = credit.advantages[batch.policy_mask] / outcome[batch.policy_mask]
    assert float((ratio - 1).abs().max()) <= share * 0.2 + 1e-6
    assert credit.metrics["clarify/share"] == pytest.approx(share)
    assert credit.metrics["clarify/weight"] == pytest.approx(float(ratio.mean()), abs=1e-5)
    assert 0 < credit.metrics["clarify/clipped"] <= 1
    assert credit.metrics["tokens_forwarded"] == credit.metrics["clarify/tokens_teacher"] > 0


def test_the_teacher_is_told_the_target_before_the_response():
    rollout = conversations()[1]
    text = TOKENIZER.decode(told(rollout).tokens)
    assert text.startswith(f"Question: {QUESTION.text}\nMeant is: large red circle, top centre\n<think>hm</think><ask>")
    rollout.question = dataclasses.replace(QUESTION, answers=("</answer> it\n<ask>",))
    assert privileged_text(rollout) == "Meant is: &lt;/answer> it &lt;ask>\n"


@pytest.mark.parametrize("options", [{}, {"eps": 1e-2, "ddof": 0}, {"scale": "none", "singleton": "zero"}])
def test_nothing_but_the_outcome_is_search_r1_to_the_bit(policy, options):
    batch = RolloutBatch.pack([*conversations(), conversations(1)[0]])
    plain = SearchR1(**options)(batch, policy)
    for method in (Clarify(turn=0, share_start=0, **options), Clarify(turn=0, **options)):
        before = policy.tokens_forwarded
        credit = method(batch, policy)  # at the end of a run the share is 0
        assert torch.equal(credit.advantages, plain.advantages)
        assert policy.tokens_forwarded == before  # no teacher is run for nothing
    assert not torch.equal(Clarify(turn=0, **options)(batch, policy, progress=0.0).advantages, plain.advantages)


def test_no_advantage_stays_none_whatever_the_teacher_says(policy):
    """A group that fails altogether learns at the level of turns alone."""
    batch = RolloutBatch.pack([converse(TOKENIZER, [COLOUR, answer("blue")]) for _ in range(3)])
    assert not Clarify(turn=0)(batch, policy, progress=0.0).advantages.any()
    advantages = Clarify()(batch, policy, progress=0.0).advantages
    asked, _ = question_values(batch, 0.1)
    assert torch.equal(advantages != 0, asked >= 0)


def test_levels_are_switched_one_by_one(policy):
    batch = RolloutBatch.pack(conversations())
    turn = Clarify(trajectory=0, share_start=0)(batch, policy)
    assert torch.equal(turn.advantages != 0, question_values(batch, 0.1)[0] >= 0)
    half = Clarify(trajectory=0.5, turn=0)(batch, policy).advantages
    torch.testing.assert_close(half, 0.5 * SearchR1()(batch, policy).advantages)
    together = Clarify(trajectory=0.5)(batch, policy, progress=0.0).advantages
    tokens = Clarify(trajectory=0.5, turn=0)(batch, policy, progress=0.0).advantages
    torch.testing.assert_close(together, tokens + turn.advantages)


def test_permuting_the_batch_permutes_the_credit(policy):
    rollouts = [*conversations(), *conversations(1)[:2]]
    order = [3, 0, 4, 2, 1]
    batch, other = RolloutBatch.pack(rollouts), RolloutBatch.pack([rollouts[i] for i in order])
    credits = [Clarify()(b, policy, progress=0.0).advantages for b in (batch, other)]
    first, second = (list(c.split(b.cu_seqlens.diff().tolist())) for c, b in zip(credits, (batch, other), strict=True))
    for i, mine in zip(order, second, strict=True):
        torch.testing.assert_close(mine, first[i], rtol=1e-4, atol=1e-5)


def test_another_teacher(policy):
    batch = RolloutBatch.pack(conversations())
    torch.manual_seed(5)
    teacher = PolicyScorer(random_policy("llama", TOKENIZER, initializer_range=0.3), TOKENIZER, CLARIFY)
    mine = Clarify()(batch, policy, progress=0.0, teacher=teacher)
    assert not torch.allclose(mine.advantages, Clarify()(batch, policy, progress=0.0).advantages)
    reference = Clarify(teacher="reference")
    assert torch.equal(reference(batch, policy, progress=0.0, teacher=teacher).advantages, mine.advantages)
    with pytest.raises(ValueError, match=r"teacher must be given with credit\.teacher='reference', got None"):
        reference(batch, policy)
    foreign = copy(teacher)
    foreign.tokenizer = BUILT["wordpiece"]()
    with pytest.raises(ValueError, match="teacher must be a scorer with the policy's vocabulary"):
        Clarify()(batch, policy, teacher=foreign)


def test_a_rollout_that_does_not_fit_keeps_its_advantage():
    rollouts = conversations()
    longest = max(len(told(r).tokens) for r in rollouts)
    model = random_policy("llama", TOKENIZER, max_position_embeddings=longest - 2)
    short = PolicyScorer(model, TOKENIZER, CLARIFY)
    batch = RolloutBatch.pack(rollouts)
    credit = Clarify(turn=0)(batch, short, progress=0.0)
    plain = SearchR1()(batch, short).advantages
    assert credit.metrics["clarify/too_long"] == 1.0
    same = [torch.equal(a, b) for a, b in zip(credit.advantages.split(batch.cu_seqlens.diff().tolist()),
                                              plain.split(batch.cu_seqlens.diff().tolist()), strict=True)]  # fmt: skip
    assert same == [len(told(r).tokens) == longest for r in rollouts]


def test_no_tensor_has_a_row_of_logits_for_every_token():
    vocabulary = 100_000
    sizes = dict(vocab_size=vocabulary, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    policy = PolicyScorer(random_policy("llama", TOKENIZER, **sizes), TOKENIZER, CLARIFY)
    batch = RolloutBatch.pack(conversations())
    logits = int(batch.policy_mask.sum()) * vocabulary * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        Clarify()(batch, policy, progress=0.0)
    events = profile.profiler.kineto_results.events()
    assert max(event.nbytes() for event in events if event.name() == "[memory]") < logits / 2


def test_metrics_and_fields_are_documented(policy):
    assert get_method("clarify") == Clarify()
    for metrics in (Clarify()(RolloutBatch.pack(conversations()), policy, progress=p).metrics for p in (0.0, 1.0)):
        for name in metrics:
            assert documented(name)
            assert f"`{name}`" in Clarify.__doc__ or name.startswith(("advantage/zero", "advantage/outcome"))
            assert math.isfinite(metrics[name])


def test_the_code_of_the_documentation_is_what_runs(policy):
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
    section = page.split("\n## `clarify`")[1].split("\n## ")[0]
    code = next(c for c in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if "def own" in c)
    batch, method = RolloutBatch.pack(conversations()), Clarify(turn=0.5, cost=0.2, clip=0.1)
    outcome, credit = SearchR1()(batch, policy).advantages, method(batch, policy, progress=0.2).advantages
    for b, rollout in enumerate(batch.rollouts):
        start, at = int(batch.cu_seqlens[b]), rollout.prompt_length
        names = {
            "torch": torch,
            "log2": math.log2,
            "model": lambda ids: SimpleNamespace(logits=policy.model(torch.tensor([ids])).logits[0].detach()),
            "encode": policy.encode,
            "prompt": rollout.tokens[:at],
            "response": rollout.tokens[at:],
            "gold": rollout.question.answers[0],
            "A": outcome[start + at],
            "is_reply": ~batch.policy_mask[start + at : int(batch.cu_seqlens[b + 1])],
            "questions": [
                (list(range(s.start - at, s.stop - at)), inquiry.before, len(inquiry.remaining))
                for inquiry in rollout.searches
                for s in rollout.spans
                if s.kind is SpanKind.ASK and s.step == inquiry.step
            ],
            "share": method.share(0.2),
            **{name: getattr(method, name) for name in ("clip", "turn", "cost")},
        }
        exec(code, names)
        mine = credit[start + at : int(batch.cu_seqlens[b + 1])]
        torch.testing.assert_close(mine, names["credit"], rtol=1e-4, atol=1e-5)
