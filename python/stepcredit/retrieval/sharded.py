"""An index too large for one device: every rank of a process group holds a stripe of the rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from stepcredit.retrieval.index import DenseIndex
from stepcredit.retrieval.int8 import DenseHits


class ShardedIndex:
    """The rows of all ranks as one index: rank 0's first, then rank 1's, and so on.

    Every rank makes it and every rank searches it at the same time, each with queries of its own (or none): they are
    gathered, searched in every stripe, and the hits of all stripes merged, equal scores by lower row. The result is
    that of one index with all rows.

    Args:
        shard: this rank's rows.
        group: the process group; None is the default one.

    Raises:
        ValueError: the ranks' rows are not of one width; every rank raises.
    """

    def __init__(self, shard: DenseIndex, *, group: dist.ProcessGroup | None = None) -> None:
        self.shard = shard
        self.group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        sizes = self._gather(torch.tensor([len(shard), shard.width], device=self.device))
        if len(set(sizes[:, 1].tolist())) > 1:
            raise ValueError(f"shard: the ranks' vectors have widths {sizes[:, 1].tolist()}; they must have one")
        self._firsts = [0, *sizes[:, 0].cumsum(0).tolist()]

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def width(self) -> int:
        """D."""
        return self.shard.width

    @property
    def device(self) -> torch.device:
        """Where queries have to be."""
        return self.shard.device

    def search(self, queries: Tensor, k: int, *, allow_approximate: bool = False) -> DenseHits:
        """As `DenseIndex.search`, over all ranks' rows. Where one rank's arguments are wrong it raises ValueError, and
        so does every other, which says that one did; all ranks give the same k."""
        error: ValueError | None = None
        try:
            self.shard.check(queries, k)
        except ValueError as raised:
            error = raised
        asked = torch.tensor([-1 if error else len(queries), k], device=self.device)
        counts = self._gather(asked)
        if error is not None:
            raise error
        if bool((counts[:, 0] < 0).any()):
            raise ValueError(f"rank {int(counts[:, 0].argmin())} asked for something that cannot be searched")
        if len(set(counts[:, 1].tolist())) > 1:
            raise ValueError(f"k is {counts[:, 1].tolist()} on the ranks; it must be the same on all")
        most = int(counts[:, 0].max())
        padded = queries.new_zeros(most, self.width)
        padded[: len(queries)] = queries
        everyone = self._gather(padded)  # [ranks, most, D]
        hits = self.shard.search(everyone.flatten(0, 1), k, allow_approximate=allow_approximate)
        count = min(k, len(self))
        scores = padded.new_full((self._ranks * most, count), -torch.inf)
        ids = torch.full(scores.shape, len(self), device=self.device)  # after every row, where a stripe has no more
        scores[:, : hits.ids.shape[1]] = hits.scores
        ids[:, : hits.ids.shape[1]] = hits.ids + self._firsts[self._rank]
        mine = slice(self._rank * most, self._rank * most + len(queries))
        # [ranks, queries, count] -> [queries, ranks * count], in the order of the rows where scores are equal.
        found = self._gather(scores)[:, mine].transpose(0, 1).flatten(1)
        rows = self._gather(ids)[:, mine].transpose(0, 1).flatten(1)
        found, best = found.sort(dim=1, descending=True, stable=True)
        rescored = self._gather(hits.rescored)[:, mine].sum(0)
        return DenseHits(found[:, :count], rows.gather(1, best)[:, :count], rescored)

    def _gather(self, mine: Tensor) -> Tensor:
        """What every rank has, stacked."""
        out = mine.new_empty(self._ranks, *mine.shape)
        dist.all_gather(list(out.unbind(0)), mine.contiguous(), group=self.group)
        return out
