"""How tokens are drawn from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a rollout is sampled.

    Attributes:
        temperature: divides the logits; > 0. The recorded log-probs are those of this tempered distribution.
        top_p: sample from the smallest set of tokens whose probability reaches this; (0, 1]. The recorded log-probs
            do *not* include this truncation.
        greedy: take the most probable token (the lowest id among equals) instead of sampling.
        max_turn_tokens: tokens the policy may spend on a turn before it counts as unclosed.
        max_answer_tokens: the same for a turn whose answer the environment opened.
        seed: of every random draw of one `rollout` call. Rollout number i gets the same random numbers however the
            rollouts are split into batches.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    max_turn_tokens: int = 128
    max_answer_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature} (see greedy=True)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        for name in ("max_turn_tokens", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Uniforms:
    """A uniform number in [0, 1) for token number j of rollout number i, from one generator, whatever the order in
    which they are asked for."""

    BLOCK = 64

    def __init__(self, rollouts: int, seed: int) -> None:
        self._rollouts = rollouts
        self._generator = torch.Generator().manual_seed(seed)
        self._blocks: list[torch.Tensor] = []

    def __call__(self, rollouts: list[int], tokens: list[int]) -> torch.Tensor:
        """float32 [n] for n pairs (i, j)."""
        while len(self._blocks) * self.BLOCK <= max(tokens):
            self._blocks.append(torch.rand(self._rollouts, self.BLOCK, generator=self._generator))
        return torch.stack(
            [self._blocks[j // self.BLOCK][i, j % self.BLOCK] for i, j in zip(rollouts, tokens, strict=True)]
        )


def draw(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverting the cumulative distribution (one random number per row, no noise over the
    vocabulary).

    Args:
        logits: [N, V].
        sampling: temperature, top_p, greedy.
        uniforms: float32 [N] in [0, 1); None when greedy.

    Returns:
        tokens int64 [N] and their log-probs float32 [N], `log_softmax(logits.float() / temperature)[token]`; a
        log-prob is not finite where the logits of its row define no distribution.
    """
    scaled = logits.float()
    probs = torch.softmax(scaled if sampling.temperature == 1 else scaled / sampling.temperature, -1)
    if uniforms is None:
        tokens = scaled.argmax(-1)
    elif sampling.top_p < 1:
        ranked, order = torch.sort(probs, stable=True, dim=-1, descending=True)
        # Keep every token that starts below the threshold: always at least the first.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= sampling.top_p, 0)
        tokens = order.gather(-1, _invert(ranked, uniforms)[:, None])[:, 0]
    else:
        tokens = _invert(probs, uniforms)
    return tokens, probs.gather(-1, tokens[:, None])[:, 0].log()


def _invert(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first index at which the running sum of the row exceeds uniform * total."""
    running = probs.cumsum(-1)
    # A float32 uniform is at most 1 - 2^-24, so that the product rounds below the total: some token exceeds it.
    wanted = uniforms.to(running)[:, None] * running[:, -1:]
    # Rows that hold NaN have no answer; the clamp keeps their index valid until the caller reports them.
    return torch.searchsorted(running, wanted, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
