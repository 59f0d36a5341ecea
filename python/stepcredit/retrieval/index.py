"""An exact index: all vectors in memory on one device, every search compares with all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from stepcredit.ops.topk_search import topk_search


class DenseIndex:
    """Exact inner-product search over the op `topk_search`.

    Args:
        vectors: [P, D] float32, on the device where searches shall run; kept, not copied.

    Raises:
        TypeError: `vectors` is not float32.
        ValueError: `vectors` is not two-dimensional, has no row, or holds NaN.
    """

    def __init__(self, vectors: Tensor) -> None:
        if vectors.dtype != torch.float32:
            raise TypeError(f"vectors has dtype {vectors.dtype}; it must be torch.float32")
        if vectors.dim() != 2 or vectors.shape[0] == 0:
            raise ValueError(f"vectors has shape {tuple(vectors.shape)}; it must be [P, D] with at least one row")
        with_nan = vectors.isnan().any(dim=1).nonzero()
        if len(with_nan):
            raise ValueError(f"vectors[{int(with_nan[0])}] holds NaN ({len(with_nan)} such rows)")
        self.vectors = vectors

    def __len__(self) -> int:
        return self.vectors.shape[0]

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The K = min(k, P) rows with the highest inner product, best first; equal scores by lower row.

        Args:
            queries: [Q, D] float32 on the index's device.
            k: at least 1.

        Returns:
            scores [Q, K] float32 and rows [Q, K] int64. Errors as in `topk_search`.
        """
        return topk_search(queries, self.vectors, min(k, len(self)))
