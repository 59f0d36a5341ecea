"""A referring world: scenes in which an expression fits several things, and one of them is meant.

Everything is generated from a seed, nothing is downloaded. Of the things an expression fits (the *candidates*) one,
drawn uniformly, is the target, which the policy is not told. The candidates agree in all attributes but one or two, of
which the expression says nothing: to know the target one must ask for them, and asking for another attribute tells
nothing. Which attributes these are is to be seen in the scene.

* Questions of kind "one_question": two to four candidates, no two of which have the same value of one attribute.
* Of kind "two_questions": four candidates, two values of one attribute by two of another.

One to three things more do not fit the expression. No two things of a scene are described alike, and of each at least
half of its pixels is visible.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from stepcredit.data import Dataset
from stepcredit.data.scenes import (
    ATTRIBUTES,
    COLOURS,
    COLUMNS,
    RADII,
    ROWS,
    SHAPES,
    SIDE,
    Attribute,
    Observe,
    Scene,
    Thing,
    describe,
    rasterize,
)
from stepcredit.rollout import Question

#: What asks for each attribute.
OPEN_QUESTIONS: dict[Attribute, str] = {
    "colour": "What colour is it?",
    "shape": "What shape is it?",
    "size": "What size is it?",
    "place": "Where is it?",
}
_SIZES = {"train": 1200, "dev": 150, "test": 300}
_TWO_QUESTIONS = 0.4  # share of the questions
_VALUES: dict[Attribute, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": tuple(RADII),
    "place": tuple(f"{row} {column}" for row, column in product(ROWS, COLUMNS)),
}
_CANDIDATES = (2, 3, 4)
_OTHERS = (1, 2, 3)
_VISIBLE = 0.5  # of a thing's pixels, at least
_TRIES = 60  # to find room for a thing, before the scene is given up
_Look = dict[Attribute, str]


@dataclass(frozen=True, slots=True)
class Referral:
    """An expression in a scene.

    Attributes:
        scene: what there is.
        expression: what is said of the target, "the small circle".
        candidates: indices of the things of the scene that it fits, ascending; at least two.
        target: index of the one that is meant; one of them.
    """

    scene: Scene
    expression: str
    candidates: tuple[int, ...]
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferringDataset(Dataset):
    """Questions about scenes, without passages.

    Attributes:
        referrals: by the id of the question.
    """

    referrals: dict[str, Referral] = field(default_factory=dict)


def build_scenes(seed: int = 0, *, observe: Observe = describe) -> ReferringDataset:
    """The referring world of a seed: 1,200 training, 150 development and 300 test questions, no scene twice.

    Questions have ids such as "scenes:train:17"; their answer describes the target alone ("small red circle, top
    left"), and their `plan` asks for what tells the candidates apart.

    Args:
        seed: of everything.
        observe: what the policy is told of a scene. Where it sees images, an observer would give their placeholder, and
            the engine their features; neither is here.
    """
    questions: dict[str, list[Question]] = {}
    referrals: dict[str, Referral] = {}
    seen: set[Scene] = set()
    for split, size in _SIZES.items():
        rng = random.Random(f"{seed}:scenes:{split}")
        questions[split] = []
        while len(questions[split]) < size:
            varied = rng.sample(ATTRIBUTES, 2 if rng.random() < _TWO_QUESTIONS else 1)
            referral = _refer(varied, rng)
            if referral is None or referral.scene in seen:
                continue
            seen.add(referral.scene)
            identity = f"scenes:{split}:{len(questions[split])}"
            referrals[identity] = referral
            questions[split].append(
                Question(
                    id=identity,
                    text=f"The scene shows: {observe(referral.scene)}. Which region is {referral.expression}?",
                    answers=(str(referral.scene.things[referral.target]),),
                    plan=tuple(OPEN_QUESTIONS[attribute] for attribute in varied),
                    kind="one_question" if len(varied) == 1 else "two_questions",
                )
            )
    return ReferringDataset(
        name="scenes",
        passages=[],
        train=questions["train"],
        dev=questions["dev"],
        test=questions["test"],
        referrals=referrals,
    )


def _refer(varied: list[Attribute], rng: random.Random) -> Referral | None:
    """A scene whose candidates differ in these attributes alone; None when its things found no room."""
    shared = [attribute for attribute in ATTRIBUTES if attribute not in varied]
    named = rng.sample(shared, rng.randint(1, len(shared)))
    common: _Look = {attribute: rng.choice(_VALUES[attribute]) for attribute in shared}
    looks = [common | look for look in _variants(varied, rng)]
    count = len(looks)
    others = rng.choice(_OTHERS)
    while len(looks) < count + others:
        look: _Look = {attribute: rng.choice(_VALUES[attribute]) for attribute in ATTRIBUTES}
        if look not in looks and any(look[attribute] != common[attribute] for attribute in named):
            looks.append(look)
    order = rng.sample(range(len(looks)), len(looks))  # in which they are drawn and described
    scene = _lay_out([looks[i] for i in order], rng)
    if scene is None:
        return None
    candidates = tuple(at for at, i in enumerate(order) if i < count)
    return Referral(scene, _expression(common, named), candidates, rng.choice(candidates))


def _variants(varied: list[Attribute], rng: random.Random) -> Iterator[_Look]:
    """The candidates' values of the attributes in which they differ."""
    if len(varied) == 1:
        (attribute,) = varied
        values = _VALUES[attribute]
        for value in rng.sample(values, min(rng.choice(_CANDIDATES), len(values))):
            yield {attribute: value}
    else:
        first, second = varied
        pairs = [rng.sample(_VALUES[attribute], 2) for attribute in varied]
        for one, other in product(*pairs):
            yield {first: one, second: other}


def _expression(common: _Look, named: list[Attribute]) -> str:
    """What the candidates have in common, as far as it is named: "the small one at the top left"."""
    words = [common[attribute] for attribute in ("size", "colour") if attribute in named]
    words.append(common["shape"] if "shape" in named else "one")
    place = f" at the {common['place']}" if "place" in named else ""
    return f"the {' '.join(words)}{place}"


def _lay_out(looks: list[_Look], rng: random.Random) -> Scene | None:
    """Things that look so, each somewhere in its place, of which enough is visible; None when there was no room."""
    things: list[Thing] = []
    visible = np.zeros((0, SIDE, SIDE), np.bool_)
    sizes = np.zeros(0)
    for look in looks:
        for _ in range(_TRIES):
            thing = Thing(look["colour"], look["shape"], look["size"], *_centre(look, rng))
            mask = rasterize(thing)
            left = visible & ~mask
            if (left.sum((1, 2)) >= _VISIBLE * sizes).all():
                things.append(thing)
                visible = np.concatenate([left, mask[None]])
                sizes = np.append(sizes, mask.sum())
                break
        else:
            return None
    return Scene(tuple(things))


def _centre(look: _Look, rng: random.Random) -> tuple[int, int]:
    """Somewhere in its place, and all of it inside the raster."""
    radius, third = RADII[look["size"]], SIDE // 3
    row, column = look["place"].split()
    x, y = (
        rng.randint(max(at * third, radius), min((at + 1) * third - 1, SIDE - radius))
        for at in (COLUMNS.index(column), ROWS.index(row))
    )
    return x, y
