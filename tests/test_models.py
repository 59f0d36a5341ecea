"""Exactness on the model families that are served: packed scores against separate forwards of the model itself."""

from __future__ import annotations

import pytest
import torch

from scripted_rollouts import GEMMA2, REFINE, random_policy, write
from stepcredit.batch import RolloutBatch
from stepcredit.branches import tree_forward
from stepcredit.counterfactual import score_steps
from stepcredit.rollout import Question
from stepcredit.scorer import PolicyScorer
from tokenizers_under_test import BUILT

TOKENIZER = BUILT["byte_bpe"]()
#: Dynamic NTK is plain up to the original positions, beyond which contexts are cut.
ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
TOP2 = {"num_experts_per_tok": 2}
MOE = {"moe_intermediate_size": 16, **TOP2}
FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    **{f"llama, {name} rope": ("llama", {"rope_parameters": {"rope_theta": 1e4, **r}}) for name, r in ROPE.items()},
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2_moe, window in the mask alone": (
        "qwen2_moe",
        {"num_experts": 4, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, **MOE},
    ),
    "phimoe, window in the mask alone": ("phimoe", {"num_local_experts": 4, "sliding_window": 16, **TOP2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "gemma2": ("gemma2", GEMMA2),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, **TOP2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "head_dim": 8, **MOE}),
}


def rollouts():
    where, river = Question("a", "Where is Lyon?", ("France", "in France")), Question("b", "Which river?", ("Seine",))
    searches = [("Lyon", "Lyon lies in France.", "so it is"), ("Lyon France", "France is a country.", None)]
    return [
        write(TOKENIZER, where, searches),
        write(TOKENIZER, where, searches[1:]),
        write(TOKENIZER, river, [("river", "Paris lies on the Seine.", None)], group=1),
    ]


def make(family: str, **changes: object) -> tuple[RolloutBatch, PolicyScorer]:
    kind, options = FAMILIES[family]
    return RolloutBatch.pack(rollouts()), PolicyScorer(
        random_policy(kind, TOKENIZER, **{**options, **changes}), TOKENIZER, REFINE
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_equal_separate_forwards(family, monkeypatch):
    batch, policy = make(family)
    monkeypatch.setattr("stepcredit.branches.audit.SAMPLE", batch.num_steps)
    gains = score_steps(batch, policy, max_variants=2, verify=True)
    assert gains.scored.all()
    assert float(gains.gain.abs().max()) > 0.02  # the policy does tell contexts apart
    assert gains.difference < 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_length_are_exact_by_cutting(kind):
    """Beyond the original positions every context would need frequencies of its own, so steps are cut to them."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 60}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        positions = {"original_max_position_embeddings": 60, "max_position_embeddings": 240}
        batch, policy = make("phi3", rope_parameters=rope, **positions)
    else:
        batch, policy = make("llama", rope_parameters=rope, max_position_embeddings=60)
    assert policy.max_context == 60
    gains = score_steps(batch, policy, verify=True)
    assert gains.counts["truncated"] > 0
    assert gains.scored.any()
    assert gains.difference < 1e-5
    with pytest.raises(ValueError, match=r"a path of \d+ tokens exceeds the 60 positions \(question 'a'\)"):
        score_steps(batch, policy, temperature=1.0)


def test_an_audit_finds_a_wrong_pass_and_names_the_step(monkeypatch):
    batch, policy = make("llama")
    right = score_steps(batch, policy, verify=True)
    assert 0 <= right.difference < 1e-5
    assert score_steps(batch, policy).difference is None
    whole = PolicyScorer.logprobs
    monkeypatch.setattr(PolicyScorer, "logprobs", lambda *args, **kwargs: whole(*args, **kwargs) + 1e-3)
    with pytest.raises(RuntimeError, match=r"step \d of rollout \d \(question '[ab]'\).*does not fit LlamaForCausalLM"):
        score_steps(batch, policy, verify=True)


def test_an_audit_of_nothing_says_so():
    """Not 0.0: a run is to be audited on the first batch that scores something."""
    batch, policy = make("llama")
    gains = score_steps(batch, policy, verify=True, num_random=1, max_context=1)
    assert not gains.scored.any()
    assert gains.difference is None


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_an_audit_tells_rounding_from_a_wrong_mask(kind, monkeypatch):
    batch, policy = make("llama")
    if kind == "bfloat16":
        policy.model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        score_steps(batch, policy, verify=True)
        whole = tree_forward.tree_attention
        monkeypatch.setattr(tree_forward, "tree_attention", lambda *a, **k: whole(*a, **{**k, "window": 12}))
        with pytest.raises(RuntimeError, match="does not fit"):
            score_steps(batch, policy, verify=True)


def test_layers_that_are_not_causal_are_refused():
    model = random_policy("bert", TOKENIZER, is_decoder=False)
    with pytest.raises(ValueError, match="causal"):
        score_steps(RolloutBatch.pack(rollouts()), PolicyScorer(model, TOKENIZER, REFINE))


def test_an_audit_leaves_the_model_as_it_was():
    batch, policy = make("llama")
    policy.model.train()
    before = policy.model.config._attn_implementation
    score_steps(batch, policy, verify=True)
    assert policy.model.training
    assert policy.model.config._attn_implementation == before
    assert all(p.grad is None for p in policy.model.parameters())
    assert torch.is_grad_enabled()
