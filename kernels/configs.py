"""Every configuration that a Triton kernel may be launched with. Importing this does not import Triton.

The tests compile each of them ahead of time for sm_80, sm_90 and sm_100. Sizes were chosen to fit there without
spilling registers; none was measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel is compiled and launched.

    Attributes:
        kernel: stem of the file and of the op.
        dtype: of the op's floating inputs.
        blocks: block sizes, by the name of the kernel's constexpr.
        num_warps: warps of a program.
        num_stages: tiles in flight in software-pipelined loops.
    """

    kernel: str
    dtype: torch.dtype
    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}
