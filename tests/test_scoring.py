"""The public door: rollouts and texts alike, bad input, and the model left as it was."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import stepcredit
from scripted_rollouts import REFINE, SEARCH_R1, random_policy, write
from stepcredit import Question, RolloutBatch, SpanKind, score_information_gain
from stepcredit.counterfactual import score_steps
from stepcredit.logs import rollout_from_text
from stepcredit.scorer import PolicyScorer
from test_logs import documents, text_of
from tokenizers_under_test import BUILT, byte_bpe

TOKENIZER = byte_bpe()
QUESTIONS = [
    Question("a", "Which river flows through Lyon?", ("Rhône",)),
    Question("b", "What is the capital of France?", ("Paris",)),
    Question("c", "Who is mayor?", ("e",)),
]
GOLDS = ["Rhône", "Rhône", "Paris", "e"]
IDS = ["a", "a", "b", "c"]
SEARCHES = [
    (0, [("river in Lyon", "Lyon lies on the Rhône and the Saône.", "Rhône."), ("Rhône", "The Rhône is big.", None)]),
    (0, [("Lyon", "Lyon is a city in France.", None)]),
    (1, [("capital of France", "Paris is the capital of France.", "Paris is it")]),
    (2, [("mayor of Paris", "A mayor is elected.", None)]),
]


def policy(**changes):
    return random_policy("llama", TOKENIZER, **changes)


def prompt(question):
    return f"Question: {question.text}\n"


def rollouts(protocol=REFINE):
    return [write(TOKENIZER, QUESTIONS[q], plain(s, protocol), protocol=protocol, group=q) for q, s in SEARCHES]


def plain(searches, protocol):
    return [(query, passage, refined if protocol.refine_tag else None) for query, passage, refined in searches]


def logs(protocol=REFINE):
    return [(prompt(QUESTIONS[q]), text_of(plain(s, protocol), protocol)) for q, s in SEARCHES]


def one(question, block, query="x"):
    """A log of one search that this block answers."""
    return prompt(question), f"<search>{query}</search>{block}<answer>y</answer>"


def assert_same(a, b):
    for name in ("rollout", "step", "scored"):
        assert getattr(a, name).equal(getattr(b, name))
    for name in ("gain", "real", "baseline", "counterfactual"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True, rtol=0, atol=0)
    assert a.draws == b.draws


@pytest.mark.parametrize("protocol", [REFINE, SEARCH_R1], ids=["refine", "search_r1"])
def test_texts_score_as_the_rollouts_they_tell_of(protocol):
    model = policy()
    batch = RolloutBatch.pack(rollouts(protocol))
    expected = score_steps(batch, PolicyScorer(model, TOKENIZER, protocol), seed=3, num_random=2)
    assert expected.scored.all()
    assert float(expected.gain.abs().max()) > 0.1
    options = dict(protocol=protocol.name, seed=3, num_random=2)
    assert_same(score_information_gain(model, TOKENIZER, rollouts(protocol), **options), expected)
    pairs = score_information_gain(model, TOKENIZER, logs(protocol), GOLDS, question_ids=IDS, **options)
    assert_same(pairs, expected)
    joined = ["".join(pair) for pair in logs(protocol)]
    assert_same(score_information_gain(model, TOKENIZER, joined, GOLDS, question_ids=IDS, **options), expected)


def test_every_option_reaches_the_scoring():
    model, items = policy(), rollouts()
    scorer, batch = PolicyScorer(model, TOKENIZER, REFINE), RolloutBatch.pack(items)
    default = score_steps(batch, scorer)
    for options in (
        dict(num_random=1), dict(trunk="skeleton"), dict(baseline="empty"), dict(pool="batch"),
        dict(head_tokens=1, head_weight=3.0), dict(seed=7), dict(step=7), dict(max_context=120),
    ):  # fmt: skip
        gains = score_information_gain(model, TOKENIZER, items, **options)
        assert_same(gains, score_steps(batch, scorer, **options))
        assert not gains.gain.equal(default.gain), options
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        score_information_gain(model, TOKENIZER, items, max_tokens=0)
    assert score_information_gain(model, TOKENIZER, items, verify=True).difference is not None


def test_texts_with_equal_prompts_are_one_question():
    model = policy()
    gains = score_information_gain(model, TOKENIZER, logs(), GOLDS, num_random=1)
    drawn = [{IDS[b] for b, _ in draws} for draws in gains.draws]
    assert all(IDS[b] not in others for b, others in zip(gains.rollout.tolist(), drawn, strict=True))
    assert gains.counts["pool_fallback"] == 0
    merged = score_information_gain(model, TOKENIZER, logs(), GOLDS, num_random=1, question_ids=["same"] * 4)
    assert merged.counts["pool_fallback"] == 5
    # names come from the prompts: the order of the batch changes no draw
    order = [3, 1, 2, 0]
    shuffled = score_information_gain(model, TOKENIZER, [logs()[i] for i in order], [GOLDS[i] for i in order],
                                      num_random=1)  # fmt: skip
    draws = {
        (order[b], t): tuple((order[r], s) for r, s in drawn)
        for b, t, drawn in zip(shuffled.rollout.tolist(), shuffled.step.tolist(), shuffled.draws, strict=True)
    }
    keys = zip(gains.rollout.tolist(), gains.step.tolist(), strict=True)
    assert gains.draws == tuple(draws[key] for key in keys)


def test_draws_replay():
    model = policy()
    first = score_information_gain(model, TOKENIZER, logs(), GOLDS, seed=1)
    again = score_information_gain(model, TOKENIZER, logs(), GOLDS, seed=2, draws=first.draws)
    assert_same(again, first)
    stored = json.loads(json.dumps(first.draws))
    assert_same(score_information_gain(model, TOKENIZER, logs(), GOLDS, seed=2, draws=stored), first)
    assert score_information_gain(model, TOKENIZER, logs(), GOLDS, seed=2).draws != first.draws


def test_golds_and_ids_replace_those_of_rollouts():
    model, items = policy(), rollouts()
    before = [(r.question, dict(r.rewards)) for r in items]
    golds = [("nowhere", "Rhône"), ["Rhône"], "Paris", ("e", "a")]
    both = score_information_gain(model, TOKENIZER, items, golds, max_variants=2)
    each = [
        score_information_gain(model, TOKENIZER, items, [g if isinstance(g, str) else g[i % len(g)] for g in golds])
        for i in (0, 1)
    ]
    torch.testing.assert_close(both.real, torch.maximum(each[0].real, each[1].real), atol=1e-5, rtol=0)
    assert not each[0].real.equal(each[1].real)
    own = score_information_gain(model, TOKENIZER, items)
    assert_same(score_information_gain(model, TOKENIZER, items, GOLDS), own)
    renamed = score_information_gain(model, TOKENIZER, items, question_ids=["same"] * 4)
    assert renamed.counts["pool_fallback"] == renamed.counts["steps"] == 5
    assert [(r.question, dict(r.rewards)) for r in items] == before


def test_rollouts_need_no_reward():
    items = [replace(r, rewards={}) for r in rollouts()]
    gains = score_information_gain(policy(), TOKENIZER, items)
    assert gains.scored.all()
    assert all(r.rewards == {} for r in items)


def test_passages_that_say_there_are_none_are_none():
    """Also without a record of the searches, as in a loop that writes its own transcript."""
    found = enumerate(("(no passages found)", "Paris is the capital of France."))
    items = [
        rollout_from_text(QUESTIONS[q], *one(QUESTIONS[q], documents(text)), TOKENIZER, REFINE, group=q)
        for q, text in found
    ]
    gains = score_information_gain(policy(), TOKENIZER, [replace(r, searches=()) for r in items])
    assert gains.counts["unscored_no_documents"] == 1
    assert gains.counts["pool_size"] == 1


def test_empty_passages_and_empty_queries():
    a, b, _ = QUESTIONS
    texts = [
        one(a, documents("")), one(a, documents("  ")), one(a, documents("(no passages found)")), one(a, "\nfailed\n"),
        one(a, documents("Lyon lies on the Rhône."), query=" "), one(a, documents("Lyon lies on the Rhône.")),
        one(b, documents("Paris is the capital.")),
    ]  # fmt: skip
    gains = score_information_gain(policy(), TOKENIZER, texts, ["Rhône"] * 6 + ["Paris"])
    assert gains.rollout.tolist() == [0, 1, 2, 3, 5, 6]  # a search without a query is no step
    assert gains.scored.tolist() == [False] * 4 + [True] * 2
    assert gains.gain.isnan().tolist() == [True] * 4 + [False] * 2
    counts = gains.counts
    assert (counts["unscored_no_documents"], counts["pool_size"]) == (4, 2)
    assert (counts["unanswered_searches"], counts["unasked_documents"]) == (1, 1)


def test_a_search_of_a_rollout_without_query_tokens_is_no_step_and_counted():
    """As where a loop shows passages for an empty query. What later searches see of them stays as it was."""
    items = rollouts()
    spans = items[0].spans
    (query,) = [i for i, span in enumerate(spans) if span.kind is SpanKind.QUERY and span.step == 0]
    spans[query] = replace(spans[query], kind=SpanKind.THINK, step=-1)
    model = policy()
    gains = score_information_gain(model, TOKENIZER, items)
    assert list(zip(gains.rollout.tolist(), gains.step.tolist(), strict=True))[:2] == [(0, 1), (1, 0)]
    assert (gains.counts["no_query"], gains.counts["steps"], gains.counts["pool_size"]) == (1, 4, 4)
    assert (0, 0) not in {draw for draws in gains.draws for draw in draws}
    whole = score_information_gain(model, TOKENIZER, rollouts())
    assert whole.counts["no_query"] == 0
    assert float(gains.real[0]) == pytest.approx(float(whole.real[1]), abs=1e-5)


def test_a_gold_answer_that_tokenises_to_nothing():
    tokenizer = BUILT["wordpiece"]()
    model = random_policy("llama", tokenizer)
    golds = ["\u200b", ["\u200b", "Rhône"], "Paris", "e"]
    gains = score_information_gain(model, tokenizer, logs(), golds)
    assert gains.counts["unscored_no_answer"] == 2
    assert gains.scored.tolist() == [False, False, True, True, True]
    assert gains.gain.isnan().tolist() == [True, True, False, False, False]


def test_a_pool_that_is_too_small():
    model = policy()
    one_question = score_information_gain(model, TOKENIZER, logs()[:2], GOLDS[:2])
    assert (one_question.counts["pool_fallback"], one_question.counts["pool_repeated"]) == (3, 3)
    assert one_question.scored.all()
    alone = score_information_gain(model, TOKENIZER, logs()[1:2], GOLDS[1:2])
    assert alone.counts["unscored_empty_pool"] == 1
    assert alone.gain.isnan().all()


def test_a_rollout_longer_than_the_context_of_the_model():
    long = one(QUESTIONS[0], documents("Lyon lies on the Rhône. " * 20))
    texts, golds = [long, *logs()[1:]], GOLDS
    gains = score_information_gain(policy(max_position_embeddings=150), TOKENIZER, texts, golds, num_random=1)
    assert gains.counts["unscored_too_long"] >= 1
    assert gains.scored.tolist()[0] is False
    assert gains.counts["scored"] == int(gains.gain.isfinite().sum()) >= 1
    assert gains.counts["scored"] + gains.counts["unscored_too_long"] == gains.counts["steps"]


def test_duplicate_passages_are_never_drawn_for_each_other():
    a, b, c = QUESTIONS
    same, other = documents("Everyone finds the same passage."), documents("But this one is different.")
    texts = [one(a, same), one(b, same), one(c, same), one(b, other, "z")]
    gains = score_information_gain(policy(), TOKENIZER, texts, ["Rhône", "Paris", "e", "Paris"], num_random=1)
    assert gains.draws[:3] == (((3, 0),),) * 3
    assert gains.draws[3][0] in {(0, 0), (2, 0)}
    nothing = score_information_gain(policy(), TOKENIZER, texts[:3], ["Rhône", "Paris", "e"])
    assert nothing.counts["unscored_empty_pool"] == 3


def test_pad_equal_to_eos_changes_nothing():
    """Masks made from token ids would hide the end-of-turn tokens inside the context."""
    texts = [(p, r.replace("</think>", "</think><|end|>")) for p, r in logs()]
    expected = score_information_gain(policy(), TOKENIZER, texts, GOLDS)
    padded = byte_bpe()
    padded.pad_token = padded.eos_token
    eos = padded.eos_token_id
    model = policy()
    model.config.pad_token_id = model.config.eos_token_id = eos
    model.get_input_embeddings().padding_idx = eos
    gains = score_information_gain(model, padded, texts, GOLDS)
    assert_same(gains, expected)
    rollout = rollout_from_text(QUESTIONS[0], *texts[0], padded, REFINE)
    assert eos in rollout.tokens[: rollout.find(SpanKind.DOCUMENTS, 0).start]
    without = score_information_gain(model, padded, logs(), GOLDS)
    assert not without.real.equal(gains.real)  # they are seen


def test_grad_modes_and_autocast():
    model = policy()
    expected = score_information_gain(model, TOKENIZER, logs(), GOLDS)
    assert not expected.gain.requires_grad
    assert torch.is_grad_enabled()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(score_information_gain(model, TOKENIZER, logs(), GOLDS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rough = score_information_gain(model, TOKENIZER, logs(), GOLDS)
    assert rough.gain.dtype is torch.float32
    assert not rough.real.equal(expected.real)
    assert float((rough.real - expected.real).abs().max()) < 0.15 * float(expected.real.abs().max())


def test_the_model_is_left_as_it_was():
    model = policy(attention_dropout=0.5)
    expected = score_information_gain(model, TOKENIZER, logs(), GOLDS)
    model.train()
    model.model.layers[1].eval()
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append("forward"))
    model.model.layers[-1].register_forward_pre_hook(lambda *_: seen.append("pre"))

    def state():
        hooks = [(tuple(m._forward_hooks), tuple(m._forward_pre_hooks)) for m in model.modules()]
        return hooks, [m.training for m in model.modules()], model.config._attn_implementation

    before = state()
    assert_same(score_information_gain(model, TOKENIZER, logs(), GOLDS), expected)  # no dropout
    assert state() == before
    assert {"forward", "pre"} <= set(seen)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    with pytest.raises(FloatingPointError, match="log-probs are not finite for question"):
        score_information_gain(model, TOKENIZER, logs(), GOLDS)
    assert state() == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(rollouts=[]), ValueError, "rollouts is empty"),
        (dict(rollouts="Who? <think>"), TypeError, "rollouts must be a sequence of rollouts or texts, got one str"),
        (dict(rollouts=RolloutBatch.pack(rollouts())), TypeError, "got one RolloutBatch"),
        (dict(rollouts=[*logs()[:3], rollouts()[3]]), TypeError, r"rollouts\[0\] is a pair of str and \[3\] a Rollout"),
        (dict(rollouts=[*logs()[:3], "Who? <think>"]), TypeError, r"\[0\] is a pair of str and \[3\] a str"),
        (dict(rollouts=[("a", "b", "c")]), TypeError, r"rollouts\[0\] must be a Rollout, .* got \('a', 'b', 'c'\)"),
        (dict(golds=None), ValueError, "golds is None; texts do not hold"),
        (dict(golds=GOLDS[:3]), ValueError, "golds has 3 entries for 4 rollouts"),
        (dict(golds="Paris"), TypeError, "golds must be a sequence, one entry a rollout, got 'Paris'"),
        (dict(golds=["a", "b", " ", "c"]), ValueError, r"golds\[2\] must hold .* got ' '"),
        (dict(golds=["a", "b", [], "c"]), ValueError, r"golds\[2\] must hold .* got \[\]"),
        (dict(golds=["a", "b", ["c", ""], "d"]), ValueError, r"golds\[2\] must hold .* got \['c', ''\]"),
        (dict(golds=["a", "b", 3, "d"]), TypeError, r"golds\[2\] must be a str or a sequence of str, got 3"),
        (dict(question_ids=["a"]), ValueError, "question_ids has 1 entries for 4 rollouts"),
        (dict(question_ids=["a", "b", 3, "c"]), TypeError, r"question_ids\[2\] must be a str, got 3"),
        (dict(protocol="search_r2"), ValueError, "unknown protocol 'search_r2'.*did you mean 'search_r1'"),
        (dict(rollouts=["".join(logs()[0])] * 3 + ["Who?"]), ValueError, r"rollouts\[3\] has no tag .* 'Who\?'"),
        (dict(rollouts=[*logs()[:3], (" ", "<think>")]), ValueError, r"prompt of rollouts\[3\] is empty"),
        (dict(num_random=0), ValueError, "num_random must be at least 1, got 0"),
        (dict(max_tokens=0), ValueError, "max_tokens must be at least 1, got 0"),
        (dict(max_context=0), ValueError, "max_context must be at least 1, got 0"),
        (dict(head_tokens=-1), ValueError, r"score_steps: head_tokens must be in \[0, \d+\], got -1"),
        (dict(head_weight=float("nan")), ValueError, r"score_steps: head_weight must be in .*, got nan"),
        (dict(draws=[()]), ValueError, "draws has 1 entries for 5 steps"),
        (dict(draws=[[(0, 5)]] * 5), ValueError, r"draws names \(0, 5\), which is no search step with passages"),
    ],
)
def test_bad_arguments(change, error, message):
    model = policy()
    model.forward = model.model.forward = None  # nothing may run
    arguments = dict(rollouts=logs(), golds=GOLDS) | change
    with pytest.raises(error, match=message):
        score_information_gain(model, TOKENIZER, **arguments)


def test_a_model_that_cannot_be_served_is_refused_before_anything_runs():
    model = random_policy("gpt_oss", TOKENIZER, num_local_experts=2, head_dim=8)
    model.forward = model.model.forward = None
    with pytest.raises(ValueError, match="GptOssForCausalLM cannot be scored with token trees: it has attention sink"):
        score_information_gain(model, TOKENIZER, logs(), GOLDS)


def test_the_signature_keeps_what_was_promised():
    """More options may come; these stay, in this order where they are positional, with these defaults."""
    parameters = inspect.signature(score_information_gain).parameters
    assert list(parameters)[:4] == ["model", "tokenizer", "rollouts", "golds"]
    promised = dict(
        protocol="refine", num_random=3, trunk="rollout", baseline="random", pool="other_questions", head_tokens=0,
        head_weight=1.0, question_ids=None, seed=0, max_tokens=16384, verify=False, draws=None,
    )  # fmt: skip
    assert {name: parameters[name].default for name in promised} == promised
    assert all(one.kind is one.KEYWORD_ONLY for one in list(parameters.values())[4:])


def test_importing_the_package_does_not_import_transformers():
    code = (
        "import sys, stepcredit; assert 'transformers' not in sys.modules;"
        "stepcredit.score_information_gain; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(stepcredit, name) for name in stepcredit.__all__)
    with pytest.raises(AttributeError, match="module 'stepcredit' has no attribute 'scores'"):
        stepcredit.scores  # noqa: B018
