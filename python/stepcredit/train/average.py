"""An exponential moving average of the policy, as a teacher."""

from __future__ import annotations

import math

import torch

from stepcredit.scorer import PolicyScorer
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.setup import frozen_copy


class AveragePolicy:
    """The average of a policy's weights over its steps, kept in float32 beside the optimizer's masters.

    A step of RL times `tau` is far below the resolution of bfloat16: an average that were kept there would stand still.
    The model that teaches computes in the policy's dtype and holds the average rounded; for a float32 policy it is the
    average. Weights that are not trained stay those of the policy.

    Args:
        policy: whose copy teaches.
        optimizer: of the policy; its masters are averaged.
        tau: share of the way to the policy that `update` goes, in (0, 1].

    Attributes:
        weights: the averages by the masters' names, float32.
        scorer: the teacher.
    """

    def __init__(self, policy: PolicyScorer, optimizer: MasterAdamW, tau: float) -> None:
        model = frozen_copy(policy.model)
        self.optimizer = optimizer
        self.tau = tau
        self.scorer = PolicyScorer(model, policy.tokenizer, policy.protocol)
        self._parameters = {name: p for name, p in model.named_parameters() if name in optimizer.masters}
        self.weights = {name: parameter.detach().float() for name, parameter in self._parameters.items()}
        self.restart()

    def restart(self) -> None:
        """Begin at the policy as it is now."""
        self.load_state({name: master.detach() for name, master in self.optimizer.masters.items()})

    @torch.no_grad()
    def update(self) -> None:
        """`average += tau * (policy - average)`."""
        for name, average in self.weights.items():
            average.lerp_(self.optimizer.masters[name], self.tau)
        self._write_back()

    @torch.no_grad()
    def distance(self) -> float:
        """L2 norm of policy - average, over that of the policy."""
        apart = policy = 0.0
        for name, average in self.weights.items():  # one at a time: all differences would be another model
            master = self.optimizer.masters[name]
            apart += float((master - average).square().sum())
            policy += float(master.square().sum())
        return math.sqrt(apart / policy) if policy else 0.0

    def state(self) -> dict[str, torch.Tensor]:
        """The averages by name; not copies."""
        return dict(self.weights)

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over averages, bit for bit. ValueError: they are those of another model."""
        if tensors.keys() != self.weights.keys():
            differ = sorted(tensors.keys() ^ self.weights.keys())[:3]
            raise ValueError(f"the teacher's average does not fit the model: {differ} differ")
        for name, average in self.weights.items():
            if average.shape != tensors[name].shape:
                shapes = tuple(tensors[name].shape), tuple(average.shape)
                raise ValueError(f"the teacher's average of {name!r} has shape {shapes[0]}, the model {shapes[1]}")
            average.copy_(tensors[name])
        self._write_back()

    def _write_back(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.data_ptr() != self.weights[name].data_ptr():
                parameter.copy_(self.weights[name])
