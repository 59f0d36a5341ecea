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
    def options(self) -> dict[str, int | bool]:
        """Of the compiler. Fusion into fma is stated because Triton's default changes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    @property
    def launch(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch."""
        return {**self.blocks, **self.options}


def _by_dtype(
    kernel: str, dtypes: tuple[torch.dtype, ...], blocks: dict[str, int], num_warps: int
) -> dict[torch.dtype, Config]:
    return {dtype: Config(kernel, dtype, blocks, num_warps) for dtype in dtypes}


MASKED_ADVANTAGES = _by_dtype("masked_advantages", (torch.float32, torch.float64), {"BLOCK": 512}, 4)
#: Answers are short and steps have a handful of branches: a warp holds them all.
INFORMATION_GAIN = _by_dtype("information_gain", (torch.float32, torch.float64), {"BRANCHES": 8, "TOKENS": 16}, 1)

ALL = (*MASKED_ADVANTAGES.values(), *INFORMATION_GAIN.values())
