"""Parts of a model, and theirs, keep the attention they ran before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
from transformers.configuration_utils import PreTrainedConfig

from stepcredit._attention import running_attention


class Vision(PreTrainedConfig):
    pass


class Thinker(PreTrainedConfig):
    sub_configs: ClassVar = {"vision": Vision}


class Speaker(PreTrainedConfig):
    sub_configs: ClassVar = {"thinker": Thinker}


def test_a_part_of_a_part_is_restored_also_after_an_error():
    config = Speaker()
    config.thinker = Thinker()
    config.thinker.vision = Vision()
    config._attn_implementation = "sdpa"
    config.thinker._attn_implementation = "eager"
    config.thinker.vision._attn_implementation = "flex_attention"
    every = (config, config.thinker, config.thinker.vision)

    def set_attention(name):
        config._attn_implementation = name  # sets the parts too

    model = SimpleNamespace(config=config, modules=list, set_attn_implementation=set_attention)

    def fail():
        with running_attention(model, "stepcredit_tree"):
            assert {one._attn_implementation for one in every} == {"stepcredit_tree"}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [one._attn_implementation for one in every] == ["sdpa", "eager", "flex_attention"]
