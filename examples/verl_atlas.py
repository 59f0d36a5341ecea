"""Questions and retrieval for a run of verl on the atlas, which needs no download (docs/verl.md has the command).

python examples/verl_atlas.py DIRECTORY     # writes DIRECTORY/train.parquet and DIRECTORY/test.parquet
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from stepcredit.data.atlas import build_atlas
from stepcredit.protocol import get_protocol
from stepcredit.retrieval.bm25 import BM25Retriever
from stepcredit.rollout import Question

PROTOCOL = "search_r1"


def build() -> BM25Retriever:
    """The retriever, for `+stepcredit.retriever=verl_atlas:build`."""
    return BM25Retriever(build_atlas().passages)


def rows(questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """Rows as verl reads them."""
    for question in questions:
        content = f"{get_protocol(PROTOCOL).instruction}\nQuestion: {question.text}\n"
        yield {
            "data_source": "atlas",
            "prompt": [{"role": "user", "content": content}],
            "reward_model": {"style": "rule", "ground_truth": {"target": list(question.answers)}},
            "extra_info": {
                "id": question.id,
                "question": question.text,
                "supporting": list(question.supporting),
            },
        }


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    atlas = build_atlas()
    for name, questions in (("train", atlas.train), ("test", atlas.test[:256])):
        Dataset.from_list(list(rows(questions))).to_parquet(directory / f"{name}.parquet")
    print(atlas.attribution)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
