"""`mr_search`: each episode of a rollout is worth what it and those after it earn more than the group's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from stepcredit._validate import at_least, choices, require
from stepcredit.batch import RolloutBatch
from stepcredit.credit.base import Credit, group_relative, mean
from stepcredit.scorer import PolicyScorer


@dataclass(frozen=True, kw_only=True, slots=True)
class MRSearch:
    """MR-Search (arXiv 2603.11327): after an answer the policy reflects on it and searches on, and each such episode is
    credited with what it and the later ones earn beyond other rollouts of the group.

    For episode n of rollout i, whose reward is that of the rollout as it was when the episode ended::

        x_in = r_in - mean of r_jn over the other rollouts j of the group that have an n-th episode
        A_in = x_in + gamma * A_i(n+1)         # on all tokens that the policy wrote in episode n

    With one episode it is the leave-one-out advantage of the outcome (RLOO).

    Of our choice: a rollout that ended early has no reward of the episodes it did not reach, and counts for nobody
    there; an episode that ended without an answer has the reward of a rollout without one; a rollout that is alone in
    its group at an episode has `singleton` there.

    Metrics:

    * `mr_search/episodes`: mean number of episodes of a rollout.
    * `mr_search/reward_1`, `mr_search/reward_2` and so on: mean reward of the first episode, of the second ..., of the
      rollouts that have one.
    * `mr_search/improved`, `mr_search/worsened`: share of the rollouts of several episodes whose last reward is above,
      or below, that of their first (only where there are any).
    * `mr_search/ended_early`: rollouts that have fewer episodes than another of the batch.
    * `mr_search/alone`: episodes without another of their number and group to be compared with.
    * `advantage/zero_variance_groups`: share of groups in which no episode's reward tells a rollout from another.
    * `advantage/outcome_abs_mean`: mean absolute advantage of policy tokens.

    Attributes:
        gamma: discount of the episodes that follow (paper: 1; its ablation: 0).
        baseline: what is subtracted from a reward: the mean of the others ("leave_one_out", paper), or of all, its own
            too ("group", as in GRPO): with one episode it gives exactly the advantages of `SearchR1` of the same eps,
            ddof, scale and singleton.
        mask_exploration: episodes before a rollout's last have an advantage of 0, so that only the last is trained
            (optional in the paper; that it is their tokens that are left out, and not their rewards, is ours).
        eps: added to the standard deviation (scale="std").
        ddof: degrees of freedom subtracted in the variance (scale="std").
        scale: "none" only centres (paper); "std" divides by the group's standard deviation too.
        singleton: advantage of an episode without another to be compared with: "zero" (ours), or its "reward".
    """

    gamma: float = 1.0
    baseline: Literal["leave_one_out", "group"] = "leave_one_out"
    mask_exploration: bool = False
    eps: float = 1e-6
    ddof: int = 1
    scale: Literal["std", "none"] = "none"
    singleton: Literal["zero", "reward"] = "zero"

    def __post_init__(self) -> None:
        choices(self, "credit.")
        at_least(self, "credit.", eps=0, ddof=0)
        require(0 <= self.gamma <= 1, "credit.gamma", "in [0, 1]", self.gamma)

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
        """As in `CreditMethod`. ValueError when the rewards of a rollout or of its episodes were not assigned."""
        rewards = [rollout.episode_rewards for rollout in batch.rollouts]
        device = batch.rewards.device
        count = torch.tensor([len(row) for row in rewards], device=device)
        number = torch.arange(int(count.max()), device=device)
        present = number < count[:, None]
        flat = torch.tensor([reward for row in rewards for reward in row], dtype=batch.rewards.dtype).to(device)
        compared = (batch.groups[:, None] * number.numel() + number)[present]  # rollouts of a group at an episode
        relative, size = self._relative(flat, compared)

        returns = torch.zeros(present.shape, dtype=flat.dtype, device=device).masked_scatter(present, relative)
        for n in range(number.numel() - 2, -1, -1):
            returns[:, n] += self.gamma * returns[:, n + 1]
        if self.mask_exploration:
            returns *= number == count[:, None] - 1
        advantages = torch.where(batch.policy_mask, returns.flatten()[_episode_of_token(batch, number.numel())], 0.0)

        told = batch.groups.repeat_interleave(count)[_differs(flat, compared)].unique()
        first, last = flat[count.cumsum(0) - count], flat[count.cumsum(0) - 1]
        several = count > 1
        metrics = {
            "mr_search/episodes": mean(count.float()),
            **{f"mr_search/reward_{n + 1}": mean(flat[present.nonzero()[:, 1] == n]) for n in number.tolist()},
            "mr_search/ended_early": float((count < count.max()).sum()),
            "mr_search/alone": float((size == 1).sum()),
            "advantage/zero_variance_groups": 1 - told.numel() / batch.groups.unique().numel(),
            "advantage/outcome_abs_mean": mean(advantages[batch.policy_mask].abs()),
        }
        if bool(several.any()):
            metrics["mr_search/improved"] = mean((last > first)[several].float())
            metrics["mr_search/worsened"] = mean((last < first)[several].float())
        return Credit(advantages, metrics=metrics)

    def _relative(self, rewards: torch.Tensor, compared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards [N] against those that are compared with them, which share a label; and how many these are, with
        themselves."""
        relative = group_relative(
            rewards, compared, eps=self.eps, ddof=self.ddof, scale=self.scale, singleton=self.singleton
        )
        size = compared.bincount()[compared]
        if self.baseline == "leave_one_out":  # r - mean of the others = n / (n - 1) * (r - mean of all)
            relative = torch.where(size > 1, relative * (size / (size - 1).clamp(min=1)), relative)
        return relative, size


def _episode_of_token(batch: RolloutBatch, width: int) -> torch.Tensor:
    """int64 [T]: `rollout * width + episode` of each token; what precedes an episode is part of it."""
    places, lengths = [], []
    for b, rollout in enumerate(batch.rollouts):
        at = 0
        for n, stop in enumerate([episode.stop for episode in rollout.episodes] or [len(rollout.tokens)]):
            places.append(b * width + n)
            lengths.append(stop - at)
            at = stop
    return torch.tensor(places).repeat_interleave(torch.tensor(lengths)).to(batch.tokens.device)


def _differs(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool [N]: whether a value is above the least of those with its label."""
    least = values.new_full((int(labels.max()) + 1,), float("inf")).scatter_reduce(0, labels, values, "amin")
    return values > least[labels]
