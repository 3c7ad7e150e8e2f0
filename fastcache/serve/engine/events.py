"""What happens to a job, as values: what the worker tells and the HTTP side reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image as Pillow

Failure = Literal["cancelled", "late", "draining", "broken", "out_of_memory", "failed"]


@dataclass(frozen=True)
class Stepped:
    """An image took a step, of `of` in all."""

    image: int
    step: int
    of: int
    full: bool


@dataclass(frozen=True)
class Preview:
    """An image as a step foretells it, the `number`th asked for."""

    image: int
    number: int
    picture: Pillow.Image


@dataclass(frozen=True)
class Drawn:
    """A finished image."""

    image: int
    picture: Pillow.Image


@dataclass(frozen=True)
class Done:
    """The job's last event: `failure` is None if every image was drawn."""

    failure: Failure | None = None


Event = Stepped | Preview | Drawn | Done
