"""A random generator -> a scene (objects on a background) -> its caption and its image.

The bundled model is trained on these scenes. Everything is drawn from signed distances, so an image is an
exact, antialiased function of the scene; nothing here knows how a picture is read back (`reader.py` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 64

Array = npt.NDArray[np.floating]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 145, 30),
    "yellow": (245, 225, 50),
    "green": (40, 160, 70),
    "cyan": (60, 205, 220),
    "blue": (40, 80, 215),
    "purple": (140, 60, 180),
    "pink": (255, 140, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (160, 160, 160),
    "black": (15, 15, 15),
}
RADII: dict[str, float] = {"small": 7.5, "large": 12.0}
PLACES: dict[str, tuple[float, float]] = {  # centre (x, y) in pixels
    "left": (17.0, 32.0),
    "right": (47.0, 32.0),
    "top": (32.0, 17.0),
    "bottom": (32.0, 47.0),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

# Signed distance in pixels at (x, y) from the centre of a shape of the given radius; negative inside.
SHAPES: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.88 * r,
    "triangle": lambda x, y, r: np.maximum(y - 0.75 * r, (abs(x) * 1.75 - y - r) / 2.016),
    "cross": lambda x, y, r: np.minimum(np.maximum(abs(x) - r, abs(y) - r / 3), np.maximum(abs(y) - r, abs(x) - r / 3)),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r,
}


@dataclass(frozen=True)
class Object:
    """One drawn shape, by the names used in captions."""

    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two objects at opposite places, on a plain background."""

    objects: tuple[Object, ...]
    background: str

    @property
    def held_out(self) -> bool:
        """Whether training never sees this scene (one in sixteen, by a hash of its attributes)."""
        key = "|".join(sorted(str(o) for o in self.objects)) + self.background
        return hashlib.sha256(key.encode()).digest()[0] < 16

    def caption(self) -> str:
        """The full caption, for example "a large red circle at the left on a white background"."""
        return describe(self, sizes=True, places=True, background=True)

    def partial_caption(self, rng: np.random.Generator) -> str:
        """A caption that leaves out sizes, places and the background one time in ten each."""
        sizes, places, background = (rng.random(3) >= 0.1).tolist()
        return describe(self, sizes=sizes, places=places, background=background)


def describe(scene: Scene, *, sizes: bool, places: bool, background: bool) -> str:
    """The caption of a scene with or without each kind of attribute."""
    phrases: list[str] = []
    for o in scene.objects:
        words = [o.size] * sizes + [o.colour, o.shape]
        article = "an" if words[0][0] in "aeiou" else "a"
        phrases.append(" ".join([article, *words] + ["at the", o.place] * places))
    return " and ".join(phrases) + f" on a {scene.background} background" * background


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene; two objects three times in five."""

    def choose(names: Iterable[str]) -> str:
        return str(rng.choice(list(names)))

    place = choose(PLACES)
    places = [place, OPPOSITE[place]] if rng.random() < 0.6 else [place]
    objects = tuple(Object(choose(RADII), choose(COLOURS), choose(SHAPES), p) for p in places)
    return Scene(objects, choose(BACKGROUNDS))


def training_scenes(rng: np.random.Generator) -> Iterator[Scene]:
    """Endless random scenes without the held-out ones."""
    while True:
        if not (scene := draw_scene(rng)).held_out:
            yield scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """The first `count` distinct held-out scenes of a seed: what quality is measured on."""
    rng, found = np.random.default_rng(seed), dict[Scene, None]()
    while len(found) < count:
        if (scene := draw_scene(rng)).held_out:
            found[scene] = None
    return list(found)


def render(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The image of a scene, with a little jitter of place and size.

    Shapes: returns (64, 64, 3), RGB.
    """
    at = outlines(scene)
    for place in at:
        place[:2] += rng.uniform(-1.5, 1.5, 2)
        place[2] *= rng.uniform(0.95, 1.05)
    return render_at(scene, at).round().astype(np.uint8)


def outlines(scene: Scene) -> Array:
    """Where the objects of a scene stand without jitter, and how large they are.

    Shapes: returns (objects, 3), in pixels: the centre's x and y, and the radius.
    """
    return np.array([(*PLACES[o.place], RADII[o.size]) for o in scene.objects])


def render_at(scene: Scene, at: Array) -> Array:
    """The image of a scene whose objects stand at given places in given sizes.

    Shapes: `at` is (objects, 3) as `outlines` gives them. Returns (64, 64, 3), RGB from 0 to 255.
    """
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    x, y = np.meshgrid(axis, axis)
    image = np.broadcast_to(np.array(BACKGROUNDS[scene.background], np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for o, (centre_x, centre_y, radius) in zip(scene.objects, at, strict=True):
        distance = SHAPES[o.shape](x - np.float32(centre_x), y - np.float32(centre_y), float(radius))
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        image = image + coverage * (np.array(COLOURS[o.colour], np.float32) - image)
    return image
