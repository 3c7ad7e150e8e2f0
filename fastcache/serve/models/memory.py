"""How much memory a bundle takes when it is served: before it was loaded by its files, afterwards as it was seen.

Knows manifests and this process's memory; nothing about models' names or who uses them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from fastcache.bundle.manifest import Manifest

T = TypeVar("T")

_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def bytes_of(text: str) -> int:
    """A size such as `6GiB`, `500M` or `2000000`: K, M, G and T count 1024.

    Raises: `ValueError` for another text, and for nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise ValueError(f"expected a memory limit such as 6GiB or 500MiB, got {text}; give another")
    return size


def expected_bytes(manifest: Manifest, *, streams: bool) -> int:
    """What a bundle's weights take, by its files; with `streams` those of its passes once more.

    Backends that lay weights out anew may take up to twice as much: `seen` says it once the bundle was loaded.
    """
    files = {entry.name: entry.bytes for entry in manifest.files}
    every = sum(size for name, size in files.items() if not name.startswith(("tokenizer", "reference", "samplers")))
    unet = sum(size for name, size in files.items() if name.startswith(("full", "shallow", "unet")))
    return every + (unet if streams and manifest.device_type == "cpu" else 0)


def seen(load: Callable[[], T], device: str) -> tuple[T, int]:
    """What `load` gives, and by how much the memory in use grew meanwhile: the GPU's, or this process's.

    Other work at the same time counts in, so this is what was seen and no proof.
    """
    before = _in_use(device)
    loaded = load()
    return loaded, max(0, _in_use(device) - before)


def _in_use(device: str) -> int:
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # no Linux: what the files say has to do
        return 0
    return int(pages) * _PAGE_BYTES
