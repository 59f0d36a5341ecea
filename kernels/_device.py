"""What the launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: make it the tensor's. Nothing for a CPU tensor, which is interpreted."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
