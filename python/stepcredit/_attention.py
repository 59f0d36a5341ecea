"""Which attention a model runs, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig


@contextmanager
def running_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """All of the model runs this attention of Hugging Face's registry; afterwards each of its parts, such as a vision
    tower, what it ran before."""
    owners = (module.config for module in model.modules() if isinstance(module, PreTrainedModel))
    configs = {id(config): config for config in (*_with_parts(model.config), *owners)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, attention in before:  # sets its parts too, which come after it
            config._attn_implementation = attention


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration, and after it those of its parts and of theirs."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _with_parts(part)
