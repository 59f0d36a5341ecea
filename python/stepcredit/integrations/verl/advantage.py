"""GRPO with rewards of steps: what an agent loop must return for them to travel, and the estimator that reads them.

verl gives an estimator one matrix of rewards, in which an agent loop's output fills the last token only.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import register_adv_est


class StepRewardOutput(AgentLoopOutput):
    """A rollout whose searches have rewards of their own.

    Attributes:
        token_rewards: one a response token, in units of advantage; 0 on tokens of the environment and on the last one,
            which carries the rollout's own reward. verl's metrics of scores are their sum with it.
    """

    token_rewards: list[float]

    def as_dict(self) -> dict[str, Any]:
        """verl's fields, `rm_scores` being the rewards of all tokens."""
        output: dict[str, Any] = super().as_dict()
        rewards = torch.tensor(output.pop("token_rewards"), dtype=torch.float32)
        mask = output["response_mask"]
        if rewards.shape != mask.shape:
            raise ValueError(f"token_rewards has {rewards.numel()} entries for {mask.numel()} tokens")
        if not mask[-1]:
            raise ValueError("a rollout with rewards of steps must end with a token of the policy")
        if (stray := rewards[:-1][mask[:-1] == 0]).any() or rewards[-1]:
            at = "the last token" if not stray.any() else "a token of the environment"
            raise ValueError(f"token_rewards must be 0 on {at}")
        if "rm_scores" not in output:
            raise ValueError(
                "rewards of steps need the rollout's reward beside them; a colocated reward model overwrites"
            )
        output["rm_scores"] = output["rm_scores"] + rewards
        return output


@register_adv_est("grpo_steps")
def grpo_with_steps(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    index: Any = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's own GRPO of what the last token carries, plus what the policy's other tokens carry.

    Args:
        token_level_rewards: float [B, L], as `StepRewardOutput` lays them out.
        response_mask: 0/1 [B, L], which tokens the policy wrote.
        config: verl's `algorithm` section; `norm_adv_by_std_in_grpo` is read.
        index: [B], names of the groups.

    Returns:
        (advantages, returns), float [B, L]. Where no step has a reward both are bit for bit those of "grpo".

    Raises:
        ValueError: no groups, or the configuration changes the rewards or the mask of single tokens, so that they no
            longer say which are steps.
    """
    config = {} if config is None else config
    if index is None:
        raise ValueError("grpo_steps needs groups: the batch has no uid")
    if config.get("use_kl_in_reward", False):
        raise ValueError("grpo_steps reads rewards of tokens: algorithm.use_kl_in_reward must be false")
    if (config.get("rollout_correction") or {}).get("rollout_rs"):
        raise ValueError("grpo_steps reads the response mask: algorithm.rollout_correction.rollout_rs must be empty")
    mine = response_mask.bool()
    position = torch.arange(mine.shape[1], device=mine.device)
    last = torch.where(mine, position, -1).amax(1, keepdim=True)
    is_step = mine & (position != last)
    none = torch.zeros_like(token_level_rewards)
    advantages, returns = core_algos.compute_grpo_outcome_advantage(
        token_level_rewards=torch.where(is_step, none, token_level_rewards),
        response_mask=response_mask,
        index=index,
        norm_adv_by_std_in_grpo=config.get("norm_adv_by_std_in_grpo", True),
    )
    steps = torch.where(is_step, token_level_rewards, none)
    return torch.where(steps != 0, advantages + steps, advantages), returns
