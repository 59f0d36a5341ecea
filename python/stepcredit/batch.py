"""Rollouts packed without padding, as everything that computes on them takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stepcredit.rollout import Rollout, SpanKind


@dataclass(slots=True)
class RolloutBatch:
    """Rollouts packed without padding. B rollouts, T tokens in all, S search steps in all.

    Attributes:
        tokens: int64 [T].
        cu_seqlens: int64 [B+1], token offsets of the rollouts.
        policy_mask: bool [T], True where the policy wrote the token.
        step_ids: int64 [T], global step whose query this token belongs to, else -1.
        groups: int64 [B], dense group indices in [0, B).
        rewards: float32 [B], total reward.
        sampling_logprobs: float32 [T], nats, 0 where the environment wrote.
        step_rollout: int64 [S], rollout of each global step.
        step_index: int64 [S], the step's number inside its rollout.
        rollouts: the B rollouts themselves.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    policy_mask: torch.Tensor
    step_ids: torch.Tensor
    groups: torch.Tensor
    rewards: torch.Tensor
    sampling_logprobs: torch.Tensor
    step_rollout: torch.Tensor
    step_index: torch.Tensor
    rollouts: list[Rollout]

    @classmethod
    def pack(cls, rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> RolloutBatch:
        """Pack rollouts in the given order. Group labels may be any integers; they become dense indices."""
        if not rollouts:
            raise ValueError("rollouts is empty: nothing to pack")
        lengths = [len(r.tokens) for r in rollouts]
        cu = np.zeros(len(rollouts) + 1, np.int64)
        np.cumsum(lengths, out=cu[1:])
        policy = np.zeros(cu[-1], bool)
        step_ids = np.full(cu[-1], -1, np.int64)
        step_rollout: list[int] = []
        step_index: list[int] = []
        for b, rollout in enumerate(rollouts):
            number = {}
            for step in rollout.steps():
                number[step] = len(step_rollout)
                step_rollout.append(b)
                step_index.append(step)
            for span in rollout.spans:
                at = slice(cu[b] + span.start, cu[b] + span.stop)
                policy[at] = span.by_policy
                if span.kind is SpanKind.QUERY and span.step >= 0:
                    step_ids[at] = number[span.step]
        dense = {g: i for i, g in enumerate(dict.fromkeys(r.group for r in rollouts))}
        logprobs = np.concatenate([np.asarray(r.logprobs, np.float32) for r in rollouts])

        def put(x: object, dtype: torch.dtype) -> torch.Tensor:
            return torch.as_tensor(np.asarray(x), dtype=dtype).to(device)

        return cls(
            tokens=put(np.concatenate([np.asarray(r.tokens, np.int64) for r in rollouts]), torch.int64),
            cu_seqlens=put(cu, torch.int64),
            policy_mask=put(policy, torch.bool),
            step_ids=put(step_ids, torch.int64),
            groups=put([dense[r.group] for r in rollouts], torch.int64),
            rewards=put([r.reward for r in rollouts], torch.float32),
            sampling_logprobs=put(np.where(policy, logprobs, 0), torch.float32),
            step_rollout=put(np.asarray(step_rollout, np.int64), torch.int64),
            step_index=put(np.asarray(step_index, np.int64), torch.int64),
            rollouts=list(rollouts),
        )

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def num_steps(self) -> int:
        return self.step_rollout.numel()

    def padded(self, packed: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Packed [T] to padded [B, L], right-padded with `fill`, for trainers that hold (B, L) tensors."""
        if packed.shape != self.tokens.shape:
            raise ValueError(f"packed has shape {tuple(packed.shape)}, expected {tuple(self.tokens.shape)}")
        parts = list(torch.split(packed, torch.diff(self.cu_seqlens).tolist()))
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
