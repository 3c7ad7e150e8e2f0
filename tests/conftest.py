"""What every test shares: no network for the hub, few threads, and a reason for each GPU test skipped.

The process that starts the workers reads this too: what takes seconds to import, those do that need it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere; inherited by subprocesses
# What a process keeps for the next is not the user's here; engines are kept by their bundles' hashes.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / "build" / "test-caches")
# Threads that outnumber the cores wait for each other at every barrier, spinning: 50 times slower. A worker inherits
# what this sets in the process that starts the workers, and sets its own.
os.environ["OMP_NUM_THREADS"] = str(
    max(1, min(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest

if TYPE_CHECKING:
    from build_store import BuildStore
    from fastcache import Bundle

TESTS = Path(__file__).parent

hypothesis.settings.register_profile("fastcache", deadline=None)  # a busy machine is not a failing test
hypothesis.settings.load_profile("fastcache")


# A file is one process's work, so that its fixtures are made once: the longest go first, lest one is left to the end.
LONGEST = (
    "structure/test_structure.py",
    "engines/test_backends.py",
    "tools/test_gpu_check.py",
    "structure/test_calls_home.py",
    "pipeline/test_pipeline.py",
    "compile/test_presets.py",
    "engines/test_inductor.py",
    "bench/test_bench.py",
    "serve/cluster/test_ray.py",
    "bench/test_sweep.py",
    "compile/test_export.py",
    "compile/test_builder.py",
    "compile/test_chain.py",
    "engines/test_inductor_sizes.py",
    "evaluate/test_evaluate.py",
    "compile/test_quantize.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; tests marked `gpu` are skipped where torch sees no CUDA device."""
    import torch

    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST)}
    if gone := [str(file) for file in ranks if not file.is_file()]:
        raise pytest.UsageError(f"expected the files of LONGEST in {__file__}, got none at {', '.join(gone)}")
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    items[:] = _in_share(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _in_share(items: list[pytest.Item]) -> list[pytest.Item]:
    """All quick tests and, of the files with slow ones, the share `K/N` that FASTCACHE_SLOW_SHARE asks for, or all.

    Another commit's CI takes another share, so that all are run in turn within its time.
    """
    share = os.environ.get("FASTCACHE_SLOW_SHARE")
    if share is None:
        return items
    part, of = map(int, share.split("/"))
    files = sorted({item.path for item in items if "slow" in item.keywords})
    return [item for item in items if "slow" not in item.keywords or files.index(item.path) % of == part]


@pytest.fixture(scope="session")
def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a run: pytest-xdist gives each a subfolder of it."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def builds() -> BuildStore:
    """Models and bundles that this run, or one before it, has made."""
    from build_store import BuildStore

    return BuildStore(TESTS.parent / "build" / "test-store")


@pytest.fixture(scope="session")
def tiny_model(builds: BuildStore) -> Path:
    """A folder with a whole Stable Diffusion of random weights (`tiny_model.py`); not to be changed."""
    from tiny_model import save_tiny_model

    return builds.model("tiny-model", save_tiny_model)


@pytest.fixture(scope="session")
def tiny_bundle(builds: BuildStore, tiny_model: Path) -> Bundle:
    """`tiny_model` built with all its components; tests that damage it copy it first."""
    return builds.bundle(tiny_model)


@pytest.fixture(scope="session")
def demo_bundle(builds: BuildStore) -> Callable[[int], Bundle]:
    """The bundled model cut at a branch; only branch 0 comes with its text encoder and VAE."""
    return lambda branch_id: builds.bundle(branch_id=branch_id, **({} if branch_id == 0 else {"components": ("unet",)}))


@pytest.fixture
def bundle_copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of `tiny_bundle` to damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


@dataclass(frozen=True)
class Said:
    """What a command left: exit code, standard output, and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command line, called with a command's name and its arguments."""
    from fastcache.cli import main

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fastcache", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Said(int(stop.value.code or 0), captured.out, captured.err)

    return run
