"""A preallocated key-value cache in which the slot of a token is its position."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """Keys and values of `rows` sequences of different lengths, for decoder models of Hugging Face.

    The token at position p of a row lives in slot p, so that a key is visible exactly if its slot is not beyond the
    query's position: no left padding, no holes, no per-row offsets. Padding columns of a forward write beyond the
    row's real tokens, where nothing looks until real tokens overwrite them. A decode step writes one slot per row in
    place, where a growing cache would copy all of it.

    The rows a forward runs on are always the first n: `swap` moves rows that have finished out of the way.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.capacity = 0
        self._keys: list[torch.Tensor] = []  # per layer [rows, heads, capacity, head width]
        self._values: list[torch.Tensor] = []
        self._row_index = torch.empty(0, dtype=torch.int64)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._visible = 0

    def begin(self, slots: torch.Tensor, visible: int, needed: int) -> None:
        """Announce a forward: `slots` int64 [n, q], all below `needed`, are where its tokens go; its queries see (at
        most) slots `[0, visible)`."""
        self._row_index = torch.arange(slots.shape[0], device=slots.device)[:, None]
        self._slots = slots
        self._visible = visible
        if needed > self.capacity:
            # Half as much again, in whole blocks of 64, so that growth is rare.
            self.capacity = -(-needed * 3 // 128) * 64
            self._keys = [self._grown(x) for x in self._keys]
            self._values = [self._grown(x) for x in self._values]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this layer's new keys and values [n, heads, q, width]; returns all visible ones."""
        if layer_idx == len(self._keys):
            for store, new in ((self._keys, key_states), (self._values, value_states)):
                # Zeros, not empty: a masked slot still meets a zero weight, and zero times NaN is NaN.
                store.append(new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[3]))
        n = key_states.shape[0]
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._row_index, :, self._slots] = key_states.transpose(1, 2)
        values[self._row_index, :, self._slots] = value_states.transpose(1, 2)
        return keys[:n, :, : self._visible], values[:n, :, : self._visible]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are passed explicitly, so that no model needs this; the visible width."""
        return self._visible

    def repeat(self, rows: int, times: int, length: int) -> None:
        """Row i of the first `rows` becomes rows `[i * times, (i + 1) * times)`, in its first `length` slots."""
        if times == 1:
            return
        for x in (*self._keys, *self._values):
            x[: rows * times, :, :length] = x[:rows, :, :length].repeat_interleave(times, 0)

    def swap(self, i: int, j: int) -> None:
        """Exchange two rows."""
        for x in (*self._keys, *self._values):
            x[[i, j]] = x[[j, i]]

    def _grown(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(x.shape[0], x.shape[1], self.capacity, x.shape[3])
        out[:, :, : x.shape[2]] = x
        return out


def attention_mask(
    config: PreTrainedConfig, slots: torch.Tensor, visible: int, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The additive mask(s) [n, 1, q, visible] of a forward over a `SlotCache`: causal by position, and windowed where
    the model's layers are.

    Args:
        config: the text model's configuration.
        slots: int64 [n, q], the position of each query token.
        visible: number of slots that keys are read from.
        dtype: of the model.

    Returns:
        One mask; for models that mix kinds of layers, one by kind (as these models accept them).
    """
    keys = torch.arange(visible, device=slots.device)
    past = keys <= slots[:, None, :, None]

    def additive(seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=dtype, device=slots.device).masked_fill(~seen, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    if window is None or (kinds and "sliding_attention" not in kinds):
        return additive(past)
    near = additive(past & (keys > slots[:, None, :, None] - window))
    return {"full_attention": additive(past), "sliding_attention": near} if kinds else near
