"""Files that appear whole or not at all, their hashes, and what JSON holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, cast


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: `ValueError` naming the file."""
    try:
        value: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON file {file}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(value).__name__}")
    return cast("dict[str, Any]", value)


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, without a BOM. Raises: `ValueError` naming the file.

    Unlike str.splitlines it keeps U+2028, which JSON may hold as it is, and form feeds within their lines.
    """
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a file of prompts, got {file}: {error}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all. Raises: `OSError` naming the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk without a name, of a folder with that of the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write a document whole, into a folder that is made where there is none. Raises: `OSError` naming the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(document, indent=1) + "\n").encode())


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
