from __future__ import annotations

import math

import pytest
import torch

from stepcredit.train.engine.sampling import Sampling, Uniforms, draw


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in .*got 1.5"),
        ({"max_turn_tokens": 0}, "max_turn_tokens must be at least 1, got 0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens must be at least 1, got 0"),
    ],
)
def test_bad_sampling(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**kwargs)


def test_draw_follows_the_distribution():
    logits = torch.tensor([2.0, -torch.inf, 0.5, 1.0])
    for sampling, keep in ((Sampling(temperature=2.0), 4), (Sampling(temperature=2.0, top_p=0.7), 2)):
        n = 20_000
        tokens, logprobs = draw(logits.expand(n, 4), sampling, (torch.arange(n) + 0.5) / n)
        full = torch.softmax(logits / 2.0, -1)
        kept = full * (full >= full.sort(descending=True).values[keep - 1])
        assert torch.allclose(torch.bincount(tokens, minlength=4) / n, kept / kept.sum(), atol=2e-4)
        assert torch.allclose(logprobs, full.log()[tokens])


def test_draw_at_the_edges():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    for u in (0.0, 1 - 2**-24):
        for top_p in (1.0, 0.99):
            token, logprob = draw(logits, Sampling(top_p=top_p), torch.tensor([u]))
            assert token.item() in (1, 2)
            assert torch.isfinite(logprob).all()
    # The last token that has any mass, never one behind it, whatever the total rounds to.
    many = torch.cat([torch.randn(500, 40), torch.full((500, 3), -torch.inf)], 1)
    assert draw(many, Sampling(), torch.full((500,), 1 - 2**-24))[0].max() < 40
    tied = torch.tensor([[0.0, 3.0, 3.0]])
    assert draw(tied, Sampling(greedy=True), None)[0].item() == 1


def test_uniforms_do_not_depend_on_the_order_of_asking():
    a, b = Uniforms(3, 7), Uniforms(3, 7)
    late = a([2, 0], [200, 1])
    assert torch.equal(b([0], [1]), late[1:])
    assert torch.equal(b([2], [200]), late[:1])
    assert not torch.equal(Uniforms(3, 8)([0], [1]), late[1:])
