"""What the launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: make it the tensor's. Nothing for a CPU tensor, which is interpreted."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for a device that only interprets or compiles, those of a small one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
