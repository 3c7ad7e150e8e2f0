"""One argument's value -> the same in the form that the rest counts on, or the line that says what it should be.

Each check takes the argument's name and its value, and raises `ValueError`. Knows no argument by name, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcache.expect import encodable, expected, number, one_of, several, whole
from fastcache.loop.plan import CachePlan
from fastcache.sampler.scheduler import Scheduler

Check: TypeAlias = Callable[[str, Any], Any]


def integers(least: int, most: int | None = None) -> Check:
    return lambda name, value: whole(name, value, least, most)


def numbers(least: float = -math.inf, most: float = math.inf) -> Check:
    return lambda name, value: number(name, value, least, most)


def list_of(check: Check) -> Check:
    return lambda name, value: several(name, value, check)


def one_or_several(check: Check) -> Check:
    return lambda name, value: several(name, value, check) if isinstance(value, list | tuple) else check(name, value)


def choice(*known: str) -> Check:
    return lambda name, value: one_of(name, value, known)


def texts(name: str, value: Any) -> str | tuple[str, ...]:
    """A string, or a list of some."""
    if not isinstance(value, str | list | tuple) or value in ([], ()):
        raise expected(f"{name} to be a string or a list of strings", value, f"give another {name}")
    return one_or_several(encodable)(name, value)


def pair(name: str, value: Any) -> tuple[int, ...]:
    """Rows and columns."""
    if not isinstance(value, list | tuple) or len(cast("list[Any]", value)) != 2:
        raise expected(f"{name} to be two numbers, as (height, width)", value, f"give another {name}")
    return several(name, value, integers(0))


def fraction(name: str, value: Any) -> float:
    """A number between 0 and 1, neither of which it is."""
    found = number(name, value, 0, 1)
    if found in (0, 1):
        raise expected(f"{name} between 0 and 1", value, "leave it out for the whole")
    return found


def tensors(*dimensions: int) -> Check:
    """A tensor of finite floats in as many dimensions."""

    def check(name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.ndim not in dimensions or not value.is_floating_point():
            counts = " or ".join(map(str, dimensions))
            raise expected(f"{name} to be a tensor of floats in {counts} dimensions", value, f"give another {name}")
        return finite(name, value)

    return check


def finite(name: str, value: Tensor) -> Tensor:
    """A tensor that has values, and no nan or inf among them."""
    if value.is_meta or not value.isfinite().all():
        raise expected(f"{name} to be finite", value, "look for nan and inf in what it was made from")
    return value


def pictures(name: str, value: Any) -> Any:
    """A picture, or a list of some, or of such lists; whether it can be read shows when it is."""
    if isinstance(value, list | tuple):
        return list(several(name, value, pictures))
    if not isinstance(value, Image.Image | np.ndarray | Tensor):
        raise expected(f"{name} as PIL images, arrays or tensors in [0, 1]", value, f"give another {name}")
    return cast(Any, value)


def sampler(name: str, value: Any) -> str | Scheduler:
    is_scheduler = all(hasattr(value, part) for part in ("config", "set_timesteps", "step"))
    if not isinstance(value, str) and (isinstance(value, type) or not is_scheduler):
        raise expected(f"{name} to be a name, or a scheduler of diffusers", value, f"give another {name}")
    return value


def plan(name: str, value: Any) -> CachePlan:
    if not isinstance(value, CachePlan):
        raise expected(f"{name} to be a CachePlan", value, "make one: CachePlan.uniform(...), .from_json(text), ...")
    return value


def generator(name: str, value: Any) -> torch.Generator:
    if not isinstance(value, torch.Generator):
        raise expected(f"{name} to be a torch.Generator", value, "give one, or one for each image, or a seed")
    return value


def callback(name: str, value: Any) -> Any:
    if not callable(value):
        raise expected(f"{name} to be a function of pipe, step, timestep and a dict", value, f"give another {name}")
    return value
