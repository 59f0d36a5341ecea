"""How `PolicyScorer` treats the model: dtypes, modes, refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from scripted_rollouts import GEMMA2, REFINE, random_policy, write
from stepcredit.batch import RolloutBatch
from stepcredit.counterfactual import score_steps
from stepcredit.head import head_options
from stepcredit.rollout import Question, SpanKind
from stepcredit.scorer import PolicyScorer
from tokenizers_under_test import BUILT

TOKENIZER = BUILT["byte_bpe"]()
OPTIONS = {"gemma2": {"softcap": 3.0}, "mistral": {}, "cohere": {"logit_scale": 0.3}, "granite": {"logit_scale": 0.25}}


def make(family="llama", **changes):
    rollouts = [
        write(TOKENIZER, Question("a", "Where is Lyon?", ("France",)), [("Lyon", "Lyon lies in France.", "so")]),
        write(TOKENIZER, Question("b", "Which river?", ("Seine",)), [("river", "Paris lies on the Seine.", None)]),
    ]
    return RolloutBatch.pack(rollouts), PolicyScorer(random_policy(family, TOKENIZER, **changes), TOKENIZER, REFINE)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {**GEMMA2, "attn_implementation": "eager"}),
        ("mistral", {"sliding_window": 24}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_logits_are_those_of_the_model(family, changes):
    """Soft cap, scale and sliding windows: against the model's own logits on a separate context."""
    batch, policy = make(family, **changes)
    assert head_options(policy.model) == OPTIONS[family]
    gains = score_steps(batch, policy, baseline="empty")
    rollout = batch.rollouts[1]
    shown = rollout.find(SpanKind.DOCUMENTS, 0)
    probe, answer = TOKENIZER.encode(REFINE.answer_probe), TOKENIZER.encode(" Seine")
    for stop, score in ((shown.stop, gains.real[1]), (shown.start, gains.baseline[1])):
        context = [*rollout.tokens[:stop], *probe]
        with torch.no_grad():
            logp = policy.model(torch.tensor([[*context, *answer]])).logits[0].log_softmax(-1)
        rows = torch.arange(len(context) - 1, len(context) + len(answer) - 1)
        assert float(score) == pytest.approx(float(logp[rows, answer].mean()), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "mistral", "mixtral"])
def test_the_last_layer_runs_only_for_rows_that_are_read(family):
    batch, policy = make(family, **(GEMMA2 if family == "gemma2" else {}))
    first, last = policy.model.model.layers[0], policy.model.model.layers[-1]
    attention = last.self_attn
    watched = {"first": first.mlp, "mlp": last.mlp, "output": attention.o_proj}
    if family != "phi3":  # whose queries, keys and values are one projection
        watched["queries"] = attention.q_proj
    rows = dict.fromkeys(watched, 0)

    def count(name, module, args):
        rows[name] += args[0].shape[:-1].numel()

    hooks = [module.register_forward_pre_hook(partial(count, name)) for name, module in watched.items()]
    gains = score_steps(batch, policy)
    for hook in hooks:
        hook.remove()
    assert rows.pop("first") == sum(gains.tokens_forwarded.values())
    read = rows["mlp"]
    assert read < sum(gains.tokens_forwarded.values()) / 4
    assert rows.pop("queries", read + 1) == read + 1  # and the one that stands for all in the run for keys and values
    assert set(rows.values()) == {read}
    assert not attention.o_proj._forward_pre_hooks
    assert family == "phi3" or not (attention.q_proj._forward_pre_hooks or attention.q_proj._forward_hooks)
    assert not last._forward_pre_hooks


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_runs_close_to_float32(dtype, share):
    batch, policy = make()
    exact = score_steps(batch, policy)
    policy.model.to(dtype)
    rough = score_steps(batch, policy, verify=True)
    assert rough.scored.all()
    assert 0 < float((rough.real - exact.real).abs().max()) < share * float(exact.real.abs().max())


def test_the_model_is_left_as_it_was():
    batch, policy = make(attention_dropout=0.5)
    policy.model.train()
    policy.model.model.layers[1].eval()
    flags = [m.training for m in policy.model.modules()]
    before = policy.model.config._attn_implementation
    a, b = score_steps(batch, policy), score_steps(batch, policy)
    assert torch.equal(a.gain, b.gain)  # no dropout
    assert [m.training for m in policy.model.modules()] == flags
    assert policy.model.config._attn_implementation == before != "stepcredit_tree"
    assert all(p.grad is None for p in policy.model.parameters())


