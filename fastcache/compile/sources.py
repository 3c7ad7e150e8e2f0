"""JSON files of a model -> values, and other libraries' errors -> one line. Knows nothing about weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: `ValueError` naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON file {file}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(value).__name__}")
    return value


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
