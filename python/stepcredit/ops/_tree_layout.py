"""`TreeLayout`: which packed tokens see which, for `tree_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stepcredit.ops import _checks as check


@dataclass(frozen=True, slots=True, eq=False)
class TreeLayout:
    """Which packed keys each packed token sees: its ancestors' ranges wholly, its own segment causally.

    T tokens in G segments. A segment continues a path: its ranges, in path order, are the keys of its ancestors.
    Construction reads the values (a synchronisation for tensors of a GPU: build on the CPU, then `to(device)`).

    Attributes:
        cu_segments: int64 [G+1], token offsets of the segments; a segment may be empty.
        cu_ranges: int64 [G+1], offsets of each segment's ranges in `ranges`.
        ranges: int64 [A, 2], non-empty half-open ranges of packed keys, each before the segment that sees it.
        positions: int64 [T], position of each token on its path, counted from 0.

    Raises:
        ValueError: a shape or dtype is wrong, offsets fall, a range is empty or not before its segment, or the
            positions of a path (ranges, then own tokens) are not 0, 1, 2, ...
    """

    cu_segments: torch.Tensor
    cu_ranges: torch.Tensor
    ranges: torch.Tensor
    positions: torch.Tensor

    def __post_init__(self) -> None:
        name = "TreeLayout"
        check.tensor(name, "cu_segments", self.cu_segments, 1, "i")
        check.tensor(name, "cu_ranges", self.cu_ranges, 1, "i")
        check.tensor(name, "ranges", self.ranges, 2, "i")
        check.tensor(name, "positions", self.positions, 1, "i")
        check.same_device(
            name,
            cu_segments=self.cu_segments,
            cu_ranges=self.cu_ranges,
            ranges=self.ranges,
            positions=self.positions,
        )
        check.require(self.ranges.shape[1] == 2, f"{name}: ranges must be [A, 2], got {tuple(self.ranges.shape)}")
        check.offsets(name, "cu_segments", self.cu_segments, self.positions.shape[0])
        check.length(name, "cu_ranges", self.cu_ranges, self.cu_segments.shape[0], "one more than segments")
        check.offsets(name, "cu_ranges", self.cu_ranges, self.ranges.shape[0])
        _check_paths(*(t.cpu().numpy() for t in (self.cu_segments, self.cu_ranges, self.ranges, self.positions)))

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        ranges: Sequence[Sequence[tuple[int, int]]],
        device: torch.device | str = "cpu",
    ) -> TreeLayout:
        """The layout of segments of these lengths with these ancestor ranges; positions follow from them."""
        check.require(len(lengths) == len(ranges), f"TreeLayout: {len(lengths)} lengths for {len(ranges)} ranges")
        cu_segments = np.cumsum([0, *lengths])
        cu_ranges = np.cumsum([0, *(len(r) for r in ranges)])
        depth = [sum(stop - start for start, stop in r) for r in ranges]
        positions = [np.arange(d, d + n) for d, n in zip(depth, lengths, strict=True)]
        layout = cls(
            torch.from_numpy(cu_segments),
            torch.from_numpy(cu_ranges),
            torch.tensor([pair for r in ranges for pair in r], dtype=torch.int64).reshape(-1, 2),
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *positions])),
        )
        return layout.to(device)

    def to(self, device: torch.device | str) -> TreeLayout:
        """The same layout on another device, not validated again."""
        moved = object.__new__(TreeLayout)
        for name in ("cu_segments", "cu_ranges", "ranges", "positions"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]


def _check_paths(cu_segments: np.ndarray, cu_ranges: np.ndarray, ranges: np.ndarray, positions: np.ndarray) -> None:
    owner = np.repeat(np.arange(len(cu_segments) - 1), np.diff(cu_ranges))
    start, stop = ranges[:, 0], ranges[:, 1]
    bad = np.flatnonzero((start < 0) | (stop <= start) | (stop > cu_segments[owner]))
    if len(bad):
        at = bad[0]
        raise ValueError(
            f"TreeLayout: range {ranges[at].tolist()} of segment {owner[at]} must be non-empty and end before the"
            f" segment, which starts at {cu_segments[owner[at]]}"
        )
    # Every run (a range, or a segment's own tokens) must start where the path is and go up by one.
    lengths = np.diff(cu_segments)
    covered = np.concatenate([[0], np.cumsum(stop - start)])
    depth = covered[cu_ranges[1:]] - covered[cu_ranges[:-1]]
    before = covered[:-1] - covered[cu_ranges[:-1]][owner]  # path length in front of each range
    own = np.flatnonzero(lengths)
    first = np.concatenate([start, cu_segments[:-1][own]])
    last = np.concatenate([stop, cu_segments[1:][own]]) - 1
    expected = np.concatenate([before, depth[own]])
    segment = np.concatenate([owner, own])
    jumps = np.concatenate([[0], np.cumsum(np.diff(positions) != 1)]) if len(positions) else positions
    bad = np.flatnonzero((positions[first] != expected) | (jumps[first] != jumps[last]))
    if len(bad):
        at = bad[0]
        raise ValueError(
            f"TreeLayout: positions of tokens [{first[at]}, {last[at] + 1}) on the path of segment {segment[at]} must"
            f" count up from {expected[at]}, got {positions[first[at] : last[at] + 1].tolist()[:8]}"
        )
