"""README's code runs, and what it says about the tree and the metrics is so."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from scripted_rollouts import random_policy
from stepcredit import Question
from stepcredit.protocol import get_protocol
from stepcredit.train.metrics import GLOSSARY
from tokenizers_under_test import byte_bpe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loop_in_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    tokenizer = byte_bpe()
    ids = tokenizer.encode
    protocol = get_protocol("search_r1")
    questions = [Question("a", "Capital of France?", ("Paris",)), Question("b", "Capital of Italy?", ("Rome",))]

    def turn(text):
        return ids(text), [-1.0] * len(ids(text))

    names = {
        "questions": questions,
        "tokenizer": tokenizer,
        "protocol": protocol,
        "model": random_policy("llama", tokenizer),
        "samples": [
            (
                group,
                protocol.prompt(questions[group], tokenizer),
                [turn(f"<search>{query}</search>"), turn("<answer>Paris</answer>")],
                [f"\n<information>\n{passage}\n</information>\n"],
                "Paris",
                reward,
            )
            for group, query, passage, reward in (
                (0, "France", "Paris is the capital of France.", 1.0),
                (0, "Lyon", "Lyon is a city of France.", 0.0),
                (1, "Italy", "Italy is a country in Europe.", 0.0),
                (1, "Rome", "Rome is the capital of Italy.", 0.0),
            )
        ],
    }
    exec(code[1], names)
    batch, credit = names["batch"], names["credit"]
    assert credit.metrics["ig/scored"] == 4
    assert names["advantages"].shape == (4, int(batch.cu_seqlens.diff().max()))
    assert torch.count_nonzero(credit.advantages[~batch.policy_mask]) == 0
    assert torch.count_nonzero(credit.advantages[batch.step_ids >= 2]) > 0  # the all-wrong group's queries


def test_the_metrics_table_is_the_glossary():
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", README.split("## Metrics")[1].split("\n## ")[0], re.MULTILINE)
    assert rows == list(GLOSSARY.items())


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", README)


def test_the_map_names_what_exists():
    block = re.search(r"## Map\n\n```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    folder = ROOT
    for line in block[1].splitlines():
        name = line.split("  ")[0] if not line.startswith(" ") else line.split()[0]
        for path in name.replace(",", "").split():
            if not line.startswith(" "):
                folder = ROOT / path if path.endswith("/") else folder
                assert (ROOT / path).exists(), path
            elif "." in path or path.endswith("/"):
                assert (ROOT / "python/stepcredit" / path).exists(), path
