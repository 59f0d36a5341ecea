"""Documents of `/retrieve`, ours and those of other servers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcredit.retrieval import Passage
from stepcredit.retrieval.wire import document_of, parse_response, passage_of


@given(st.text(), st.text())
def test_a_document_is_its_passage(title, text):
    assert passage_of(document_of(Passage("a", title, text)), "it") == Passage("a", title, text)


@pytest.mark.parametrize(
    ("document", "passage"),
    [
        ({"id": "7", "contents": '"Mark"\ntext\nmore'}, Passage("7", "Mark", "text\nmore")),
        ({"id": 7, "contents": "Mark\ntext"}, Passage("7", "Mark", "text")),
        ({"id": "7", "title": "Mark", "text": "text", "contents": "other"}, Passage("7", "Mark", "text")),
        ({"id": "7", "title": "Mark", "text": None, "contents": '"\ntext'}, Passage("7", '"', "text")),
        ({"id": "7", "contents": '"only a line"'}, Passage("7", "", '"only a line"')),
    ],
)
def test_documents_of_other_servers(document, passage):
    assert passage_of(document, "it") == passage


def test_a_document_without_an_id_is_named_after_what_it_says():
    first, same, other = (passage_of({"contents": text}, "it") for text in ('"A"\nx', "A\nx", "A\ny"))
    assert first == same
    assert first.id.startswith("sha256:")
    assert other.id != first.id


def test_an_answer_without_hits_is_one():
    assert parse_response(b'{"result": [[], []]}', 2, 3) == [[], []]
