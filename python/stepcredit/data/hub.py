"""Data sets of the Hugging Face Hub, by name: their rows are read like the lines of a JSON Lines file.

`hub:OWNER/NAME`, or `hub:OWNER/NAME:CONFIG` for a set with several configurations. Fields are those of `data.jsonl`.
Two widely used layouts are translated: FlashRAG's questions (`golden_answers`, the split in the Hub's split) and
Search-R1's corpus (`contents`, whose first line is the title in quotation marks). Needs a network and `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PREFIX = "hub:"
#: Our split of each split the Hub may have; a row's own field `split` comes first.
_SPLITS = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}


def hub_records(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of every row of all splits of a Hub data set.

    Args:
        name: "hub:OWNER/NAME" or "hub:OWNER/NAME:CONFIG".

    Raises:
        ValueError: not such a name.
        ModuleNotFoundError: the package `datasets` is not installed.
        Whatever `datasets` raises when the set cannot be had: it names the set.
    """
    repository, _, configuration = name.removeprefix(PREFIX).partition(":")
    if "/" not in repository:
        raise ValueError(f"{name!r} is no Hub data set: expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} is read with the package datasets: pip install 'stepcredit[hub]'", name="datasets"
        ) from error
    number = 0
    for split, rows in datasets.load_dataset(repository, configuration or None).items():
        for row in rows:
            number += 1
            yield number, _translate(row, _SPLITS.get(split, split))


def _translate(row: dict[str, Any], split: str) -> dict[str, Any]:
    record = {"split": split, **row}
    if "answers" not in record and "golden_answers" in record:
        record["answers"] = record["golden_answers"]
    if "contents" in record and "text" not in record:
        title, _, text = str(record["contents"]).partition("\n")
        record |= {"title": title.strip().strip('"'), "text": text}
    return record
