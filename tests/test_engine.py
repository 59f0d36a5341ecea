from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from stepcredit.environments.search import SearchEnvironment
from stepcredit.protocol import get_protocol
from stepcredit.retrieval import Hits, Passage
from stepcredit.rollout import ENVIRONMENT_KINDS, Question, SpanKind
from stepcredit.train.engine import HFEngine, Sampling
from tokenizers_under_test import byte_bpe

PROTOCOL = get_protocol("search_r1")
TAGS = ["<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>"]
WORDS = [f"w{i}" for i in range(24)]
VOCABULARY = {t: i for i, t in enumerate(["<unk>", "<eos>", *TAGS, "Question", ":", *WORDS])}
QUESTIONS = [Question(f"q{n}", " ".join(WORDS[: n + 1]), ("w1",)) for n in range(4)]
LIMITS = {"max_turn_tokens": 9, "max_answer_tokens": 5}
GREEDY = Sampling(greedy=True, **LIMITS)


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    words = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"</?\w+>|\w+|:"), "removed", invert=True)
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")


class Fake:
    """One passage per query, of a length that depends on the query."""

    def search(self, queries, k):
        rows = [[Passage(f"p-{q}", "w2", " ".join(WORDS[: 1 + sum(map(ord, q)) % 7]))] for q in queries]
        return Hits(np.ones((len(rows), 1), np.float32), [[p.id for p in r] for r in rows], rows)


def grammar():
    """Logit bonus [V, V] by last token: within it the random weights choose, so that rollouts are well-formed but
    differ, and depend on everything they attend to."""
    bonus = torch.zeros(len(VOCABULARY), len(VOCABULARY))

    def allow(last, following, strength=40.0):
        for a in last:
            for b in following:
                bonus[VOCABULARY[a], VOCABULARY[b]] = strength

    start, query, answer = [":", "</information>", "<unk>", *WORDS[:4]], WORDS[4:12], WORDS[12:20]
    allow(start, ["<answer>"])
    allow(start, ["<search>"], 43.0)
    allow(["<search>"], query)
    allow(query, query)
    allow(query, ["</search>"], 42.0)
    allow(["<answer>"], answer)
    allow(answer, answer)
    allow(answer, ["</answer>"], 42.0)
    return bonus


def scripted(base, bonus):
    """A model class whose logits get a bonus by the last input token: the same with and without a cache."""

    class Scripted(base):
        def forward(self, input_ids, logits_to_keep=0, **kwargs):
            output = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
            output.logits = output.logits + bonus[input_ids[:, -output.logits.shape[1] :] % len(bonus)]
            return output

    return Scripted


SHAPE = dict(vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
ZOO = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, **HEADS)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, **HEADS)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, **HEADS, sliding_window=6)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SHAPE, **HEADS, head_dim=8, sliding_window=6)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**SHAPE, n_positions=256, n_head=4, bos_token_id=None, eos_token_id=1)),
}


