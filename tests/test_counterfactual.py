from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scripted_rollouts import REFINE, SEARCH_R1, random_policy, write
from stepcredit.batch import RolloutBatch
from stepcredit.branches.packing import TokenTree, pack
from stepcredit.counterfactual import score_steps
from stepcredit.rollout import Question, SpanKind
from stepcredit.scorer import PolicyScorer
from tokenizers_under_test import BUILT

TOKENIZER = BUILT["byte_bpe"]()
QUESTIONS = [
    Question("a", "Which river flows through Lyon?", ("Rhône", "the Rhône")),
    Question("b", "What is the capital of France?", ("Paris",)),
    Question("c", "Who is mayor?", ("e",)),
]


def rollouts(tokenizer=TOKENIZER, protocol=REFINE):
    refined = protocol is REFINE
    return [
        write(tokenizer, QUESTIONS[0], [
            ("river in Lyon", "Lyon lies on the Rhône and the Saône.", "Rhône." if refined else None),
            ("Rhône", "The Rhône is a river.", None),
        ], protocol=protocol),
        write(tokenizer, QUESTIONS[0], [("Lyon", "Lyon is a city in France.", None)], protocol=protocol),
        write(tokenizer, QUESTIONS[1], [
            ("capital of France", "Paris is the capital of France.", "Paris is it" if refined else None),
            ("Paris", "Paris lies on the Seine.", "the Seine" if refined else None),
            ("more", "The Seine is a river in France, too.", None),
        ], protocol=protocol, group=1),
        write(tokenizer, QUESTIONS[2], [("mayor of Paris", "A mayor is elected.", None)], protocol=protocol, group=2),
    ]  # fmt: skip


def make(items=None, family="llama", protocol=REFINE, tokenizer=TOKENIZER, **changes):
    items = rollouts(tokenizer, protocol) if items is None else items
    for rollout in items:
        rollout.rewards.setdefault("total", 0.0)
    return RolloutBatch.pack(items), Recorder(random_policy(family, tokenizer, **changes), tokenizer, protocol)


class Recorder(PolicyScorer):
    """Keeps the trees it was asked to score."""

    def logprobs(self, trees, *, max_tokens=16384):
        self.trees = list(trees)
        return super().logprobs(trees, max_tokens=max_tokens)


def separate(policy, context, answer, head_tokens=0, head_weight=1.0):
    """Mean log-prob of the answer by a plain forward pass over a context of its own, its first tokens weighted."""
    ids = torch.tensor([[*context, *answer]])
    with torch.no_grad():
        logp = policy.model(ids).logits[0].float().log_softmax(-1)
    at = torch.arange(len(context) - 1, ids.shape[1] - 1)
    weights = [head_weight if k < head_tokens else 1.0 for k in range(len(answer))]
    return float(logp[at, ids[0, len(context) :]] @ torch.tensor(weights)) / sum(weights)


def whole(tree: TokenTree, segment: int, count: int) -> list[int]:
    """The first tokens of the path to a place, as a separate sequence holds them."""
    if segment < 0:
        return []
    s = tree.segments[segment]
    return [*whole(tree, s.parent, s.at), *s.tokens[:count]]


def steps(batch):
    return list(zip(batch.step_rollout.tolist(), batch.step_index.tolist(), strict=True))


def contexts(policy):
    """For every read of every tree: (name, context tokens, answer tokens)."""
    for tree in policy.trees:
        for read in tree.reads:
            segment, index = read.rows[0]
            yield tree.name, whole(tree, segment, index + 1), list(read.targets)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"max_variants": 2, "num_random": 2}, {"trunk": "skeleton"}])
