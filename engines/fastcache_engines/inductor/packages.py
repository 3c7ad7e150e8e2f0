"""What loading an AOTInductor package does to the disk: its entries stay in their folder, and a failure leaves none.

torch unpacks a package into a folder of its own among the temporary files, wherever its entries say, and removes that
folder with the loader, which a load that fails never makes. Knows archives; knows nothing about what is in them.
"""

from __future__ import annotations

import os
import shutil
import threading
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final

_PREFIX: Final = "aotinductor_"
_loading = threading.Lock()  # what appears meanwhile is the one load's


@contextmanager
def unpacking(path: Path) -> Generator[None]:
    """Around torch's loading of a package.

    Raises: `ValueError` for an archive that cannot be read, or an entry outside its folder.
    """
    names = _entries(path)
    with _loading:
        before = _folders()
        try:
            yield
        except BaseException:
            # Another process's is left alone, unless it loads the same package, which then fails there, too.
            for folder in _folders() - before:
                if {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} <= names:
                    shutil.rmtree(folder, ignore_errors=True)
            raise


def _entries(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is not a readable package: {error}") from error
    for name in sorted(names):
        entry = PurePosixPath(name)
        if entry.is_absolute() or ".." in entry.parts or "\\" in name:
            raise ValueError(f"expected entries of {path.name} inside it, got {name!r}; build the bundle again")
    return names


def _folders() -> set[Path]:
    return set(Path(os.environ.get("TMPDIR") or "/tmp").glob(f"{_PREFIX}*"))


def stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from another in its place."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