def build(name="llama", seed=0, bonus=None, **changes):
    base, config = ZOO[name]
    config = type(config)(
        **{**config.to_dict(), **changes, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 1}
    )
    torch.manual_seed(seed)
    model = scripted(base, grammar() if bonus is None else bonus)(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def engine(model, tokenizer, **kwargs):
    return HFEngine(model, tokenizer, PROTOCOL, **kwargs)


def environment(**kwargs):
    return SearchEnvironment(Fake(), PROTOCOL, **{"top_k": 1, "max_searches": 2, **kwargs})


def essence(rollouts):
    return [(r.question.id, r.group, r.tokens, r.finish, r.answer, r.counts) for r in rollouts]


def policy_positions(rollout):
    return [i for s in rollout.spans if s.kind not in ENVIRONMENT_KINDS for i in range(s.start, s.stop)]


def full_logprobs(model, rollout, temperature=1.0):
    """Without a cache: [len - 1, V] log-probs of the next token."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([rollout.tokens]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float() / temperature, -1)


@pytest.mark.parametrize("name", ZOO)
def test_greedy_with_the_kept_cache_is_greedy_by_full_forwards(name, tokenizer):
    model = build(name)
    rollouts = engine(model, tokenizer).rollout(QUESTIONS, environment(), GREEDY)
    assert max(len(r.searches) for r in rollouts) == 2
    assert len({len(r.tokens) for r in rollouts}) > 1  # rows of different lengths were batched
    for rollout in rollouts:
        expected = full_logprobs(model, rollout)
        at = torch.tensor(policy_positions(rollout))
        # By induction over positions this is greedy decoding with a full forward per token.
        assert expected[at - 1].argmax(-1).tolist() == [rollout.tokens[i] for i in at]
        recorded = torch.tensor([rollout.logprobs[i] for i in at])
        assert (recorded - expected[at - 1].amax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_tempered_and_not_truncated(temperature, tokenizer):
    model = build()
    sampling = Sampling(temperature=temperature, top_p=0.8, seed=3, **LIMITS)
    for rollout in engine(model, tokenizer).rollout(QUESTIONS, environment(), sampling, group_size=3):
        expected = full_logprobs(model, rollout, temperature)
        for i in policy_positions(rollout):
            assert abs(expected[i - 1, rollout.tokens[i]].item() - rollout.logprobs[i]) < 1e-4


def test_no_token_is_forwarded_twice(tokenizer):
    model = build()
    columns = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: columns.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    e = engine(model, tokenizer)
    rollouts = e.rollout(QUESTIONS, environment(), Sampling(seed=1, **LIMITS), group_size=4)
    # The prompt once per group, and every later token once but for the last, which nothing follows.
    expected = sum(rollouts[4 * g].prompt_length for g in range(len(QUESTIONS)))
    expected += sum(len(r.tokens) - r.prompt_length - 1 for r in rollouts)
    assert e.tokens_forwarded == expected
    assert any(len(r.searches) == 2 for r in rollouts)
    columns.clear()
    (single,) = e.rollout(QUESTIONS[:1], environment(), GREEDY)
    assert sum(columns) == len(single.tokens) - 1  # one row has no padding, so that the columns are the tokens
    assert e.tokens_forwarded == expected + sum(columns)


def test_groups_and_order(tokenizer):
    done = []
    rollouts = engine(build(), tokenizer, max_batch=3).rollout(
        QUESTIONS, environment(), Sampling(**LIMITS), group_size=2, progress=done.append
    )
    assert [(r.question.id, r.group) for r in rollouts] == [(f"q{g}", g) for g in range(4) for _ in range(2)]
    assert sum(done) == len(rollouts)
    assert all(n > 0 for n in done)
    assert engine(build(), tokenizer).rollout([], environment(), GREEDY) == []


def test_the_split_into_batches_changes_nothing(tokenizer):
    for sampling in (GREEDY, Sampling(seed=5, **LIMITS)):
        results = [
            essence(engine(build(), tokenizer, max_batch=n).rollout(QUESTIONS, environment(), sampling, group_size=2))
            for n in (1, 4, 64)
        ]
        assert results[0] == results[1] == results[2]


def test_the_seed_decides(tokenizer):
    def sample(seed):
        return engine(build(), tokenizer).rollout(QUESTIONS, environment(), Sampling(seed=seed, **LIMITS), group_size=3)

    assert essence(sample(1)) == essence(sample(1))
    assert essence(sample(1)) != essence(sample(2))
    state = torch.get_rng_state()
    sample(1)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used


def test_members_of_a_group_differ(tokenizer):
    rollouts = engine(build(), tokenizer).rollout(QUESTIONS[:1], environment(), Sampling(**LIMITS), group_size=8)
    assert len({tuple(r.tokens) for r in rollouts}) > 1


def test_every_token_has_its_own_random_number(tokenizer):
    model = build(bonus=torch.zeros(1, 1))
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is equally probable
    sampling = Sampling(max_turn_tokens=100, max_answer_tokens=100)
    rollouts = engine(model, tokenizer).rollout(QUESTIONS, environment(max_invalid=0), sampling, group_size=16)
    sampled = torch.tensor([r.tokens[i] for r in rollouts for i in policy_positions(r)])
    pairs = torch.unique(torch.stack([sampled[:-1], sampled[1:]], 1), dim=0)
    assert len(sampled) > 1000
    assert len(pairs) > len(VOCABULARY) ** 2 / 2


def test_a_turn_stops_on_its_tag_and_environment_text_is_fed_as_encoded(tokenizer):
    for rollout in engine(build(), tokenizer).rollout(QUESTIONS, environment(), GREEDY):
        for search in rollout.searches:
            shown = rollout.find(SpanKind.DOCUMENTS, search.step)
            query = rollout.find(SpanKind.QUERY, search.step)
            assert tokenizer.decode(rollout.tokens[query.start : query.stop]) == search.query
            assert rollout.tokens[shown.start - 1] == VOCABULARY["</search>"]
            passage = Fake().search([search.query], 1).passages[0]
            assert rollout.tokens[shown.start : shown.stop] == tokenizer.encode(PROTOCOL.documents(passage))


def only(*steps):
    """A bonus that makes each token follow the one before it."""
    bonus = torch.zeros(len(VOCABULARY), len(VOCABULARY))
    for a, b in steps:
        bonus[VOCABULARY[a], VOCABULARY[b]] = 1e4
    return bonus


def run(tokenizer, bonus, *, question=QUESTIONS[0], sampling=GREEDY, env=None, **changes):
    (rollout,) = engine(build(bonus=bonus, **changes), tokenizer).rollout([question], env or environment(), sampling)
    return rollout


FOREVER = [("w0", "w5"), ("w5", "w6"), ("w6", "w5")]


def test_a_rollout_that_never_closes_its_tag(tokenizer):
    """Notice, then a forced answer, then the end."""
    bonus = only(*FOREVER, ("<unk>", "w5"), ("<answer>", "w5"))
    rollout = run(tokenizer, bonus)
    assert (rollout.finish, rollout.answer) == ("unclosed", None)
    assert rollout.counts == {"invalid_turns": 3, "forced_answers": 1}
    kinds = [s.kind for s in rollout.spans]
    assert kinds == [SpanKind.PROMPT, SpanKind.THINK, SpanKind.NOTICE, SpanKind.THINK, SpanKind.NOTICE, SpanKind.ANSWER]
    assert [s.stop - s.start for s in rollout.spans if s.by_policy] == [9, 9, 5]
    assert run(tokenizer, bonus, env=environment(max_invalid=0, force_answer=False)).finish == "unclosed"


def test_a_forced_answer_is_answer_text(tokenizer):
    bonus = only(("w0", "<search>"), ("<search>", "w3"), ("w3", "</search>"), ("<answer>", "w8"), ("w8", "</answer>"))
    rollout = run(tokenizer, bonus, env=environment(max_searches=1))
    assert (rollout.finish, rollout.answer, rollout.counts) == ("answered", "w8", {"forced_answers": 1})
    tail = [(s.kind, tokenizer.decode(rollout.tokens[s.start : s.stop])) for s in rollout.spans[-3:]]
    assert tail == [(SpanKind.NOTICE, "<answer>"), (SpanKind.ANSWER, "w8"), (SpanKind.TAG, "</answer>")]


def test_faults_are_counted_anew_in_an_episode(tokenizer):
    bonus = only(("w0", "w5"), ("<unk>", "w5"), ("w5", "<eos>"), ("<answer>", "w8"), ("w8", "</answer>"))
    rollout = run(tokenizer, bonus, env=environment(episodes=3))
    assert (rollout.finish, [e.answer for e in rollout.episodes]) == ("answered", ["w8"] * 3)
    assert rollout.counts == {"invalid_turns": 2 * 3, "forced_answers": 3}


def test_tags_spelt_letter_by_letter_close():
    letters = byte_bpe()
    chain = letters.convert_tokens_to_ids(list("x</answer>"))
    bonus = torch.zeros(len(letters), len(letters))
    bonus[:, chain[0]] = 1e4
    for last, following in pairwise(chain):
        bonus[last] = 0
        bonus[last, following] = 1e4
    model = build(bonus=bonus, vocab_size=len(letters))
    sampling = Sampling(greedy=True, max_turn_tokens=30, max_answer_tokens=30)
    (rollout,) = engine(model, letters).rollout(QUESTIONS[:1], environment(max_invalid=0), sampling)
    assert (rollout.finish, rollout.answer) == ("answered", "x")
    assert [s.stop - s.start for s in rollout.spans if s.kind is SpanKind.TAG] == [9, 9]


def test_end_of_sequence_ends_a_turn(tokenizer):
    rollout = run(tokenizer, only(("w0", "w5"), ("w5", "<eos>"), ("<answer>", "<eos>")), env=environment(max_invalid=0))
    assert rollout.counts == {"invalid_turns": 2, "forced_answers": 1}
    assert [s.stop - s.start for s in rollout.spans if s.by_policy] == [2, 1]


def test_an_empty_query_is_not_searched(tokenizer):
    rollout = run(tokenizer, only(("w0", "<search>"), ("<search>", "</search>"), ("<answer>", "</answer>")))
    assert rollout.searches == []
    assert rollout.counts["empty_queries"] >= 1


def test_forged_environment_tags_earn_nothing(tokenizer):
    bonus = only(
        ("w0", "<information>"), ("<information>", "w7"), ("w7", "</information>"), ("</information>", "<answer>")
    )
    rollout = run(tokenizer, bonus, env=environment(max_invalid=0))
    assert rollout.counts["forged_tags"] == 2
    assert rollout.find(SpanKind.DOCUMENTS, 0) is None
    forged = rollout.spans[1]
    assert (forged.kind, forged.stop - forged.start) == (SpanKind.THINK, 3)


def test_a_rollout_that_outgrows_the_context(tokenizer):
    in_turn = run(tokenizer, only(*FOREVER), max_position_embeddings=8)
    assert (in_turn.finish, len(in_turn.tokens), in_turn.answer) == ("context", 8, None)
    assert in_turn.counts == {}  # no turn was taken, so that none was invalid
    forced = run(
        tokenizer, only(*FOREVER, ("<answer>", "w5")), env=environment(max_invalid=0), max_position_embeddings=16
    )
    assert (forced.finish, forced.answer, len(forced.tokens)) == ("context", None, 16)
    assert forced.spans[-1].kind is SpanKind.ANSWER
    search = only(("w0", "<search>"), ("<search>", "w3"), ("w3", "</search>"))
    reply = run(tokenizer, search, max_position_embeddings=10)
    assert (reply.finish, reply.searches, reply.steps()) == ("context", [], [])
    assert tokenizer.decode(reply.tokens).endswith("<search> w3 </search>")
    answer = only(("w0", "<answer>"), ("<answer>", "w3"), ("w3", "</answer>"))
    exact = run(tokenizer, answer, max_position_embeddings=6)
    assert (exact.finish, exact.answer, len(exact.tokens)) == ("answered", "w3", 6)


def test_long_contexts_grow_the_cache(tokenizer):
    model = build()
    rollout = engine(model, tokenizer).rollout(
        [dataclasses.replace(QUESTIONS[0], text=" ".join(WORDS * 5))], environment(max_searches=6), GREEDY
    )[0]
    assert len(rollout.tokens) > 128
    at = torch.tensor(policy_positions(rollout))
    assert full_logprobs(model, rollout)[at - 1].argmax(-1).tolist() == [rollout.tokens[i] for i in at]


def test_a_prompt_longer_than_the_context(tokenizer):
    e = engine(build(max_position_embeddings=12), tokenizer)
    long = Question("long", " ".join(WORDS[:10]), ("x",))
    with pytest.raises(ValueError, match=r"question 'long': its prompt has 12 tokens.*context of 12"):
        e.rollout([QUESTIONS[0], long], environment(), GREEDY)
    assert e.tokens_forwarded == 0


def test_vocabulary_mismatch(tokenizer):
    with pytest.raises(ValueError, match=f"vocabulary mismatch: tokenizer has ids up to {len(VOCABULARY) - 1}"):
        engine(build(vocab_size=len(VOCABULARY) - 1), tokenizer)
    engine(build(vocab_size=len(VOCABULARY) + 3, bonus=torch.zeros(1, 1)), tokenizer)  # padded embeddings are usual


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(**LIMITS), Sampling(top_p=0.9, **LIMITS)])
def test_logits_that_are_no_distribution(value, sampling, tokenizer):
    bonus = grammar()
    bonus[VOCABULARY["w3"]] = value
    bonus[VOCABULARY["w2"], VOCABULARY["w3"]] = 1e4
    questions = [QUESTIONS[0], Question("bad", "w1 w2", ("x",))]
    with pytest.raises(FloatingPointError, match=r"question 'bad'.*NaN or infinity"):
        engine(build(bonus=bonus), tokenizer).rollout(questions, environment(), sampling)


def test_the_model_is_left_as_it_was(tokenizer):
    model = build(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.set_attn_implementation("flex_attention")
    flags = [m.training for m in model.modules()]
    rollouts = engine(model, tokenizer).rollout(QUESTIONS, environment(), GREEDY)
    assert [m.training for m in model.modules()] == flags
    assert model.config._attn_implementation == "flex_attention"
    assert not any(p.is_inference() for p in model.parameters())
    assert essence(rollouts) == essence(
        engine(build(), tokenizer).rollout(QUESTIONS, environment(), GREEDY)
    )  # no dropout
    model.set_attn_implementation("sdpa")
    model(torch.tensor([[2, 3]]), labels=torch.tensor([[2, 3]])).loss.backward()


def test_bad_arguments(tokenizer):
    model = build()
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        engine(model, tokenizer, max_batch=0)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        engine(model, tokenizer).rollout(QUESTIONS, environment(), GREEDY, group_size=0)
    other = SearchEnvironment(Fake(), get_protocol("refine"))
    with pytest.raises(ValueError, match="environment speaks protocol 'refine', the engine 'search_r1'"):
        engine(model, tokenizer).rollout(QUESTIONS, other, GREEDY)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"layers of type \['linear_attention'\]"):
        engine(model, tokenizer)
