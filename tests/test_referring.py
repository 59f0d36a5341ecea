"""The referring world and its user: what is generated, what is answered, and what asking is worth."""

from __future__ import annotations

import math
import random
import re
from statistics import fmean

import numpy as np
import pytest

from stepcredit.data.referring import OPEN_QUESTIONS, Referral, ReferringDataset, build_scenes
from stepcredit.data.scenes import ATTRIBUTES, SIDE, WORDS, Scene, Thing, iou, rasterize, region
from stepcredit.environments import ClarifyEnvironment
from stepcredit.environments.user import reply
from stepcredit.protocol import get_protocol
from stepcredit.rollout import Inquiry, Question, SpanKind

CLARIFY = get_protocol("clarify")
TARGET = Thing("red", "circle", "large", 16, 16)
SCENE = Scene((TARGET, Thing("blue", "circle", "large", 48, 16), Thing("red", "square", "small", 80, 80)))


@pytest.fixture(scope="module")
def world():
    return build_scenes(0)


@pytest.fixture(scope="module")
def questions(world):
    return world.train + world.dev + world.test


def test_sizes_ids_and_splits(world, questions):
    assert [len(world.train), len(world.dev), len(world.test)] == [1200, 150, 300]
    assert len({q.id for q in questions}) == len(world.referrals) == len(questions)
    assert len({world.referrals[q.id].scene for q in questions}) == len(questions)
    assert not world.passages
    for split in (world.train, world.dev, world.test):
        assert fmean(q.kind == "two_questions" for q in split) == pytest.approx(0.4, abs=0.1)
        targets = [world.referrals[q.id] for q in split]
        assert {r.candidates.index(r.target) for r in targets} == {0, 1, 2, 3}
    again = build_scenes(0)
    assert again == world != build_scenes(1)


def test_candidates_agree_in_all_but_what_the_plan_asks_for(world, questions):
    for question in questions:
        referral = world.referrals[question.id]
        things = [referral.scene.things[i] for i in referral.candidates]
        differ = {a for a in ATTRIBUTES if len({thing.value(a) for thing in things}) > 1}
        assert differ == {a for a in ATTRIBUTES if OPEN_QUESTIONS[a] in question.plan}
        assert len(question.plan) == len(differ) == {"one_question": 1, "two_questions": 2}[question.kind]
        assert len(things) == 4 if len(differ) == 2 else len(things) in (2, 3, 4)
        assert len({tuple(thing.value(a) for a in differ) for thing in things}) == len(things)
        assert referral.target in referral.candidates


def test_an_expression_fits_the_candidates_and_nothing_else(world, questions):
    for question in questions:
        referral = world.referrals[question.id]
        words = dict(WORDS[word] for word in referral.expression.split() if word in WORDS)
        fitting = tuple(i for i, thing in enumerate(referral.scene.things) if thing.fits(words))
        assert fitting == referral.candidates
        assert question.text.endswith(f"Which region is {referral.expression}?")
        assert not any(character.isdigit() for character in question.text)


def test_every_thing_is_described_by_itself_and_half_visible(world, questions):
    for question in questions:
        scene = world.referrals[question.id].scene
        assert len({str(thing) for thing in scene.things}) == len(scene.things)
        for thing, mask in zip(scene.things, scene.masks(), strict=True):
            assert 2 * mask.sum() >= rasterize(thing).sum()


def test_an_observer_says_what_the_policy_is_told(world):
    seen = build_scenes(0, observe=lambda scene: f"<image of {len(scene.things)}>")
    assert seen.test[0].text.startswith("The scene shows: <image of ")
    assert seen.referrals == world.referrals


# What asking is worth


def play(world, question, asks, answer):
    """The IoU of a rollout that asks these questions and answers what `answer(replies)` says, and its inquiries."""
    environment = ClarifyEnvironment(world.referrals, CLARIFY, max_questions=4)
    searches, replies = [], []
    for text in asks:
        turn = CLARIFY.parse_turn(f"<ask>{text}</ask>")
        (response,) = environment.respond([turn], [searches], [0], [False], [question])
        assert response.kind is SpanKind.REPLY
        searches.append(response.search)
        replies.append(CLARIFY.shown(response.text))
    turn = CLARIFY.parse_turn(f"<answer>{answer(replies)}</answer>")
    (response,) = environment.respond([turn], [searches], [0], [False], [question])
    assert response.done
    return response.rewards["iou"], searches


def test_an_oracle_that_asks_finds_every_region(world, questions):
    """It knows the expression and the replies, not the target."""
    for question in questions:
        referral = world.referrals[question.id]
        thing = referral.scene.things[referral.candidates[0]]

        def answer(replies, thing=thing, referral=referral, plan=question.plan):
            known = {a: thing.value(a) for a in ATTRIBUTES if OPEN_QUESTIONS[a] not in plan}
            said = " ".join(re.sub(r"It is (a |at the )?|\.", "", text) for text in replies)
            return " ".join([*known.values(), said])

        found, inquiries = play(world, question, question.plan, answer)
        assert found == 1.0, question
        assert len(inquiries[-1].remaining) == 1
        assert sum(i.bits for i in inquiries) == pytest.approx(math.log2(len(referral.candidates)))


def test_no_guess_beats_chance(world, questions):
    """Whatever region is named without asking, its IoU averaged over who may be meant is at most 1 / candidates."""
    rng = random.Random(0)
    for question in questions[::10]:
        referral = world.referrals[question.id]
        masks = referral.scene.masks()[list(referral.candidates)]
        x, y = rng.randrange(SIDE), rng.randrange(SIDE)
        guesses = [masks[0], masks.any(0), masks[:2].any(0), np.ones_like(masks[0])]
        guesses.append(region(f"[{x}, {y}, {x + 40}, {y + 40}]", referral.scene))
        for guess in guesses:
            assert fmean(iou(guess, mask) for mask in masks) <= 1 / len(masks) + 1e-12


def test_guessers_get_chance_on_average(world, questions):
    rng = random.Random(0)
    one = []
    for question in questions:
        referral = world.referrals[question.id]
        guess = str(referral.scene.things[rng.choice(referral.candidates)])
        one.append((play(world, question, (), lambda _, guess=guess: guess)[0], 1 / len(referral.candidates)))
    got, chance = map(fmean, zip(*one, strict=True))
    assert 0.25 < chance < 0.5
    assert got == pytest.approx(chance, abs=3 * 0.5 / math.sqrt(len(one)))


def test_asking_for_anything_else_tells_nothing(world, questions):
    for question in questions[::5]:
        others = [asks for asks in OPEN_QUESTIONS.values() if asks not in question.plan]
        _, inquiries = play(world, question, others, lambda _: "x")
        assert [i.bits for i in inquiries] == [0.0] * len(others)


# The user


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("What colour is it?", "It is red."),
        ("what color", "It is red."),
        ("Colour?", "It is red."),
        ("Which shape?", "It is a circle."),
        ("What size is the red one?", "It is large."),
        ("How big is it?", "It is large."),
        ("Where is the large circle?", "It is at the top left."),
        ("Is it red?", "Yes."),
        ("Is it a square?", "No."),
        ("is it on the left", "Yes."),
        ("Is it at the bottom?", "No."),
        ("Is it the large red circle, top left?", "Yes."),
        ("Is it a red square?", "No."),
        ("Is it red or blue?", "It is red."),
        ("Is it at the top or the bottom?", "It is at the top."),
        ("Square or triangle?", "Neither."),
    ],
)
def test_what_is_asked_is_answered(question, said):
    got = reply(question, TARGET, SCENE)
    assert (got.text, got.fault) == (said, "")


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        ("Which one is it?", "refused_questions"),
        ("What are its coordinates?", "refused_questions"),
        ("What is its number?", "refused_questions"),
        ("Is it number 2?", "refused_questions"),
        ("Is it red 1?", "refused_questions"),
        ("Tell me the box.", "refused_questions"),
        ("Is it green?", "foreign_questions"),
        ("Is it a large square?", "foreign_questions"),
        ("Is it green or yellow?", "foreign_questions"),
        ("What colour is the sky?", "unclear_questions"),
        ("Is it not red?", "unclear_questions"),
        ("Is it red blue?", "unclear_questions"),
        ("Is it red or a circle?", "unclear_questions"),
        ("Is it red or red?", "unclear_questions"),
        ("What colour and shape is it?", "unclear_questions"),
        ("What colour or size is it?", "unclear_questions"),
        ("Is it?", "unclear_questions"),
        ("?", "unclear_questions"),
        ("", "unclear_questions"),
        ("<reply> red", "unclear_questions"),
    ],
)
def test_what_is_not_answered_is_named_and_tells_nothing(question, fault):
    replies = {reply(question, thing, SCENE) for thing in SCENE.things}
    assert len(replies) == 1
    assert replies.pop().fault == fault


def test_replies_depend_on_what_the_target_looks_like_and_hold_no_number(world, questions):
    """Where it is to the pixel, and which it is in the scene, makes no difference."""
    rng = random.Random(0)
    vocabulary = [*WORDS, "colour", "what", "where", "is", "it", "or", "number", "7", "size", "how", "the"]
    for question in questions[::10]:
        scene = world.referrals[question.id].scene
        for _ in range(20):
            text = " ".join(rng.choices(vocabulary, k=rng.randint(1, 5)))
            thing = rng.choice(scene.things)
            said = reply(text, thing, scene)
            twin = Thing(thing.colour, thing.shape, thing.size, thing.x // 32 * 32 + 16, thing.y // 32 * 32 + 16)
            assert said == reply(text, twin, Scene(scene.things[::-1]))
            assert not re.search(r"\d", said.text)


def test_bits_by_hand():
    """Four candidates, two colours by two sizes, and of one of the colours a third."""
    things = [
        Thing(colour, "circle", size, 16 + 32 * i, 16 + 32 * j)
        for i, colour in enumerate(("red", "blue"))
        for j, size in enumerate(("small", "large"))
    ]
    things.append(Thing("green", "circle", "large", 80, 80))
    question = Question("q", "the circle?", ("small red circle, top left",))
    referral = Referral(Scene(tuple(things)), "the circle", (0, 1, 2, 3, 4), 0)
    world = ReferringDataset(name="x", passages=[], train=[question], dev=[], test=[], referrals={"q": referral})

    def bits(*asks):
        return play(world, question, asks, lambda _: "x")[1]

    first = bits("Is it green?", "Is it blue?", "What size is it?", "What size is it?")
    assert [(i.before, i.remaining) for i in first] == [(5, (0, 1, 2, 3)), (4, (0, 1)), (2, (0,)), (1, (0,))]
    assert [i.bits for i in first] == [math.log2(5 / 4), 1.0, 1.0, 0.0]
    assert bits("What colour is it?")[0].bits == math.log2(5 / 2)
    assert bits("Is it red?")[0].bits == math.log2(5 / 2)
    assert bits("Is it small or large?")[0] == Inquiry(0, "Is it small or large?", (), before=5, remaining=(0, 2))
    assert bits("Which one?")[0].bits == 0.0
