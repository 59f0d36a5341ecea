"""Scenes of coloured shapes on a raster: what they look like, in words and in pixels, and regions that a text names.

The raster is `SIDE` x `SIDE` pixels, rows from the top, columns from the left. A pixel belongs to a shape if its centre
lies in the closed shape: all tests are of integers in half pixels, so that a mask is exact and the same everywhere.
Things are drawn in order, and each hides what lies under it: regions are what is visible, and no two share a pixel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Mask: TypeAlias = NDArray[np.bool_]
Attribute = Literal["colour", "shape", "size", "place"]

SIDE = 96
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "diamond")
RADII = {"small": 4, "large": 7}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
ATTRIBUTES: tuple[Attribute, ...] = ("colour", "shape", "size", "place")

#: Every word that says something of a thing: the feature it is about, and its value there.
WORDS: dict[str, tuple[str, str]] = {
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("shape", word) for word in SHAPES},
    **{word: ("size", word) for word in RADII},
    **{word: ("row", word) for word in ROWS},
    **{word: ("column", word) for word in COLUMNS},
    "center": ("column", "centre"),
    "big": ("size", "large"),
}
#: Words that may stand in the name of a region and say nothing.
FILLERS = frozenset(("a", "an", "at", "in", "is", "it", "object", "of", "on", "one", "region", "shape", "the", "thing"))
_BOX = re.compile(r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]")
_TOKEN = re.compile(r"[a-z]+|[^a-z\s.,;:!?-]+")


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in a scene: one of `COLOURS`, `SHAPES` and `RADII`, and the pixel corner (x, y) at its centre, which is
    at least its radius away from the raster's edge."""

    colour: str
    shape: str
    size: str
    x: int
    y: int

    def __post_init__(self) -> None:
        for name, known in (("colour", COLOURS), ("shape", SHAPES), ("size", tuple(RADII))):
            if getattr(self, name) not in known:
                raise ValueError(f"thing.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        radius = RADII[self.size]
        if not (radius <= self.x <= SIDE - radius and radius <= self.y <= SIDE - radius):
            raise ValueError(f"thing must lie inside the raster of side {SIDE}, got centre ({self.x}, {self.y})")

    @property
    def row(self) -> str:
        """The third of the raster, from the top, that its centre is in."""
        return ROWS[self.y * 3 // SIDE]

    @property
    def column(self) -> str:
        """The third of the raster, from the left, that its centre is in."""
        return COLUMNS[self.x * 3 // SIDE]

    @property
    def place(self) -> str:
        """Row and column, "top left"."""
        return f"{self.row} {self.column}"

    def value(self, attribute: Attribute) -> str:
        """Its value of one of `ATTRIBUTES`."""
        return str(getattr(self, attribute))

    def fits(self, features: Mapping[str, str]) -> bool:
        """Whether it has these values of colour, shape, size, row and column."""
        return all(getattr(self, name) == value for name, value in features.items())

    def __str__(self) -> str:
        """All there is to say of it in words: "small red circle, top left"."""
        return f"{self.size} {self.colour} {self.shape}, {self.place}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in the order in which they are drawn: each hides what lies under it."""

    things: tuple[Thing, ...]

    def masks(self) -> Mask:
        """The visible region of each thing, bool [things, SIDE, SIDE]; no two share a pixel."""
        masks = np.zeros((len(self.things), SIDE, SIDE), np.bool_)
        for i, thing in enumerate(self.things):
            own = rasterize(thing)
            masks[:i] &= ~own
            masks[i] = own
        return masks


#: What the policy is told of a scene. A policy that sees would be given an image here: this is where it plugs in.
Observe = Callable[[Scene], str]


def describe(scene: Scene) -> str:
    """A scene in words, one phrase for each thing, in the order in which they are drawn."""
    return "; ".join(map(str, scene.things))


@cache
def stencil(shape: str, radius: int) -> Mask:
    """A shape in the square of 2 * radius pixels around it, bool [2 radius, 2 radius].

    In half pixels from the centre, |dx| and |dy| of a pixel's centre are odd numbers: a circle has dx² + dy² <= (2r)²,
    a diamond |dx| + |dy| <= 2r, a square all. A triangle stands on its base of 2r, with its apex at the top centre:
    half its width at a depth is half that depth.
    """
    steps = np.arange(2 * radius) * 2 + 1 - 2 * radius
    dx, dy = steps[None, :], steps[:, None]
    if shape == "circle":
        return np.asarray(dx * dx + dy * dy <= 4 * radius * radius)
    if shape == "diamond":
        return np.asarray(abs(dx) + abs(dy) <= 2 * radius)
    if shape == "triangle":
        return np.asarray(2 * abs(dx) <= dy + 2 * radius)
    if shape == "square":
        return np.ones((2 * radius, 2 * radius), np.bool_)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")


def rasterize(thing: Thing) -> Mask:
    """All pixels of a thing, hidden or not, bool [SIDE, SIDE]."""
    mask = np.zeros((SIDE, SIDE), np.bool_)
    radius = RADII[thing.size]
    mask[thing.y - radius : thing.y + radius, thing.x - radius : thing.x + radius] = stencil(thing.shape, radius)
    return mask


def iou(a: Mask, b: Mask) -> float:
    """Pixels in both over pixels in either, in [0, 1]; 0 of two empty masks."""
    if a.shape != b.shape:
        raise ValueError(f"masks must have one shape, got {a.shape} and {b.shape}")
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 0.0


def features_of(words: list[str]) -> dict[str, str] | None:
    """What words say of a thing, by feature; None when two of them contradict each other. Others are left out."""
    features: dict[str, str] = {}
    for word in words:
        if word in WORDS:
            name, value = WORDS[word]
            if features.setdefault(name, value) != value:
                return None
    return features


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; what is no word of letters is a word too."""
    return _TOKEN.findall(text.lower())


def region(text: str, scene: Scene) -> Mask | None:
    """The region of a scene that a text names, bool [SIDE, SIDE].

    A text is made of words of `WORDS`, which everything it names fits ("large red circle, top left"), `FILLERS`, and
    at most one box `[x1, y1, x2, y2]`: the pixels of columns x1 to x2 - 1 and rows y1 to y2 - 1. Words name the visible
    regions of all things that they fit, a box all its pixels, both the former inside the latter.

    Returns:
        The mask, empty where nothing fits; None for a text that is not of this form: nothing named, another word, words
        that contradict each other, a second box or one without pixels.
    """
    boxes = _BOX.findall(text)
    words = words_of(_BOX.sub(" ", text))
    features = features_of(words)
    if features is None or len(boxes) > 1 or not (features or boxes):
        return None
    if any(word not in WORDS and word not in FILLERS for word in words):
        return None
    mask: Mask = np.ones((SIDE, SIDE), np.bool_)
    if features:
        fitting = [thing.fits(features) for thing in scene.things]
        mask = np.asarray(scene.masks()[fitting].any(0))
    for x1, y1, x2, y2 in (map(int, box) for box in boxes):
        if x1 >= min(x2, SIDE) or y1 >= min(y2, SIDE):
            return None
        inside = np.zeros_like(mask)
        inside[y1:y2, x1:x2] = True
        mask = mask & inside
    return mask
