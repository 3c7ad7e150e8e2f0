"""An image of the bundled model -> the scene that a viewer would see in it.

Plain image analysis (nearest palette colours, connected components, overlap with each shape's outline), with
nothing learned and nothing taken from the model, so that it can judge the model. `tests/demo/test_scenes.py`
holds it to 98% on true renders.
"""

from __future__ import annotations

from collections import Counter
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fastcache.demo.scenes import BACKGROUNDS, COLOURS, PLACES, Object, Scene

_GRID = 32  # a component is resampled to this many cells a side before its outline is compared
_FOREGROUND_DISTANCE = 70.0  # RGB distance from the background; the palette's closest pair is 92 apart
_SMALLEST_AREA = 30  # pixels; a small cross covers 100
_LARGE_EXTENT = 18.0  # pixels; outlines span 12.5 to 15.8 when small, 20.0 to 25.2 when large


def read_scene(image: npt.NDArray[np.uint8]) -> Scene:
    """The scene in an image; whatever is too small to be an object is passed over.

    Shapes: `image` is (height, width, 3), RGB, drawn at 64x64.
    """
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    foreground = np.linalg.norm(pixels - ground, axis=-1) > _FOREGROUND_DISTANCE
    labels, count = cast("tuple[npt.NDArray[np.int32], int]", ndimage.label(foreground, structure=np.ones((3, 3))))
    objects = [
        _read_object(pixels, labels == index)
        for index in range(1, count + 1)
        if (labels == index).sum() >= _SMALLEST_AREA
    ]
    return Scene(tuple(objects), _nearest(BACKGROUNDS, ground))


def matches(scene: Scene, wanted: Scene) -> bool:
    """Whether an image shows every attribute asked for, and no further object."""
    same_objects = Counter(scene.objects) == Counter(wanted.objects)
    return same_objects and scene.background == wanted.background


def _read_object(pixels: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> Object:
    rows, columns = np.where(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    extent = max(bottom - top, right - left)
    centre = ((left + right) / 2, (top + bottom) / 2)
    place = min(PLACES, key=lambda p: np.hypot(PLACES[p][0] - centre[0], PLACES[p][1] - centre[1]))
    inside = np.asarray(ndimage.binary_erosion(mask), np.bool_)
    colour = np.median(pixels[inside if inside.any() else mask], axis=0)
    outline = mask[top:bottom, left:right].astype(np.float32)
    scale = (_GRID / outline.shape[0], _GRID / outline.shape[1])
    cells = np.asarray(ndimage.zoom(outline, scale, order=1, mode="nearest", grid_mode=True))
    shape = min(_OUTLINES, key=lambda name: float(np.square(cells - _OUTLINES[name]).mean()))
    return Object("large" if extent > _LARGE_EXTENT else "small", _nearest(COLOURS, colour), shape, place)


def _nearest(palette: dict[str, tuple[int, int, int]], colour: npt.NDArray[np.float32]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(np.array(palette[name], np.float32) - colour)))


def _outlines() -> dict[str, npt.NDArray[np.float32]]:
    """Each shape filling the unit square, as a viewer knows it."""
    axis = (np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID * 2 - 1
    x, y = np.meshgrid(axis, axis)
    radius = np.hypot(x, y)
    masks = {
        "circle": radius < 1,
        "square": np.ones_like(x, dtype=bool),
        "triangle": abs(x) < (y + 1) / 2,
        "cross": (abs(x) < 1 / 3) | (abs(y) < 1 / 3),
        "ring": (radius < 1) & (radius > 0.48),
    }
    return {name: mask.astype(np.float32) for name, mask in masks.items()}


_OUTLINES = _outlines()
