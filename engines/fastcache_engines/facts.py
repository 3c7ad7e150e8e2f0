"""What is written beside an engine file <-> a dataclass of plain values."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def to_json(value: DataclassInstance, without: Collection[str] = ()) -> str:
    """A dataclass as JSON, but for some of its fields."""
    adapter: TypeAdapter[Any] = TypeAdapter(type(value))
    return adapter.dump_json(value, exclude=set(without)).decode()


def from_json(kind: type[T], text: bytes | str) -> T:
    """A dataclass from JSON. Raises: `ValueError` in one line for the first value that does not fit."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its text"
        raise ValueError(f"{where}: {first['msg']}") from None
