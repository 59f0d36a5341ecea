"""Scenes as PNG files, for people to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stepcredit.data.scenes import SIDE, Mask, Scene

_RGB = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 95, 168),
    "yellow": (240, 200, 30),
    "purple": (148, 83, 189),
    "orange": (255, 127, 14),
}
_BACKGROUND = (245, 245, 245)
_OUTLINE = (0, 0, 0)


def draw_scene(scene: Scene, path: Path, *, outlined: Mask | None = None, scale: int = 5) -> None:
    """Write a scene as a PNG of `scale` image pixels a pixel.

    Args:
        scene: what to draw; colours come from its masks, so that the image shows what is scored.
        path: where the PNG goes.
        outlined: bool [SIDE, SIDE], a region whose border is drawn in black, such as an answer's; None for none.
        scale: at least 1.

    Raises ModuleNotFoundError when matplotlib is not installed.
    """
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    try:
        from matplotlib.image import imsave
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "scenes are drawn with matplotlib: pip install 'stepcredit[quickstart]'", name="matplotlib"
        ) from error
    image = np.full((SIDE, SIDE, 3), _BACKGROUND, np.uint8)
    for thing, mask in zip(scene.things, scene.masks(), strict=True):
        image[mask] = _RGB[thing.colour]
    image = image.repeat(scale, 0).repeat(scale, 1)
    if outlined is not None:
        large = np.pad(outlined.repeat(scale, 0).repeat(scale, 1), 1)
        inner = large[:-2, 1:-1] & large[2:, 1:-1] & large[1:-1, :-2] & large[1:-1, 2:]
        image[large[1:-1, 1:-1] & ~inner] = _OUTLINE
    imsave(path, image)
