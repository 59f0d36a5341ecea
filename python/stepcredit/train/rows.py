"""Rollouts as rows of a padded batch, each prefix that they share written once; and rows as micro-batches.

The rollouts of a question share its prompt and, the surer the policy is of its queries, also queries and passages:
half of all tokens with SmolLM2 on the atlas. A row holds a tree of tokens; every token attends to its ancestors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from stepcredit.batch import RolloutBatch

#: What a micro-batch costs beside its tokens (collecting a set of gradients), in tokens; measured with 135M parameters
#: on two CPU cores.
MICRO_BATCH_COST = 64

#: Up to this many tokens a row, eager attention trains faster on the CPU than the fused kernel: forward and backward of
#: 12 x 100 tokens in bfloat16 took 13 ms against 47, of 3 x 400 tokens 44 against 65. No tree is made longer.
EAGER_LENGTH = 512


@dataclass(slots=True)
class Row:
    """A tree of tokens.

    Attributes:
        tokens: token ids, L of them; a token comes after its parent.
        parents: index of the token before each one, -1 for the first.
        nodes: for each rollout (index in the batch) the places of its tokens, int64, in order.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    nodes: dict[int, NDArray[np.int64]] = field(default_factory=dict)


def used_lengths(batch: RolloutBatch, used_T: torch.Tensor) -> list[int]:
    """How many leading tokens of each rollout must be run to reach its last used token; 0 where none is used.

    Args:
        batch: packed rollouts, T tokens in all.
        used_T: bool [T].
    """
    used = used_T.cpu().numpy()
    places = [used[start:stop].nonzero()[0] for start, stop in pairwise(batch.cu_seqlens.tolist())]
    return [int(at[-1]) + 1 if len(at) else 0 for at in places]


def pack_rows(batch: RolloutBatch, lengths: Sequence[int], max_tokens: int) -> list[Row]:
    """Rollouts as rows: those of one question together, in the order of their tokens, while the row stays short.

    Args:
        batch: B packed rollouts.
        lengths: how many leading tokens of each rollout to run; 0 leaves it out.
        max_tokens: of a row that several rollouts share.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for b, group in enumerate(batch.groups.tolist()):
        if lengths[b]:
            groups[group].append(b)
    rows: list[Row] = []
    for members in groups.values():
        row: Row | None = None
        previous: list[int] = []
        path = np.zeros(0, np.int64)
        for tokens, b in sorted((batch.rollouts[b].tokens[: lengths[b]], b) for b in members):
            shared = 0
            while shared < min(len(tokens), len(previous)) and tokens[shared] == previous[shared]:
                shared += 1
            if row is None or len(row.tokens) + len(tokens) - shared > max_tokens:
                row, shared = Row(), 0
                rows.append(row)
            first, added = len(row.tokens), len(tokens) - shared
            path = np.concatenate([path[:shared], np.arange(first, first + added)])
            row.parents += [int(node) for node in (path[shared - 1 : -1] if shared else [-1, *path[:-1]])][:added]
            row.tokens += tokens[shared:]
            row.nodes[b] = path
            previous = tokens
    return rows


def row_inputs(rows: Sequence[Row], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the model is given: `input_ids` [B, L], and where rollouts share a row also `position_ids` [B, L] and an
    additive `attention_mask` [B, 1, L, L] in `dtype`. Plain rows need neither: they are causal."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
    if all(len(row.nodes) == 1 for row in rows):
        return {"input_ids": ids}
    sees = np.zeros((len(rows), width, width), bool)
    sees[:, np.arange(width), np.arange(width)] = True  # padding sees itself: a row of nothing would give NaN
    depth = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        for at, parent in enumerate(row.parents):
            if parent >= 0:
                sees[number, at] |= sees[number, parent]
                depth[number, at] = depth[number, parent] + 1
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(torch.from_numpy(~sees), torch.finfo(dtype).min)
    return {"input_ids": ids, "position_ids": torch.from_numpy(depth), "attention_mask": mask[:, None]}


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Split rows into padded micro-batches at the least cost: padded tokens plus `MICRO_BATCH_COST` for each.

    Args:
        rows: any number.
        max_tokens: padded tokens of a micro-batch; a longer row is alone in one.

    Returns:
        The rows, longest first; deterministic.
    """
    order = sorted(rows, key=lambda row: -len(row.tokens))
    lengths = [len(row.tokens) for row in order]
    cost, cut = [0.0], [0]  # of the first `stop` rows; where the last of their micro-batches begins
    for stop in range(1, len(order) + 1):
        starts = [k for k in range(stop) if k == stop - 1 or (stop - k) * lengths[k] <= max_tokens]
        best = min(starts, key=lambda k: cost[k] + (stop - k) * lengths[k])
        cost.append(cost[best] + (stop - best) * lengths[best] + MICRO_BATCH_COST)
        cut.append(best)
    batches: list[list[Row]] = []
    stop = len(order)
    while stop:
        batches.append(order[cut[stop] : stop])
        stop = cut[stop]
    return batches[::-1]
