"""What a backend compiled -> an entry of the user's cache folder, and back, so that the next process need not compile.

An entry is taken only if it is whole and was written for the same key, by this user, where nobody else can write: what
is compiled is as good as a program. Anything else is as if it were not there. Knows bytes and files; knows no backend.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import platform
import stat
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

MOST_BYTES: Final = 4 << 30  # of all entries; beyond it those that were used the longest ago go
_DIGEST_BYTES: Final = 32
_SUFFIX: Final = ".compiled"


def kept(key: Sequence[str]) -> memoryview | None:
    """What was compiled for a key, mapped from its file; None where there is no entry that can be trusted.

    What is written to it stays in this process. It begins at a page.
    """
    folder = _folder()
    if not _is_own(folder):
        return None
    path = folder / _name(key)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not _is_trusted(status, stat.S_IFREG):
                return None
            whole = _mapped(stream.fileno(), status.st_size)
        os.utime(path)
    except (OSError, ValueError):  # mmap's, of a file that was cut meanwhile
        return None
    content, digest = whole[:-_DIGEST_BYTES], bytes(whole[-_DIGEST_BYTES:])
    if digest == _digest(key, content):
        return content
    drop(key)
    return None


def keep(key: Sequence[str], content: bytes) -> None:
    """Write an entry, whole or not at all, however many processes do. A cache that cannot be written is none.

    So is one for more than all entries may take.
    """
    if len(content) > MOST_BYTES:
        return
    folder = _folder()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(folder):
            return
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as place:
            temporary = Path(place) / _name(key)
            with temporary.open("wb") as stream:
                temporary.chmod(0o600)
                stream.write(content)
                stream.write(_digest(key, content))
            os.replace(temporary, folder / _name(key))
        _prune(folder)


def drop(key: Sequence[str]) -> None:
    """Remove an entry that turned out to be of no use."""
    with contextlib.suppress(OSError):
        (_folder() / _name(key)).unlink(missing_ok=True)


@cache
def processor() -> str:
    """A hash of what this processor is and can do: its name alone does not tell two generations apart in a cloud."""
    told = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU")
        told = "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return hashlib.sha256(told.encode()).hexdigest()


def _folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("fastcache") / "compiled"


def _name(key: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(key).encode()).hexdigest()[:40] + _SUFFIX


def _mapped(handle: int, size: int) -> memoryview:
    """A file in memory: pages are read as they are used, and changed ones are this process's own."""
    return memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_COPY) if size else b"")


def _digest(key: Sequence[str], content: bytes | memoryview) -> bytes:
    return hashlib.sha256("\0".join(key).encode() + b"\0" + hashlib.sha256(content).digest()).digest()


def _is_own(folder: Path) -> bool:
    """Whether a folder is there, is this user's own, and can be written by nobody else."""
    try:
        return _is_trusted(folder.lstat(), stat.S_IFDIR)
    except OSError:
        return False


def _is_trusted(status: os.stat_result, kind: int) -> bool:
    if stat.S_IFMT(status.st_mode) != kind:
        return False
    if not hasattr(os, "getuid"):  # Windows keeps a user's own folders apart by other means
        return True
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _prune(folder: Path) -> None:
    """Remove the entries that were used the longest ago, until the rest are few enough."""
    entries = [(path, path.stat()) for path in folder.glob(f"*{_SUFFIX}")]
    total = sum(status.st_size for _, status in entries)
    for path, status in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size
