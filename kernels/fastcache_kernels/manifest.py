"""What the ahead-of-time kernels and those who look for them agree on: names, and the hash of the sources.

Needs neither torch nor Triton, so that the library can be built without torch.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

KERNELS = ("guidance_statistics", "guidance_step")
SOURCE = "triton_guidance"  # the module that they are in
MANIFEST = "aot.json"
LIBRARY = "libfastcache_kernels.so"
EXACT_FROM = 90  # from here on Triton compiles for one architecture only: sm_90a, sm_100a, ...
ALIGNMENT = 16  # of addresses in bytes, and of sizes in elements: what a load of 16 bytes a thread rests on


def folder_of(name: str) -> Path:
    """Where in this package a file lies; an editable install keeps what was built apart from the sources."""
    folders = [Path(folder) for folder in importlib.import_module("fastcache_kernels").__path__]
    return next((folder for folder in folders if (folder / name).is_file()), folders[0])


def has_image(capability: int, architectures: Sequence[int], ptx: int | None) -> bool:
    """Whether a GPU of a compute capability, as 89, runs kernels for some architectures; a newer one compiles PTX."""
    return (ptx is not None and capability >= ptx) or any(
        capability == own or (own < EXACT_FROM and own <= capability and own // 10 == capability // 10)
        for own in architectures
    )


@cache
def source_hash() -> str:
    """Of the kernels' source: ahead-of-time kernels of another one are not used."""
    return hashlib.sha256(Path(__file__).with_name(f"{SOURCE}.py").read_bytes()).hexdigest()
