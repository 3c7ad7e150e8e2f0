"""A recipe -> its bundle, built once for all the processes of a test run, and kept for the next run.

A bundle lies under the product's own key, which says all of its recipe, model and versions. That key does not see
the code that builds: a folder for each state of it holds the bundles made by that state, so that no test can meet what
other code has built. `worker.build` runs in a process forked from one that has imported all it needs, which saves 5 s
of a core each time, and keeps out of the tests' own processes the memory that an export leaves behind. The product's
own way into that function, by `build_engines`, is what `compile/test_builder.py` tests.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from unittest import mock

from filelock import FileLock

from fastcache.bundle.bundle import Bundle, open_bundle, publish
from fastcache.bundle.recipe import recipe_from
from fastcache.compile import worker
from fastcache.compile.builder import Job, resolve
from fastcache.compile.presets import PRESETS
from fastcache.sampler import stored
from small_presets import SMALL_PRESETS

ROOT = Path(__file__).parents[1]
# What `fastcache.compile` may import, by the layers in pyproject.toml, and what the tests' models are made by.
SOURCES = (
    *(f"fastcache/{name}/**/*.py" for name in ("compile", "bundle", "sampler", "cut", "demo")),
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
        """The bundle that `fastcache.build_engines` would build of these, in fp32 where no dtype is named.

        What `auto` is depends on the machine; what a test expects does not.
        """
        job = resolve(recipe_from({"model": os.fspath(model), "dtype": "fp32", **fields}))
        place = self.folder / "bundles" / job.key[:24] / "bundle"
        return open_bundle(self._once(place, lambda folder: _in_own_process(job, folder)))

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


def _in_own_process(job: Job, folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "diffusers.models", "transformers.models.clip.modeling_clip"])
    # Python 3.11's server of forks looks for what it is to import on no other path, and passes over what it lacks.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)), ProcessPoolExecutor(1, context) as process:
        process.submit(_build, job, folder).result()


def _build(job: Job, folder: Path) -> None:
    PRESETS.update(SMALL_PRESETS)
    stored.USUAL_STEPS = (4,)  # tables of all usual counts take 4 s of a core in every build
    worker.build(job, folder, lambda _: None)


def state_of_the_code() -> str:
    """A hash of what decides a bundle beside its key: the sources that build it, and every installed package."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES for file in ROOT.glob(pattern)}):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    digest.update("\n".join(sorted({f"{d.name} {d.version}" for d in distributions()})).encode())
    return digest.hexdigest()[:16]
