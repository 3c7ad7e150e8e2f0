"""A recipe -> its bundle, built once for all the processes of a test run, and kept for the next run.

A bundle lies under the product's own key, which says all of its recipe, model and versions. That key does not see
the code that builds: a folder for each state of it holds the bundles made by that state, so that no test can meet what
other code has built. Builds run in the test's own process, by `worker.build`: what that leaves out, the process around
it, is what `compile/test_builder.py` tests, and takes 6 s of imports each time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from filelock import FileLock

from fastcache.bundle.bundle import Bundle, open_bundle, publish
from fastcache.bundle.recipe import recipe_from
from fastcache.compile import worker
from fastcache.compile.builder import resolve

ROOT = Path(__file__).parents[1]
# What `fastcache.compile` may import, by the layers in pyproject.toml, and what the tests' models are made by.
SOURCES = (
    *(f"fastcache/{name}/**/*.py" for name in ("compile", "bundle", "cut", "demo")),
    "fastcache/*.py",
    "engines/fastcache_engines/**/*.py",
    "kernels/fastcache_kernels/**/*.py",
    "tests/*.py",
)
_KEPT_STATES = 4  # some 100 MB each


class BuildStore:
    """Models and bundles in one folder, shared by every process that is given it; not to be changed by a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / state_of_the_code()
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        states = sorted(folder.iterdir(), key=lambda state: state.stat().st_mtime, reverse=True)
        for state in states[_KEPT_STATES:]:
            shutil.rmtree(state, ignore_errors=True)

    def model(self, name: str, save: Callable[[Path], object]) -> Path:
        """A folder that `save` has filled, once."""
        return self._once(self.folder / "models" / name, save)

    def bundle(self, model: str | os.PathLike[str] = "demo", **fields: Any) -> Bundle:
        """The bundle that `fastcache.build_engines` would build of these."""
        job = resolve(recipe_from({"model": os.fspath(model), **fields}))

        def build(folder: Path) -> None:
            worker.build(job, folder, lambda _: None)

        return open_bundle(self._once(self.folder / "bundles" / job.key[:24] / "bundle", build))

    @staticmethod
    def _once(place: Path, fill: Callable[[Path], object]) -> Path:
        """Fill a folder beside its place and move it there, unless it is there already."""
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.is_dir():
                temporary = place.with_name(f"{place.name}.tmp")  # under the lock, one that is there was given up
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                fill(temporary)
                publish(temporary, place)
        return place


def state_of_the_code() -> str:
    """A hash of what decides a bundle beside its key: the sources that build it, and every installed package."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES for file in ROOT.glob(pattern)}):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    digest.update("\n".join(sorted({f"{d.name} {d.version}" for d in distributions()})).encode())
    return digest.hexdigest()[:16]
