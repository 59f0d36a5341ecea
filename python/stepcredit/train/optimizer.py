"""AdamW on float32 masters of a model that may compute in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _collector(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def collect(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return collect


class MasterAdamW:
    """Keeps a float32 master of every trainable parameter, collects its gradient in float32, and steps AdamW on it.

    Updates at the learning rates of RL are far below the resolution of bfloat16 and would round to nothing, so they
    happen on the masters; the model's own parameters are rounded copies, written back after every step. A gradient
    moves to its master, in float32, as soon as `backward` has it: micro-batches add up without rounding, and the
    model never holds a whole set of gradients. Tied parameters have one master. For a float32 model the masters are
    the parameters themselves and cost nothing.

    Args:
        model: parameters with `requires_grad`; at most one MasterAdamW may be attached to them.
        betas, eps, weight_decay: as in `torch.optim.AdamW`; the learning rate is given to every step.
        max_grad_norm: gradients are scaled down to this global L2 norm; `inf` never scales.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = math.inf,
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("model has no parameter with requires_grad=True: nothing to train")
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(_collector(self.masters[name]))
        self.max_grad_norm = max_grad_norm
        self._settings: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.restart()

    def restart(self) -> None:
        """Start a new phase: fresh moments, the masters as they are."""
        self.adamw = torch.optim.AdamW(list(self.masters.values()), fused=True, **self._settings)

    def step(self, learning_rate: float) -> float:
        """Clip, step, write the masters back, clear the gradients.

        Returns:
            The global L2 norm of the gradient before clipping; 0.0, with nothing changed, when there is no gradient.

        Raises:
            FloatingPointError: the gradient is not finite; nothing was changed but the gradients, which are cleared.
        """
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        if not gradients:
            return 0.0
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            bad = [n for n, m in self.masters.items() if m.grad is not None and not m.grad.isfinite().all()]
            self.adamw.zero_grad()
            raise FloatingPointError(f"gradient norm is {norm}; not finite in {len(bad)} parameters: {bad[:3]}")
        if norm > self.max_grad_norm:
            torch._foreach_mul_(gradients, self.max_grad_norm / norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        self.write_back()
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's parameters."""
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() != self.masters[name].data_ptr():
                parameter.copy_(self.masters[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Masters, moments and step counts by name, e.g. "master.model.norm.weight"; not copies."""
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned, bit for bit, and write it into the model.

        Raises:
            ValueError: a master is missing, unknown, or of another shape.
        """
        known = {f"master.{name}" for name in self.masters}
        given = {name for name in tensors if name.startswith("master.")}
        if known != given:
            raise ValueError(f"optimizer state does not fit the model: {sorted(known ^ given)[:3]} differ")
        for name, master in self.masters.items():
            if tensors[f"master.{name}"].shape != master.shape:
                shapes = tuple(tensors[f"master.{name}"].shape), tuple(master.shape)
                raise ValueError(f"optimizer state of {name!r} has shape {shapes[0]}, the model {shapes[1]}")
            master.copy_(tensors[f"master.{name}"])
            moments = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in moments.values()):
                self.adamw.state[master] = {
                    k: v.to(master.device, copy=True) for k, v in moments.items() if v is not None
                }
        self.write_back()
