"""A value from outside -> the same value, or the one line that says what was expected. Knows nothing of plans."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")


def expected(what: str, got: object, remedy: str) -> ValueError:
    return ValueError(f"expected {what}, got {shown(got)}; {remedy}")


def shown(value: object) -> str:
    """A value in a few words on one line; of a tensor or an array its shape."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{type(value).__name__} of shape {list(cast('tuple[Any, ...]', shape))}"
    return " ".join(reprlib.repr(value).split())


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


def whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer, also numpy's. Raises: `ValueError` for another kind of value, or one out of range."""
    if not isinstance(value, bool) and isinstance(value, Integral):
        found = int(value)
        if least <= found and (most is None or found <= most):
            return found
    span = f"of {least} or more" if most is None else f"from {least} to {most}"
    raise expected(f"{name} to be a whole number {span}", value, f"give another {name}")


def number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number, also numpy's. Raises: `ValueError` for another kind of value, or one out of range."""
    if not isinstance(value, bool) and isinstance(value, Real):
        found = float(value)
        if math.isfinite(found) and least <= found <= most:
            return found
    span = f" from {least:g} to {most:g}" if most < math.inf else f" of {least:g} or more" if least > -math.inf else ""
    raise expected(f"{name} to be a finite number{span}", value, f"give another {name}")


def encodable(name: str, value: object) -> str:
    """A string that UTF-8 can hold. Raises: `ValueError` for another kind of value, or half a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            pass
    raise expected(f"{name} to be text", value, "give a string of whole characters")


def flag(name: str, value: object) -> bool:
    """True or False. Raises: `ValueError` for what only counts as one of them."""
    if not isinstance(value, bool):
        raise expected(f"{name} to be True or False", value, f"give another {name}")
    return value


def path_text(name: str, value: object) -> str:
    """A path, as text. Raises: `ValueError` for what is none, or one that no file can have."""
    text: object = os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value
    if isinstance(text, str) and text.strip() and "\0" not in text:
        return encodable(name, text)
    raise expected(f"{name} to be a path", cast(object, value), f"give another {name}")


def several(name: str, value: object, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    """A list or tuple with something in it, each entry checked. Raises: `ValueError`."""
    found = cast("list[Any]", value) if isinstance(value, list | tuple) else []
    if not found:
        raise expected(f"{name} to be a list with something in it", cast(object, value), f"give another {name}")
    return tuple(check(f"{name}[{i}]", each) for i, each in enumerate(found))


def listed(name: str, value: Iterable[T]) -> list[T]:
    """What can be gone through, as a list. Raises: `ValueError` for what cannot."""
    if not isinstance(value, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance] (from outside)
        raise expected(f"{name} to be a list", cast(object, value), f"give another {name}")
    try:
        return list(value)
    except Exception as error:  # what a value does that only looks like a list is its own business
        raise expected(f"{name} to be a list", value, f"give another {name}") from error


def one_of(name: str, value: object, known: Collection[str]) -> str:
    """One of a few names. Raises: `ValueError` that lists them."""
    if isinstance(value, str) and value in known:
        return value
    raise expected(f"{name} out of {', '.join(known)}", value, suggested(value, known) or "choose one of these")


def suggested(value: object, known: Collection[str]) -> str:
    """`did you mean NAME?` for what is spelt nearly like something known, else nothing."""
    close = get_close_matches(str(value), known, 1)
    return f"did you mean {close[0]}?" if close else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def first_problem(error: ValidationError, whole: str) -> str:
    """The first value that pydantic refuses, and why; `whole` names it where it is everything."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"
