"""Trees of tokens, and bins of trees: what one packed forward pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stepcredit.ops.tree_attention import TreeLayout


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that continue the path of `parent` after `at` of its tokens; -1 continues nothing."""

    tokens: tuple[int, ...]
    parent: int
    at: int


@dataclass(frozen=True, slots=True)
class Read:
    """Log-probs wanted: of `targets[k]`, at `rows[k]` = (segment, index of the token that predicts it)."""

    rows: tuple[tuple[int, int], ...]
    targets: tuple[int, ...]
    temperature: float


class TokenTree:
    """Token sequences that share prefixes, each stored once, and the log-probs to read from them.

    Attributes:
        name: what to call the tree in an error.
        segments: parents before children.
        reads: in the order in which they were asked for.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.segments: list[Segment] = []
        self.reads: list[Read] = []
        self._known: dict[Segment, int] = {}

    def add(self, tokens: Sequence[int], parent: int = -1, at: int = 0) -> int:
        """Index of the segment that continues `parent` after `at` of its tokens; equal segments are stored once."""
        if parent >= 0 and not 0 <= at <= len(self.segments[parent].tokens):
            raise ValueError(f"at must be in [0, {len(self.segments[parent].tokens)}], got {at}")
        segment = Segment(tuple(tokens), parent, at)
        if segment not in self._known:
            self._known[segment] = len(self.segments)
            self.segments.append(segment)
        return self._known[segment]

    def read(self, segment: int, at: int, targets: Sequence[int], temperature: float = 1.0) -> int:
        """Ask for the log-probs of `targets`, the first of which follows `at` tokens of `segment`; all but the last
        must be the segment's next tokens. Returns the index of the read.

        Each is read from the row before it, which for `at` = 0 lies in an ancestor.
        """
        rows = tuple(self._row(segment, at + k - 1) for k in range(len(targets)))
        self.reads.append(Read(rows, tuple(targets), temperature))
        return len(self.reads) - 1

    def _row(self, segment: int, index: int) -> tuple[int, int]:
        while index < 0:
            if segment < 0:
                raise ValueError("the first token of a sequence has no row that predicts it")
            parent, at = self.segments[segment].parent, self.segments[segment].at
            segment, index = parent, at + index
        return segment, index

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.segments)

    def depth(self, segment: int) -> int:
        """How many segments lie above this one."""
        depth = 0
        while (segment := self.segments[segment].parent) >= 0:
            depth += 1
        return depth


@dataclass(frozen=True, slots=True)
class Bin:
    """Trees packed into one sequence. T tokens, N reads of single log-probs.

    Attributes:
        tokens: int64 [T].
        layout: of the T tokens.
        rows: int64 [N], the packed token from whose hidden state each log-prob is read.
        targets: int64 [N].
        temperatures: float32 [N].
        places: int64 [N], where each log-prob belongs in the output of all bins.
        row_trees: int64 [N], the tree each log-prob is of.
    """

    tokens: torch.Tensor
    layout: TreeLayout
    rows: torch.Tensor
    targets: torch.Tensor
    temperatures: torch.Tensor
    places: torch.Tensor
    row_trees: torch.Tensor


def pack(trees: Sequence[TokenTree], max_tokens: int) -> list[Bin]:
    """Pack trees into bins of at most `max_tokens` tokens, longest first into the first bin with room.

    Deterministic. A tree that is larger alone gets a bin of its own. Trees without reads are left out. The output of
    all bins together holds the log-probs tree after tree, read after read, as `Bin.places` says.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    sizes = [tree.num_tokens for tree in trees]
    wanted = sorted((i for i, tree in enumerate(trees) if tree.reads), key=lambda i: (-sizes[i], i))
    members: list[list[int]] = []
    room: list[int] = []
    for i in wanted:
        at = next((b for b, free in enumerate(room) if free >= sizes[i]), len(room))
        if at == len(room):
            members.append([])
            room.append(max_tokens)
        members[at].append(i)
        room[at] -= sizes[i]
    counts = [sum(len(r.targets) for r in tree.reads) for tree in trees]
    first_place = np.cumsum([0, *counts])
    return [_bin(trees, chosen, first_place) for chosen in members]


def _bin(trees: Sequence[TokenTree], members: Sequence[int], first_place: np.ndarray) -> Bin:
    tokens: list[int] = []
    lengths: list[int] = []
    ranges: list[list[tuple[int, int]]] = []
    rows: list[int] = []
    targets: list[int] = []
    temperatures: list[float] = []
    places: list[np.ndarray] = []
    row_trees: list[int] = []
    for i in members:
        tree = trees[i]
        # Segments at one fork lie side by side, which tree_attention turns into one product; parents come first.
        order = sorted(
            range(len(tree.segments)),
            key=lambda s: (
                tree.depth(s),
                tree.segments[s].parent,
                tree.segments[s].at,
                -len(tree.segments[s].tokens),
                s,
            ),
        )
        start: dict[int, int] = {}
        paths: dict[int, list[tuple[int, int]]] = {-1: []}
        for s in order:
            segment = tree.segments[s]
            path = list(paths[segment.parent])
            if segment.at:
                path.append((start[segment.parent], start[segment.parent] + segment.at))
            start[s], paths[s] = len(tokens), path
            tokens += segment.tokens
            lengths.append(len(segment.tokens))
            ranges.append(path)
        for read in tree.reads:
            rows += [start[s] + index for s, index in read.rows]
            targets += read.targets
            temperatures += [read.temperature] * len(read.targets)
        places.append(np.arange(first_place[i], first_place[i + 1]))
        row_trees += [i] * len(places[-1])
    return Bin(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        layout=TreeLayout.build(lengths, ranges),
        rows=torch.tensor(rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        temperatures=torch.tensor(temperatures, dtype=torch.float32),
        places=torch.from_numpy(np.concatenate(places)),
        row_trees=torch.tensor(row_trees, dtype=torch.int64),
    )