def test_the_model_is_left_as_it_was_when_its_attention_cannot_be_set(monkeypatch):
    batch, policy = make()
    policy.model.train()
    set_attention = policy.model.set_attn_implementation

    def refuse(name):
        if name == "stepcredit_tree":
            raise ValueError("no")
        set_attention(name)

    monkeypatch.setattr(policy.model, "set_attn_implementation", refuse)
    with pytest.raises(ValueError, match="no"):
        score_steps(batch, policy)
    assert policy.model.training


def test_every_part_of_a_model_keeps_its_attention():
    """A language model with a vision tower, which attend in different ways; only the former scores text."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": max(TOKENIZER.get_vocab().values()) + 1, "num_hidden_layers": 3,
            "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "initializer_range": 0.15}  # fmt: skip
    vision = {**sizes, "model_type": "siglip_vision_model", "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(1)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})

    def attentions():
        parts = [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]
        return parts, [c._attn_implementation for c in (model.config, model.config.text_config)]

    before = attentions()
    assert {"sdpa", "eager"} <= set(before[0])
    gains = score_steps(make()[0], PolicyScorer(model, TOKENIZER, REFINE), verify=True)
    assert gains.scored.all()
    assert gains.difference < 1e-5
    assert attentions() == before


@pytest.mark.parametrize("float32_logits", [False, True])
def test_autocast(monkeypatch, float32_logits):
    """Also where the logits that autocast rounded are handed out in float32, as accelerate does."""
    batch, policy = make(initializer_range=1.0)
    exact = score_steps(batch, policy)
    forward = policy.model.forward

    def float32(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    if float32_logits:
        monkeypatch.setattr(policy.model, "forward", float32)
    with torch.autocast("cpu", torch.bfloat16):
        rough = score_steps(batch, policy, verify=True)
    assert float((rough.real - exact.real).abs().max()) < 0.15 * float(exact.real.abs().max())


def test_bad_weights_name_the_question():
    batch, policy = make()
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"hidden states are not finite for question '.'"):
        score_steps(batch, policy)
    batch, policy = make()
    with torch.no_grad():
        policy.model.lm_head.weight[5] = math.inf
    with pytest.raises(FloatingPointError, match=r"log-probs are not finite for question '.'"):
        score_steps(batch, policy)


def test_models_that_cannot_be_served_are_refused_by_name():
    qwen = random_policy("qwen2", TOKENIZER)
    qwen.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM cannot be scored .* layers of type linear_attention"):
        PolicyScorer(qwen, TOKENIZER, REFINE)
    qwen.config.layer_types = ["full_attention", "chunked_attention", "someones_own"]
    with pytest.raises(ValueError, match="layers of type chunked_attention, someones_own; served are full"):
        PolicyScorer(qwen, TOKENIZER, REFINE)
    sinks = random_policy("gpt_oss", TOKENIZER, num_local_experts=2, head_dim=8)
    with pytest.raises(ValueError, match=r"GptOssForCausalLM .* attention sinks"):
        PolicyScorer(sinks, TOKENIZER, REFINE)
    latent = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
    deepseek = random_policy("deepseek_v3", TOKENIZER, **latent)
    with pytest.raises(ValueError, match=r"DeepseekV3ForCausalLM .* keys are not as wide as its values \(16 and 8\)"):
        PolicyScorer(deepseek, TOKENIZER, REFINE)
    mamba = random_policy("mamba", TOKENIZER)
    with pytest.raises(ValueError, match=r"MambaForCausalLM .* attention interface"):
        PolicyScorer(mamba, TOKENIZER, REFINE)


def test_a_layer_that_bypasses_tree_attention_is_an_error():
    batch, policy = make()
    attention = policy.model.model.layers[0].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match="2 of 3 layers"):
        score_steps(batch, policy)


def test_tree_attention_outside_the_scorer_is_an_error():
    policy = random_policy("llama", TOKENIZER)
    policy.set_attn_implementation("stepcredit_tree")
    with pytest.raises(ValueError, match="needs model"):
        policy(torch.tensor([[1, 2]]))


def test_a_head_that_is_more_than_its_weight_is_refused():
    """An adapter on the head, or a scale that `head_options` does not know: scores would be wrong without a word."""
    batch, policy = make()
    score_steps(batch, policy)
    adapted = policy.model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(
        RuntimeError, match=r"LlamaForCausalLM: its logits give a token -.* nats, the weight of its head -"
    ):
        score_steps(batch, policy)
    adapted.remove()
    score_steps(batch, policy)


def test_positions_that_do_not_count_from_zero_are_refused():
    model = random_policy("roberta", TOKENIZER, is_decoder=True, pad_token_id=0)
    with pytest.raises(ValueError, match="its positions do not count from 0"):
        PolicyScorer(model, TOKENIZER, REFINE)
