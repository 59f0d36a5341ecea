"""What docs/trl.md says of log-probs and of metrics is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl is not installed", allow_module_level=True)

import torch
from trl.trainer.utils import selective_log_softmax

import stepcredit
from scripted_rollouts import random_policy
from stepcredit.integrations.trl import ROLLOUT_COUNTS, TOOL_COUNTS
from tokenizers_under_test import byte_bpe

DOCS = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")


def test_both_ways_to_log_probs_agree():
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "gather_logprobs" in code)
    before, after = block.split("# after\n")
    model = random_policy("llama", byte_bpe())
    ids, mask = torch.randint(300, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    names = {"stepcredit": stepcredit, "selective_log_softmax": selective_log_softmax}
    names |= {"model": model, "input_ids": ids, "mask": mask}
    exec(before, names)
    theirs = names.pop("logprobs")
    exec(after, names)
    torch.testing.assert_close(names["logprobs"], theirs * mask[:, 1:], atol=1e-5, rtol=0)
    assert theirs.all()


def test_every_count_is_in_the_table():
    rows = re.findall(r"^\| (`count_.*?) \|", DOCS, re.MULTILINE)
    assert set(re.findall(r"`count_(\w+)`", "".join(rows))) == {*ROLLOUT_COUNTS, *TOOL_COUNTS, "masked_rollouts"}