def test_parity_with_separate_forwards(family, options):
    batch, policy = make(family=family, tie_word_embeddings=family == "qwen2")
    gains = score_steps(batch, policy, **options)
    assert gains.scored.all()
    assert float(gains.gain.abs().max()) > 0.1  # the policy does tell contexts apart
    logprobs = PolicyScorer.logprobs(policy, policy.trees, max_tokens=300)
    at = 0
    for _, context, answer in contexts(policy):
        mean = float(logprobs[at : at + len(answer)].mean())
        assert mean == pytest.approx(separate(policy, context, answer), abs=1e-5)
        at += len(answer)
    assert at == logprobs.numel()


@pytest.mark.parametrize(("max_variants", "head"), [(1, (0, 1.0)), (2, (0, 1.0)), (2, (2, 3.0))])
def test_parity_with_contexts_built_here(max_variants, head):
    """Without refinements the contexts are plain slices of the rollouts: rebuilt here from spans alone."""
    batch, policy = make(protocol=SEARCH_R1)
    gains = score_steps(batch, policy, max_variants=max_variants, head_tokens=head[0], head_weight=head[1])
    probe = TOKENIZER.encode(SEARCH_R1.answer_probe)
    for s, (b, t) in enumerate(steps(batch)):
        rollout = batch.rollouts[b]
        shown = rollout.find(SpanKind.DOCUMENTS, t)
        best = None
        for text in rollout.question.answers[:max_variants]:
            answer = TOKENIZER.encode(" " + text)
            real = separate(policy, [*rollout.tokens[: shown.stop], *probe], answer, *head)
            others = []
            for b2, t2 in gains.draws[s]:
                span = batch.rollouts[b2].find(SpanKind.DOCUMENTS, t2)
                swapped = [*rollout.tokens[: shown.start], *batch.rollouts[b2].tokens[span.start : span.stop]]
                others.append(separate(policy, [*swapped, *probe], answer, *head))
            if best is None or real > best[0]:
                best = real, others
        assert float(gains.real[s]) == pytest.approx(best[0], abs=1e-5)
        assert gains.counterfactual[s].tolist() == pytest.approx(best[1], abs=1e-5)
        assert float(gains.gain[s]) == pytest.approx(best[0] - sum(best[1]) / len(best[1]), abs=1e-5)


def _text(policy, ids):
    return "".join(policy.decode(ids).split())


@pytest.mark.parametrize("name", list(BUILT))
@pytest.mark.parametrize("trunk", ["rollout", "skeleton"])
def test_contexts_read_as_they_should(name, trunk):
    """Text of the contexts, whitespace and case aside, for tokenizers that merge tags with their neighbours."""
    tokenizer = BUILT[name]()
    batch, policy = make(tokenizer=tokenizer)
    gains = score_steps(batch, policy, num_random=1, trunk=trunk)
    expected = []
    then = "" if trunk == "skeleton" else "<think>then</think>"
    docs = {
        (b, t): f"<documents>City:{p}</documents>" for (b, t), p in {
            (0, 0): "Lyon lies on the Rhône and the Saône.", (0, 1): "The Rhône is a river.",
            (1, 0): "Lyon is a city in France.", (2, 0): "Paris is the capital of France.",
            (2, 1): "Paris lies on the Seine.", (2, 2): "The Seine is a river in France, too.",
            (3, 0): "A mayor is elected.",
        }.items()
    }  # fmt: skip
    refined = {(0, 0): "Rhône.", (2, 0): "Paris is it", (2, 1): "the Seine"}
    block = {k: d + (f"{then}<refine>{refined[k]}</refine>" if k in refined else "") for k, d in docs.items()}
    queries = {(0, 0): "river in Lyon", (0, 1): "Rhône", (1, 0): "Lyon", (2, 0): "capital of France",
               (2, 1): "Paris", (2, 2): "more", (3, 0): "mayor of Paris"}  # fmt: skip
    keys = steps(batch)
    drawn = dict(zip(keys, gains.draws, strict=True))
    for b, rollout in enumerate(batch.rollouts):
        before, real, other = f"Question: {rollout.question.text}<think>hm, first</think>", [], []
        mine = [k for k in keys if k[0] == b]
        for k in mine:
            before += f"<search>{queries[k]}</search>"
            real.append(f"{before}{block[k]}<answer>")
            (draw,) = drawn[k]
            other.append(f"{before}{block[draw]}<answer>")
            before += block[k] + ("" if k in refined else then)
        expected += real + other
    got = [_text(policy, c) for _, c, _ in contexts(policy)]
    assert sorted(g.lower() for g in got) == sorted("".join(e.split()).lower() for e in expected)


