"""Which attention a model runs, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def running_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """All of the model runs this attention of Hugging Face's registry; afterwards each of its parts, such as a vision
    tower, what it ran before."""
    config = model.config
    parts = {part: getattr(config, part, None) for part in config.sub_configs}
    before = {"": config._attn_implementation}
    before |= {part: one._attn_implementation for part, one in parts.items() if one is not None}
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
