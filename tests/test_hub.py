from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from stepcredit.data.jsonl import load_jsonl

CORPUS = [
    {"id": "p1", "contents": '"Paris"\nParis is the capital of France.'},
    {"id": "p2", "title": "Rome", "text": "Rome is the capital of Italy."},
]
QUESTIONS = {
    "train": [{"id": "q1", "question": "Capital of France?", "golden_answers": ["Paris"], "supporting": ["p1"]}],
    "validation": [{"id": "q2", "question": "Capital of Italy?", "answers": ["Rome"]}],
    "test": [{"id": "q3", "question": "Capital of Spain?", "answers": ["Madrid"], "split": "dev"}],
}


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        return {"train": CORPUS} if "corpus" in name else QUESTIONS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_rows_are_read_like_lines(hub):
    data = load_jsonl("hub:me/questions:small", "hub:me/corpus")
    assert set(hub) == {("me/questions", "small"), ("me/corpus", None)}
    assert (data.passages[0].title, data.passages[0].text) == ("Paris", "Paris is the capital of France.")
    assert [q.id for q in data.train] == ["q1"]
    assert data.train[0].plan == ("Paris",)
    assert {q.id for q in data.dev + data.test} == {"q2", "q3"}  # the row's own split comes first


def test_a_bad_row_is_named(hub, monkeypatch):
    monkeypatch.setitem(QUESTIONS, "train", [{"id": "q1", "question": "Capital of France?"}])
    with pytest.raises(ValueError, match="hub:me/questions:1: question 'q1': field 'answers' is missing"):
        load_jsonl("hub:me/questions", "hub:me/corpus")


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match="'hub:questions' is no Hub data set"):
        load_jsonl("hub:questions", "hub:questions")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stepcredit\[hub\]'"):
        load_jsonl("hub:me/questions", "hub:me/corpus")