@pytest.mark.parametrize("baseline", ["empty", "previous"])
def test_other_baselines(baseline):
    batch, policy = make([r for i, r in enumerate(rollouts()) if i != 1])  # a tree a rollout
    gains = score_steps(batch, policy, baseline=baseline)
    assert gains.scored.all()
    assert gains.counterfactual.shape == (batch.num_steps, 1)
    assert gains.draws == ((),) * batch.num_steps
    at = 0
    for rollout, tree in zip(batch.rollouts, policy.trees, strict=True):
        got = [_text(policy, whole(tree, r.rows[0][0], r.rows[0][1] + 1)) for r in tree.reads]
        real, counterfactual = got[: len(got) // 2], got[len(got) // 2 :]
        if baseline == "previous":
            prompt = _text(policy, TOKENIZER.encode(f"Question: {rollout.question.text}"))
            assert counterfactual == [f"{prompt}<answer>", *real[:-1]]
            # each is the real leaf of the step before: stored once, and the same number
            assert gains.baseline[at + 1 : at + len(real)].equal(gains.real[at : at + len(real) - 1])
        else:
            assert all(c.endswith("</search><answer>") for c in counterfactual)
        at += len(real)


@pytest.mark.parametrize("max_tokens", [1, 700, 10**6])
def test_results_do_not_depend_on_the_packing(max_tokens):
    batch, policy = make()
    whole_batch = score_steps(batch, policy, max_tokens=2000)
    packed = score_steps(batch, policy, max_tokens=max_tokens)
    torch.testing.assert_close(packed.gain, whole_batch.gain, atol=1e-5, rtol=0)
    bins = pack(policy.trees, max_tokens)
    assert all(b.tokens.numel() <= max_tokens or len(b.row_trees.unique()) == 1 for b in bins)
    assert sum(b.tokens.numel() for b in bins) == sum(packed.tokens_forwarded.values())
    # a tree that does not fit is split, down to one for each of the seven steps
    assert len(policy.trees) == (7 if max_tokens == 1 else 3)


def test_rollouts_of_a_question_share_what_they_have_in_common():
    """A copy of a rollout costs nothing, and gets the same draws and gains; shared prompts are stored once."""
    items = rollouts()
    copied, same = make([*items, *rollouts()[:2]])
    b = score_steps(copied, same)
    alone, policy = make(items)
    a = score_steps(alone, policy, draws=[[(r % 4, t) for r, t in drawn] for drawn in b.draws[:7]])
    assert b.tokens_forwarded == a.tokens_forwarded
    assert [t.name for t in same.trees] == ["question 'a'", "question 'b'", "question 'c'"]
    own = {key: s for s, key in enumerate(steps(copied))}
    for b2, t in [(0, 0), (0, 1), (1, 0)]:
        assert b.draws[own[b2, t]] == b.draws[own[b2 + 4, t]]
        assert b.gain[own[b2, t]] == b.gain[own[b2 + 4, t]]
    first, second = (r.tokens[: r.find(SpanKind.DOCUMENTS, 0).start] for r in items[:2])
    common = next(i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)
    lengths = [max(r.find(SpanKind.DOCUMENTS, t).stop for t in r.steps()) for r in rollouts(protocol=SEARCH_R1)]
    plain, policy = make(protocol=SEARCH_R1)
    assert common > items[0].prompt_length
    assert score_steps(plain, policy).tokens_forwarded["trunk"] == sum(lengths) - common


def test_draws_do_not_depend_on_the_order_of_the_batch():
    batch, policy = make()
    order = [2, 0, 3, 1]
    shuffled, _ = make([batch.rollouts[i] for i in order])
    a, b = score_steps(batch, policy, step=3), score_steps(shuffled, policy, step=3)
    place = {old: new for new, old in enumerate(order)}
    by_step = {key: s for s, key in enumerate(steps(shuffled))}
    for s, (rollout, step) in enumerate(steps(batch)):
        other = by_step[place[rollout], step]
        assert [(place[r], t) for r, t in a.draws[s]] == list(b.draws[other])
        assert float(a.gain[s]) == pytest.approx(float(b.gain[other]), abs=1e-5)


def test_draws_differ_by_seed_and_step_and_repeat_otherwise():
    batch, policy = make()
    state = torch.get_rng_state()
    draws = {(seed, step): score_steps(batch, policy, seed=seed, step=step).draws for seed in (0, 1) for step in (0, 1)}
    assert len(set(draws.values())) == 4
    assert score_steps(batch, policy, seed=1, step=1).draws == draws[1, 1]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("pool", ["other_questions", "batch"])
def test_pool(pool):
    batch, policy = make()
    gains = score_steps(batch, policy, num_random=3, pool=pool)
    same = 0
    for s, drawn in enumerate(gains.draws):
        own = int(batch.step_rollout[s]), int(batch.step_index[s])
        assert len(set(drawn)) == 3
        assert own not in drawn
        same += sum(batch.rollouts[b].question.id == batch.rollouts[own[0]].question.id for b, _ in drawn)
    assert (same == 0) == (pool == "other_questions")
    assert gains.counts["pool_size"] == 7


def test_pool_too_small():
    batch, policy = make()
    many = score_steps(batch, policy, num_random=5)  # question a has 4 candidates, b 4, c 6
    assert many.counts["pool_repeated"] == 6
    assert all(len(d) == 5 for d in many.draws)
    alone, _ = make(rollouts()[:2])  # one question only
    fallen = score_steps(alone, policy, num_random=1)
    assert fallen.counts["pool_fallback"] == 3
    assert fallen.scored.all()
    one, _ = make(rollouts()[1:2])
    nothing = score_steps(one, policy)
    assert nothing.counts["unscored_empty_pool"] == 1
    assert nothing.gain.isnan().all()
    assert not nothing.scored.any()


def test_passages_equal_to_the_own_are_never_drawn():
    items = [
        write(TOKENIZER, q, [("x", "Everyone finds the same passage.", None)], group=g) for g, q in enumerate(QUESTIONS)
    ]
    items.append(write(TOKENIZER, QUESTIONS[1], [("y", "But this one is different.", None)], group=1))
    batch, policy = make(items)
    gains = score_steps(batch, policy, num_random=2)
    assert [set(d) for d in gains.draws[:3]] == [{(3, 0)}, {(3, 0)}, {(3, 0)}]
    assert gains.counts["pool_fallback"] == 1  # question b: the different passage is its own question's


def test_draws_are_from_distinct_passages():
    """Six rollouts that found one passage lend it once; of two passages three draws repeat, which is counted."""
    items = [write(TOKENIZER, QUESTIONS[0], [("x", "Lyon lies on the Rhône.", None)])]
    items += [write(TOKENIZER, QUESTIONS[1], [(f"q{i}", "Paris is the capital.", None)], group=1) for i in range(6)]
    items += [write(TOKENIZER, QUESTIONS[2], [("y", "A mayor is elected.", None)], group=2)]
    batch, policy = make(items)
    two, three = (score_steps(batch, policy, num_random=n) for n in (2, 3))
    assert len(set(two.counterfactual[0].tolist())) == 2
    assert (two.counts["pool_repeated"], three.counts["pool_repeated"]) == (0, 8)


def test_replaying_the_own_passages_gives_no_gain():
    batch, policy = make()
    own = [(key,) for key in steps(batch)]
    gains = score_steps(batch, policy, draws=own)
    assert gains.scored.all()
    torch.testing.assert_close(gains.gain, torch.zeros_like(gains.gain), atol=2e-6, rtol=0)


def test_replaying_draws_repeats_the_gains():
    batch, policy = make()
    first = score_steps(batch, policy, seed=5)
    again = score_steps(batch, policy, seed=6, draws=first.draws)
    assert torch.equal(first.gain, again.gain)
    with pytest.raises(ValueError, match="7 steps"):
        score_steps(batch, policy, draws=first.draws[:-1])
    with pytest.raises(ValueError, match=r"draws names \(9, 0\)"):
        score_steps(batch, policy, draws=[[(9, 0)]] * 7)


def test_unscored_steps_are_counted_and_lend_nothing():
    items = [
        write(TOKENIZER, QUESTIONS[0], [("x", None, None), ("y", "Lyon lies on the Rhône.", None)]),
        write(TOKENIZER, QUESTIONS[1], [("x", "hm", None), ("y", "Paris is the capital.", None)], group=1),
    ]
    items[1].searches[0] = replace(items[1].searches[0], query="short")
    batch, policy = make(items)
    gains = score_steps(batch, policy)
    # "City: hm" inside the tags has 8 characters
    assert gains.scored.tolist() == [False, True, False, True]
    assert gains.gain.isnan().tolist() == [True, False, True, False]
    counted = {k: v for k, v in gains.counts.items() if v}
    assert counted == {"steps": 4, "scored": 2, "pool_size": 2, "pool_repeated": 2,
                       "unscored_no_documents": 1, "unscored_short_documents": 1}  # fmt: skip
    assert set(gains.draws) == {(), ((1, 1),) * 3, ((0, 1),) * 3}


def test_answers_without_a_weighted_token_are_unscored_and_counted():
    batch, policy = make()
    # " Paris" and " e" have two tokens, " Rhône" has six.
    gains = score_steps(batch, policy, head_tokens=2, head_weight=0.0)
    assert gains.scored.tolist() == [True] * 3 + [False] * 4
    assert gains.gain.isnan().tolist() == [False] * 3 + [True] * 4
    assert (gains.counts["scored"], gains.counts["unscored_no_weight"]) == (3, 4)


def test_contexts_of_a_step_are_cut_alike_on_their_left():
    """To the limit, or to the positions of the model; against separate forwards of the cut contexts."""
    batch, policy = make(protocol=SEARCH_R1)
    limit = max(len(r.tokens) for r in batch.rollouts) // 2
    gains = score_steps(batch, policy, max_context=limit, num_random=1)
    assert 0 < gains.counts["truncated"] < 7
    assert gains.counts["scored"] == 7
    probe = TOKENIZER.encode(SEARCH_R1.answer_probe)
    cuts = []
    for s, (b, t) in enumerate(steps(batch)):
        rollout, other = batch.rollouts[b], batch.rollouts[gains.draws[s][0][0]]
        shown, lent = rollout.find(SpanKind.DOCUMENTS, t), other.find(SpanKind.DOCUMENTS, gains.draws[s][0][1])
        answer = TOKENIZER.encode(" " + rollout.question.answers[0])
        real = [*rollout.tokens[: shown.stop], *probe]
        swapped = [*rollout.tokens[: shown.start], *other.tokens[lent.start : lent.stop], *probe]
        cuts.append(max(0, max(len(real), len(swapped)) + len(answer) - limit))
        assert float(gains.real[s]) == pytest.approx(separate(policy, real[cuts[-1] :], answer), abs=1e-5)
        assert float(gains.baseline[s]) == pytest.approx(separate(policy, swapped[cuts[-1] :], answer), abs=1e-5)
    assert sum(cut > 0 for cut in cuts) == gains.counts["truncated"]
    small, tiny = make(protocol=SEARCH_R1, max_position_embeddings=limit)
    assert score_steps(small, tiny, num_random=1).gain.equal(gains.gain)


def test_a_limit_that_leaves_nothing_of_the_rollout():
    batch, policy = make()
    gains = score_steps(batch, policy, max_context=12)
    assert gains.counts["unscored_too_long"] == 7
    assert gains.counts["truncated"] == 0
    assert not gains.scored.any()


def test_an_answer_without_tokens_is_skipped_and_counted():
    class Deaf(Recorder):
        def encode(self, text):
            return [] if text in (" Paris", " Rhône") else super().encode(text)

    batch, policy = make()
    gains = score_steps(batch, Deaf(policy.model, TOKENIZER, REFINE))
    assert gains.counts["unscored_no_answer"] == 3  # question b; question a falls back to its alias
    assert gains.counts["empty_answers"] == 3 + 3  # the other question has an answer of its own
    assert gains.scored.tolist() == [True, True, True, False, False, False, True]


@pytest.mark.parametrize(("answer_probe", "expected"), [(None, " Paris"), ("\n<answer> ", "Paris")])
def test_an_answer_is_set_off_from_its_probe_by_one_space(answer_probe, expected):
    class Recording(Recorder):
        def encode(self, text):
            asked.append(text)
            return super().encode(text)

    asked = []
    batch, policy = make()
    score_steps(batch, Recording(policy.model, TOKENIZER, REFINE), answer_probe=answer_probe)
    assert expected in asked


def test_old_log_probs_from_the_same_pass():
    batch, policy = make()
    gains = score_steps(batch, policy, temperature=0.7)
    plain = score_steps(batch, policy)
    torch.testing.assert_close(gains.gain, plain.gain, atol=1e-5, rtol=0)
    cu = batch.cu_seqlens.tolist()
    for b, rollout in enumerate(batch.rollouts):
        ids = torch.tensor([rollout.tokens])
        with torch.no_grad():
            logp = (policy.model(ids).logits[0].float() / 0.7).log_softmax(-1)
        expected = torch.zeros(len(rollout.tokens))
        expected[1:] = logp[:-1].gather(1, ids[0, 1:, None])[:, 0]
        mask = batch.policy_mask[cu[b] : cu[b + 1]]
        torch.testing.assert_close(gains.logprobs[cu[b] : cu[b + 1]], expected * mask, atol=1e-5, rtol=0)
    assert gains.tokens_forwarded["real"] == plain.tokens_forwarded["real"]
    with pytest.raises(ValueError, match="needs trunk='rollout'"):
        score_steps(batch, policy, temperature=1.0, trunk="skeleton")


def test_nothing_to_score():
    batch, policy = make([write(TOKENIZER, QUESTIONS[0], [])])
    gains = score_steps(batch, policy)
    assert gains.gain.shape == (0,)
    assert gains.tokens_forwarded == {"trunk": 0, "real": 0, "counterfactual": 0}


def test_bad_options():
    batch, policy = make()
    for options, message in (
        (dict(baseline="emty"), "baseline must be one of"),
        (dict(trunk="text"), "trunk must be one of"),
        (dict(pool="all"), "pool must be one of"),
        (dict(num_random=0), "num_random must be at least 1, got 0"),
        (dict(max_variants=0), "max_variants must be at least 1"),
        (dict(max_tokens=0), "max_tokens must be at least 1"),
        (dict(temperature=0.0), "temperature must be positive, got 0.0"),
        (dict(baseline="empty", draws=[()] * 7), "draws needs baseline='random'"),
    ):
        with pytest.raises(ValueError, match=message):
            score_steps(batch, policy, **options)
    small = random_policy("llama", TOKENIZER, vocab_size=40)
    with pytest.raises(ValueError, match="not in the model's vocabulary of 40"):
        score_steps(batch, PolicyScorer(small, TOKENIZER, REFINE))
