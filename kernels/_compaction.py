"""Which rows and tiles programs work on, decided on the device: the host never learns how many they are."""

from __future__ import annotations

import torch

#: Places, those that are kept first, their number, and the stride from one list of them to the next.
Listed = tuple[torch.Tensor | None, torch.Tensor | None, int]


def compacted(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places along the last dimension, those that are kept first and in order, and how many these are: int64 [..., N]
    and [..., 1], on the device."""
    return kept.logical_not().to(torch.uint8).argsort(stable=True), kept.sum(-1, keepdim=True, dtype=torch.int64)


def listed_tiles(large: torch.Tensor | None, together: int) -> tuple[Listed, Listed]:
    """Of each block of rows the tiles that are large, and of each `together` neighbouring tiles the blocks of rows in
    which one of them is. `large` is [blocks, tiles]; None, and there are no lists."""
    if large is None:
        return (None, None, 0), (None, None, 0)
    padded = torch.nn.functional.pad(large, (0, -large.shape[1] % together))
    across = padded.unflatten(1, (-1, together)).amax(2).T
    by_rows, by_tokens = ((*compacted(x.contiguous()), x.shape[1]) for x in (large, across))
    return by_rows, by_tokens
