"""A value from outside -> the same value, or the one line that says what was expected. Knows nothing of plans."""

from __future__ import annotations

import reprlib
from typing import TypeGuard


def expected(what: str, got: object, remedy: str) -> ValueError:
    shown = " ".join(reprlib.repr(got).split())  # a tensor shows itself in several lines
    return ValueError(f"expected {what}, got {shown}; {remedy}")


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)  # True would pass for 1


def is_number(value: object) -> TypeGuard[float]:
    return is_int(value) or isinstance(value, float)


def at_least(least: int, **named: int) -> int:
    """The one argument given by its name.

    Raises: `ValueError` for no integer, or a smaller one.
    """
    ((name, value),) = named.items()
    if not is_int(value) or value < least:
        raise expected(f"{name} to be an integer >= {least}", value, f"give another {name}")
    return value
