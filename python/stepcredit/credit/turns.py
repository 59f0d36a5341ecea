"""Turns: what the policy wrote between two messages of the environment, and credit that is counted by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from stepcredit.batch import RolloutBatch
from stepcredit.credit.base import Credit, mean
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.ops import masked_advantages
from stepcredit.scorer import PolicyScorer

Placement = Literal["query", "closing"]


@dataclass(frozen=True, slots=True)
class Turns:
    """The U turns of a batch of T tokens and S search steps, in order. A turn is all tokens of the policy from one
    message of the environment (the prompt is the first) to the next, its search or answer included.

    Attributes:
        ids: int64 [T], turn of each token that the policy wrote, -1 where the environment wrote.
        rollout: int64 [U], rollout of each turn.
        index: int64 [U], its number inside its rollout.
        start: int64 [U], its first token.
        stop: int64 [U], the token after its last.
        of_step: int64 [S], turn that holds the query of each search step; several steps may share one.
        last: int64 [B], last turn of each rollout, -1 for a rollout in which the policy wrote nothing.
    """

    ids: torch.Tensor
    rollout: torch.Tensor
    index: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    of_step: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, batch: RolloutBatch) -> Turns:
        """The turns of a batch. No turn runs on into the next rollout, which begins with its prompt."""
        policy = batch.policy_mask
        nothing = policy.new_zeros(1)
        opens = policy & ~torch.cat([nothing, policy[:-1]])
        closes = policy & ~torch.cat([policy[1:], nothing])
        start = opens.nonzero().squeeze(1)
        rollout = torch.searchsorted(batch.cu_seqlens, start, right=True) - 1
        ids = torch.where(policy, opens.cumsum(0) - 1, -1)
        count = rollout.bincount(minlength=len(batch))
        end = count.cumsum(0)
        queries = (batch.step_ids >= 0).nonzero().squeeze(1)
        of_step = torch.full_like(batch.step_rollout, -1).scatter(0, batch.step_ids[queries], ids[queries])
        return cls(
            ids=ids,
            rollout=rollout,
            index=torch.arange(rollout.numel(), device=rollout.device) - (end - count)[rollout],
            start=start,
            stop=closes.nonzero().squeeze(1) + 1,
            of_step=of_step,
            last=torch.where(count > 0, end - 1, -1),
        )

    def __len__(self) -> int:
        return self.rollout.numel()

    def outcome(self, values: torch.Tensor) -> torch.Tensor:
        """[U]: the value of each rollout [B] at its last turn, 0 at the others."""
        ended = self.last >= 0
        return values.new_zeros(len(self)).index_put((self.last[ended],), values[ended])

    def gains(self, values: torch.Tensor) -> torch.Tensor:
        """[U]: the sum of the values of a turn's steps [S]; NaN, an unscored step, adds nothing."""
        return values.new_zeros(len(self)).index_add(0, self.of_step, values.nan_to_num(0.0))

    def returns_to_go(self, values: torch.Tensor, gamma: float) -> torch.Tensor:
        """[U]: `R_u = r_u + gamma * R_{u+1}` inside each rollout, of values [U]."""
        if not len(self):
            return values
        table = values.new_zeros(self.last.numel(), int(self.index.max()) + 1)
        table[self.rollout, self.index] = values
        for turn in range(table.shape[1] - 2, -1, -1):
            table[:, turn] += gamma * table[:, turn + 1]
        return table[self.rollout, self.index]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[T]: values of turns [U] on all their tokens, exactly 0 where the environment wrote."""
        return torch.cat([values, values.new_zeros(1)])[self.ids]  # -1 is the appended 0


def add_step_credit(
    outcome: SearchR1,
    batch: RolloutBatch,
    policy: PolicyScorer,
    values: torch.Tensor,
    *,
    alpha: float,
    placement: Placement,
) -> Credit:
    """The outcome's advantages, plus `alpha` times the value of each search step on the tokens it is placed on.

    * "query": shared out equally over the tokens of the step's query.
    * "closing": on the last token of the turn that searched; values of a turn's steps are summed.

    Args:
        outcome: makes the advantages of the outcome, and is what `alpha` 0 gives exactly.
        batch, policy: of the call.
        values: float [S]; NaN marks a step without one.

    Returns:
        Credit with the outcome's metrics and `advantage/bonus_abs_mean`: mean absolute value added to those tokens.
    """
    step_ids = batch.step_ids
    if placement == "closing":
        turns = Turns.of(batch)
        searched = turns.of_step.unique()
        step_ids = torch.full_like(step_ids, -1).scatter(0, turns.stop[searched] - 1, searched)
        valued = turns.of_step[~values.isnan()].bincount(minlength=len(turns)) > 0
        values = torch.where(valued, turns.gains(values), torch.nan)
    plain = outcome(batch, policy)
    advantages = masked_advantages(
        batch.rewards,
        batch.groups,
        batch.cu_seqlens,
        batch.policy_mask,
        step_ids,
        values,
        alpha=alpha,
        eps=outcome.eps,
        ddof=outcome.ddof,
        scale=outcome.scale,
        singleton=outcome.singleton,
    )
    credited = torch.isin(step_ids, (~values.isnan()).nonzero().squeeze(1))
    bonus = mean((advantages - plain.advantages)[credited].abs())
    return Credit(advantages, metrics={**plain.metrics, "advantage/bonus_abs_mean": bonus})
