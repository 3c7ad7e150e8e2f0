"""The loop's compiled C, built by CMake as an installation builds it, by a Python that has no Triton."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path

import pytest
from filelock import FileLock

from fastcache_kernels.cpu_step import Library
from fastcache_kernels.launch import KernelError

ROOT = Path(__file__).resolve().parents[1]
LACKING = [name for name in ("cmake", "cc") if shutil.which(name) is None]


def build(folder: Path) -> Library:
    """The library, once for all workers of a run."""
    if LACKING:
        pytest.skip(f"needs {', '.join(LACKING)}; install a C compiler and cmake")
    with FileLock(f"{folder}.lock"):
        installed = folder / "installed" / "fastcache_kernels"
        if not installed.exists():
            venv.create(folder / "python", with_pip=False)  # none of this environment's packages
            python = folder / "python" / "bin" / "python"
            said = _run("cmake", "-S", ROOT, "-B", folder / "build", f"-DPython_EXECUTABLE={python}")
            assert "No kernels for GPUs: Triton is not installed" in said
            _run("cmake", "--build", folder / "build")
            _run("cmake", "--install", folder / "build", "--prefix", folder / "installed")
        return Library(installed)


def choose(which: str, folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Have a module's steps do their own work in compiled C ("compiled"), or in PyTorch's operations."""
    found = build(folder / "cpu-library") if which == "compiled" else KernelError("not to be used")
    monkeypatch.setattr(f"{module}.found_library", lambda: found)


def _run(*command: str | Path) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout
