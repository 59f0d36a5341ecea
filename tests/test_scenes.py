"""Scenes: masks against drawings by hand, IoU, occlusion, and the regions that a text names."""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
import pytest

from stepcredit.data import scenes
from stepcredit.data.scene_image import draw_scene
from stepcredit.data.scenes import COLUMNS, ROWS, SIDE, Scene, Thing, describe, iou, rasterize, region, stencil

DRAWINGS = {
    ("square", 2): "#### #### #### ####",
    ("circle", 2): ".##. #### #### .##.",
    ("diamond", 2): ".##. #### #### .##.",
    ("triangle", 2): ".... .##. .##. ####",
    ("circle", 4): "..####.. .######. ######## ######## ######## ######## .######. ..####..",
    ("diamond", 4): "...##... ..####.. .######. ######## ######## .######. ..####.. ...##...",
    ("triangle", 4): "........ ...##... ...##... ..####.. ..####.. .######. .######. ########",
}
# The blue square hides the right half of the red one, and most of the circle under both.
RED, BLUE = Thing("red", "square", "small", 20, 20), Thing("blue", "square", "small", 24, 20)
CIRCLE = Thing("red", "circle", "small", 22, 20)
SCENE = Scene((CIRCLE, RED, BLUE, Thing("red", "circle", "large", 80, 80)))


@pytest.mark.parametrize(("shape", "radius"), DRAWINGS)
def test_stencils_against_drawings(shape, radius):
    rows = ["".join(".#"[int(pixel)] for pixel in row) for row in stencil(shape, radius)]
    assert rows == DRAWINGS[shape, radius].split()


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("size", scenes.RADII)
def test_a_mask_holds_the_pixels_whose_centre_is_in_the_shape(shape, size):
    """In exact arithmetic of halves, which floats hold exactly."""
    thing = Thing("red", shape, size, 41, 57)
    r = scenes.RADII[size]
    expected = np.zeros((SIDE, SIDE), bool)
    for row, column in product(range(SIDE), range(SIDE)):
        dx, dy = abs(column + 0.5 - thing.x), row + 0.5 - thing.y
        expected[row, column] = {
            "circle": dx * dx + dy * dy <= r * r,
            "square": dx <= r and abs(dy) <= r,
            "diamond": dx + abs(dy) <= r,
            "triangle": abs(dy) <= r and dx <= (dy + r) / 2,
        }[shape]
    np.testing.assert_array_equal(rasterize(thing), expected)


def test_later_things_hide_earlier_ones():
    circle, red, blue, far = SCENE.masks()
    assert blue.sum() == 64
    assert red.sum() == 32
    assert red[16:24, 16:20].all()
    assert not circle.any()  # 52 pixels under the two squares
    assert far.sum() == rasterize(SCENE.things[3]).sum()
    assert SCENE.masks().sum(0).max() == 1  # no two share a pixel
    assert Scene(SCENE.things[:1]).masks()[0].sum() == 52


def test_iou_by_hand():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2, :2], b[1:3, :2] = True, True
    assert iou(a, b) == 2 / 6
    assert iou(a, a) == 1.0
    assert iou(a, ~a) == 0.0
    assert iou(a & ~a, b & ~b) == 0.0
    with pytest.raises(ValueError, match=r"one shape, got \(4, 4\) and \(2, 4\)"):
        iou(a, b[:2])


def test_places_are_thirds():
    assert {Thing("red", "circle", "small", x, 40).column for x in (4, 31)} == {"left"}
    assert {Thing("red", "circle", "small", x, 40).column for x in (32, 63)} == {"centre"}
    assert {Thing("red", "circle", "small", 40, y).row for y in (64, 92)} == {"bottom"}
    assert describe(SCENE).endswith("; large red circle, bottom right")
    centres = [SIDE * (2 * i + 1) // 6 for i in range(3)]
    places = [Thing("red", "circle", "small", x, y).place for y in centres for x in centres]
    assert places == [f"{row} {column}" for row in ROWS for column in COLUMNS]


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("blue", {2}),
        ("The small red square, top left.", {1}),
        ("red", {1, 3}),
        ("the red one", {1, 3}),
        ("circle", {3}),  # of the small one nothing is visible
        ("large circle", {3}),
        ("big circle at the bottom", {3}),
        ("LEFT", {1, 2}),
        ("green", set()),
        ("large square", set()),
    ],
)
def test_words_name_the_visible_things_that_they_fit(text, things):
    masks = SCENE.masks()
    expected = masks[sorted(things)].any(0) if things else np.zeros((SIDE, SIDE), bool)
    np.testing.assert_array_equal(region(text, SCENE), expected)


def test_boxes():
    found = region("[16, 16, 24, 24]", SCENE)
    assert found.sum() == 64
    assert found[16:24, 16:24].all()
    assert region("red square [18,0,96,17]", SCENE).sum() == 2  # columns 18 and 19 of its first row
    assert region("[0, 0, 9999, 9999]", SCENE).sum() == SIDE * SIDE
    assert region("[ 0 , 0 , 1 , 1 ]", SCENE).sum() == 1
    assert iou(region("[16, 16, 20, 24]", SCENE), SCENE.masks()[1]) == 1.0


@pytest.mark.parametrize(
    "text",
    ["", "the one", "red blue", "top bottom", "not red", "thing 3", "red [1, 2, 3]", "[5, 0, 5, 9]", "[0, 7, 9, 3]",
     "[0,0,1,1] [2,2,3,3]", "[96, 0, 97, 9]", "[0, 0, 1, 11111]", "red <b>", "rot", "r" * 10**5, "[" * 10**5],
)  # fmt: skip
def test_a_text_of_another_form_names_nothing(text):
    assert region(text, SCENE) is None


def test_bad_things_are_named():
    with pytest.raises(ValueError, match=r"thing\.colour must be one of red, .*, got 'pink'"):
        Thing("pink", "circle", "small", 20, 20)
    with pytest.raises(ValueError, match=r"inside the raster of side 96, got centre \(6, 20\)"):
        Thing("red", "circle", "large", 6, 20)
    with pytest.raises(ValueError, match=r"shape must be one of circle, .*, got 'star'"):
        stencil("star", 4)


def test_an_image_shows_the_masks(tmp_path, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    draw_scene(SCENE, tmp_path / "scene.png", outlined=SCENE.masks()[1], scale=3)
    pixels = (image.imread(tmp_path / "scene.png")[..., :3] * 255).round().astype(int)
    assert pixels.shape == (3 * SIDE, 3 * SIDE, 3)
    assert tuple(pixels[1, 1]) == (245, 245, 245)
    assert tuple(pixels[3 * 80, 3 * 80]) == tuple(pixels[3 * 20, 3 * 17]) == (214, 39, 40)
    assert tuple(pixels[3 * 20, 3 * 21]) == (31, 95, 168)
    outline = (pixels == 0).all(-1)
    assert outline.sum() == 2 * 12 + 2 * 24 - 4  # the border of 4 x 8 pixels at three image pixels each
    assert outline[3 * 16, 3 * 16]
    with pytest.raises(ValueError, match="scale must be at least 1, got 0"):
        draw_scene(SCENE, tmp_path / "scene.png", scale=0)
    monkeypatch.setitem(sys.modules, "matplotlib.image", None)
    with pytest.raises(ModuleNotFoundError, match="drawn with matplotlib"):
        draw_scene(SCENE, tmp_path / "scene.png")
