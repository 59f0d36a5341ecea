"""An index over two and three processes gives what one index with all rows gives."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from stepcredit.retrieval.index import DenseIndex
from stepcredit.retrieval.sharded import ShardedIndex
from test_dense_index import compressed, exact, normal

#: Where the rows of the ranks end; duplicates lie in several stripes, and one stripe has fewer rows than k.
STRIPES = {2: [0, 130, 500], 3: [0, 130, 133, 500]}


def rows():
    vectors = compressed(500)
    vectors[131], vectors[140], vectors[400] = vectors[7], vectors[7], vectors[7]
    return vectors


def queries(rank):
    """Rank 1 has none."""
    return torch.cat([rows()[7:8], normal(3 + rank, seed=rank)]) if rank != 1 else normal(0)


def work(rank, ranks, directory):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=ranks)
    first, last = STRIPES[ranks][rank : rank + 2]
    for dtype in ("float32", "int8"):
        index = ShardedIndex(DenseIndex.build(rows()[first:last], dtype))
        assert len(index) == 500
        for k in (3, 20, 1000):
            hits = index.search(queries(rank), k)
            scores, ids = exact(queries(rank), rows(), k)
            assert torch.equal(hits.ids, ids), (rank, dtype, k)
            assert torch.equal(hits.scores, scores)
            assert hits.rescored.shape == (len(queries(rank)),)
        wrong = queries(rank)[:, 1:] if rank == ranks - 1 else queries(rank)
        message = "it must be" if rank == ranks - 1 else f"rank {ranks - 1} asked for something"
        with pytest.raises(ValueError, match=message):
            index.search(wrong, 3)
        with pytest.raises(ValueError, match="it must be the same on all"):
            index.search(queries(rank), 3 + rank)
    with pytest.raises(ValueError, match="must have one"):
        ShardedIndex(DenseIndex.build(normal(5, 8 + rank)))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("ranks", STRIPES)
def test_stripes_are_one_index(ranks, tmp_path):
    mp.spawn(work, args=(ranks, str(tmp_path)), nprocs=ranks)
