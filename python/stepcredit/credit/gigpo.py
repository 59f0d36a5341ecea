"""`gigpo`: outcome advantage, plus an advantage among the turns of a group that started from the same state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.credit.base import Credit, group_relative, mean
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.credit.turns import Turns
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class GiGPO:
    """GiGPO (arXiv 2505.10978): turns of a group that saw the same observation are compared by what followed.

    For turn t of rollout i, of K turns and with outcome reward r_i::

        R_t = gamma^(K-1-t) * r_i                    # return-to-go; only the last turn is rewarded
        A_t = A_i + omega * (R_t - mean) / (std + eps)

    where A_i is the outcome's advantage of `SearchR1`, mean and std are those of the R of all turns of the group with
    the same anchor state, and A_t is on all tokens of the turn. The observation of a turn is the message of the
    environment before it: the prompt, then passages or a notice. A turn alone in its state has no step advantage.

    Of our choice: similar observations are those whose sets of tokens have a Jaccard index of at least `similarity`,
    and states are the connected components of similar ones, so that the order of rollouts does not matter (the released
    code compares texts by difflib's ratio with the first member of each state). Outcomes are normalised over rollouts,
    as in the paper's equation 3; the released code counts each as often as it has turns.

    Metrics, beside those of `SearchR1`:

    * `gigpo/turns`, `gigpo/states`: turns of the policy, and anchor states among them.
    * `gigpo/shared`: share of the turns that share their state with another turn.
    * `gigpo/shared_later`: the same of the turns after the first, which do not share it by design (0 without any).
    * `advantage/bonus_abs_mean`: mean absolute step advantage of all policy tokens.

    Attributes:
        omega: weight of the step advantage (paper: 1). 0 gives exactly the advantages of `SearchR1`.
        gamma: discount of the return-to-go (released scripts: 0.95).
        mode: "mean_std_norm" divides by the standard deviation, in both advantages (released script for search), or
            "mean_norm" (released default), which is `scale` "none" of `SearchR1`.
        similarity: observations at least this similar are one state; 1: only equal ones (paper). The released code has
            0.95, and 0.9 in its script for search, of another measure.
        eps: added to a standard deviation (released code: 1e-6).
        ddof: degrees of freedom subtracted in the variance (released code: 1).
        singleton: outcome advantage of a group of one: its "reward" (released code), or "zero".
    """

    omega: float = 1.0
    gamma: float = 0.95
    mode: Literal["mean_norm", "mean_std_norm"] = "mean_std_norm"
    similarity: float = 0.95
    eps: float = 1e-6
    ddof: int = 1
    singleton: Literal["zero", "reward"] = "reward"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", eps=0, ddof=0)
        require(math.isfinite(self.omega), "credit.omega", "finite", self.omega)
        require(0 <= self.gamma <= 1, "credit.gamma", "in [0, 1]", self.gamma)
        require(0 < self.similarity <= 1, "credit.similarity", "in (0, 1]", self.similarity)

    def __call__(
        self,
        batch: RolloutBatch,
        policy: PolicyScorer,
        *,
        step: int = 0,
        progress: float = 1.0,
        temperature: float | None = None,
        verify: bool = False,
    ) -> Credit:
        scale: Literal["std", "none"] = "std" if self.mode == "mean_std_norm" else "none"
        plain = SearchR1(eps=self.eps, ddof=self.ddof, scale=scale, singleton=self.singleton)(batch, policy)
        turns = Turns.of(batch)
        states = anchor_states(batch, turns, self.similarity)
        returns = turns.returns_to_go(turns.outcome(batch.rewards), self.gamma)
        step_advantage = group_relative(returns, states, eps=self.eps, ddof=self.ddof, scale=scale, singleton="zero")
        bonus = turns.spread(self.omega * step_advantage)
        shared = (states.bincount()[states] > 1).float()
        metrics = {
            **plain.metrics,
            "advantage/bonus_abs_mean": mean(bonus[batch.policy_mask].abs()),
            "gigpo/turns": float(len(turns)),
            "gigpo/states": float(states.unique().numel()),
            "gigpo/shared": mean(shared),
            "gigpo/shared_later": mean(shared[turns.index > 0]),
        }
        return Credit(plain.advantages + bonus, metrics=metrics)


def anchor_states(batch: RolloutBatch, turns: Turns, similarity: float) -> torch.Tensor:
    """The anchor state of each turn, int64 [U]: turns of one group with equal or similar observations share one.

    Args:
        batch: packed rollouts.
        turns: its turns.
        similarity: least Jaccard index of the token sets of similar observations; 1: only equal sequences are alike.
    """
    tokens = batch.tokens.cpu().numpy()
    groups = batch.groups[turns.rollout].tolist()
    before = torch.where(turns.index > 0, turns.stop.roll(1), batch.cu_seqlens[turns.rollout]).tolist()
    numbers: dict[tuple[int, bytes], int] = {}
    seen: list[np.ndarray] = []
    state = []
    for group, first, last in zip(groups, before, turns.start.tolist(), strict=True):
        key = (group, tokens[first:last].tobytes())
        if key not in numbers:
            numbers[key] = len(seen)
            seen.append(tokens[first:last])
        state.append(numbers[key])
    merged = np.arange(len(seen))
    if similarity < 1:
        by_group: dict[int, list[int]] = {}
        for (group, _), number in numbers.items():
            by_group.setdefault(group, []).append(number)
        for members in by_group.values():
            merged[members] = np.asarray(members)[_components([seen[m] for m in members], similarity)]
    return torch.from_numpy(merged[np.asarray(state, np.int64)]).to(batch.tokens.device)


def _components(observations: list[np.ndarray], similarity: float) -> np.ndarray:
    """Of each of n observations the first one that a chain of similar ones leads to, int64 [n]."""
    owner = np.repeat(np.arange(len(observations)), [len(o) for o in observations])
    _, word = np.unique(np.concatenate(observations), return_inverse=True)
    holds = np.zeros((len(observations), word.max() + 1))
    holds[owner, word] = 1
    both, size = holds @ holds.T, holds.sum(1)
    alike = both >= similarity * (size[:, None] + size - both)
    label = np.arange(len(observations))
    while True:
        nearest = np.where(alike, label, len(label)).min(1)
        if (nearest == label).all():
            return label
        label = nearest
