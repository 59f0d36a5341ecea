"""The simulated user of a referring world: answers questions from what the target looks like, and from nothing else.

Questions are read as words; a word that the user does not know is not guessed at. Of the target a reply says the value
of one attribute, or yes or no: never its number, and never where it is beyond "top left".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stepcredit.data.scenes import WORDS, Attribute, Scene, Thing, features_of, words_of

_NOUNS: dict[str, Attribute] = {
    **dict.fromkeys(("colour", "color"), "colour"),
    **dict.fromkeys(("shape", "form"), "shape"),
    "size": "size",
    **dict.fromkeys(("where", "place", "position"), "place"),
}
_OPEN = frozenset(("what", "which", "where", "how"))
_IDENTIFYING = frozenset((
    "answer", "box", "coordinate", "coordinates", "id", "index", "mask", "number", "pixel", "pixels", "region", "x",
    "y",
))  # fmt: skip
_SMALL_WORDS = frozenset((
    "a", "an", "are", "at", "does", "do", "has", "have", "in", "is", "it", "its", "me", "mean", "of", "on", "one", "or",
    "please", "tell", "that", "the", "thing", "this", "you", "your",
))  # fmt: skip
_KNOWN = _SMALL_WORDS | _OPEN | _NOUNS.keys() | WORDS.keys()

_HINT = "Please ask for its colour, shape, size or place, one at a time."


@dataclass(frozen=True, slots=True)
class Reply:
    """What the user says, and the name under which the question is counted: "" for one that was answered."""

    text: str
    fault: str = ""


_REFUSED = Reply(f"I cannot point at it. {_HINT}", "refused_questions")
_UNCLEAR = Reply(f"I do not understand. {_HINT}", "unclear_questions")
_FOREIGN = Reply("Nothing in the scene is like that.", "foreign_questions")

#: A user: replies to a question about a thing of a scene, the same whenever it is asked.
User = Callable[[str, Thing, Scene], Reply]


def reply(question: str, target: Thing, scene: Scene) -> Reply:
    """The user's reply to a question about the target.

    * An open question ("What colour is it?", "Where is it?") gets the target's value of the one attribute it asks for,
      whatever else it says of the thing.
    * A question that names features ("Is it a large circle?") gets yes if the target has all of them, else no. Of
      several values of one feature with "or" between them ("Is it red or blue?") the target's, or "Neither.".
    * "foreign_questions": one of the latter kind when nothing in the scene fits, so that it is not about the scene.
    * "refused_questions": one that asks for the thing itself, its number or coordinates.
    * "unclear_questions": one that holds an unknown word, asks for several attributes or none, or contradicts itself.

    The last three tell nothing of the target.
    """
    words = words_of(question)
    asked = {_NOUNS[word] for word in words if word in _NOUNS}
    is_open = not _OPEN.isdisjoint(words)
    if any(word in _IDENTIFYING or word.isdigit() for word in words):
        return _REFUSED
    if not words or any(word not in _KNOWN for word in words):
        return _UNCLEAR
    features = [WORDS[word] for word in words if word in WORDS]
    if "how" in words and any(name == "size" for name, _ in features):  # "How large is it?"
        asked.add("size")
    if is_open and not asked:
        return _REFUSED
    if features and not is_open:
        return _closed(words, features, target, scene)
    if len(asked) == 1:
        (attribute,) = asked
        return Reply(_phrase(attribute, target.value(attribute)))
    return _UNCLEAR


def _closed(words: list[str], features: list[tuple[str, str]], target: Thing, scene: Scene) -> Reply:
    """The reply to a question that names features."""
    if "or" in words:
        name = features[0][0]
        if len(set(features)) < 2 or any(other != name for other, _ in features):
            return _UNCLEAR
        values = {value for _, value in features}
        if not any(getattr(thing, name) in values for thing in scene.things):
            return _FOREIGN
        value = getattr(target, name)
        return Reply(_phrase(name, value) if value in values else "Neither.")
    known: Mapping[str, str] | None = features_of(words)
    if known is None:
        return _UNCLEAR
    if not any(thing.fits(known) for thing in scene.things):
        return _FOREIGN
    return Reply("Yes." if target.fits(known) else "No.")


def _phrase(name: str, value: str) -> str:
    """One sentence that says a value: "It is red.", "It is a circle.", "It is at the top left."."""
    article = {"shape": "a ", "place": "at the ", "row": "at the ", "column": "at the "}.get(name, "")
    return f"It is {article}{value}."
