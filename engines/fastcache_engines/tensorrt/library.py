"""What building and running TensorRT engines share: the library, its log, the GPU, an engine file's facts, caches.

An engine `full.engine` has its facts beside it in `full.engine.json`: what a machine without a GPU cannot ask it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastcache_engines.extras import install
from fastcache_engines.facts import from_json, to_json
from fastcache_engines.machine import BackendUnavailable, device_kind
from fastcache_engines.protocol import Support
from fastcache_engines.tensors import TensorSpec, free_size

CPU = Support(None, False, False, "TensorRT runs on NVIDIA GPUs only; use onnxruntime, openvino or inductor")

Validity = Literal["valid", "suboptimal", "invalid", "unchecked"]


@dataclass(frozen=True)
class Package:
    """A library of the family: its backend, also the extra that installs it, its Python module, its name to readers."""

    backend: str
    module: str
    title: str

    def library(self) -> Any:
        """The module.

        Raises: `BackendUnavailable` where it is not installed, or installed without its libraries.
        """
        remedy = f"run: {install(self.backend)}"
        if importlib.util.find_spec(self.module) is None:
            raise BackendUnavailable(f"{self.title} is not installed; {remedy}")
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # its bindings can be installed without its shared libraries
            raise BackendUnavailable(
                f"{self.title} is installed but does not load ({one_line(str(error))}); {remedy}"
            ) from error

    def version(self) -> str:
        """The installed version. Raises: `BackendUnavailable`."""
        return self.library().__version__

    def require(self, device: str) -> None:
        """Raise `BackendUnavailable` for another device than a GPU."""
        if device_kind(device) != "cuda":
            raise BackendUnavailable(f"expected device cuda, which {self.title} is for, got {device}")


@functools.cache
def log_of(trt: Any) -> Any:
    """The log of a library's every object: it keeps the first log it is given, and ignores all others."""

    class Log(trt.ILogger):
        """The latest errors, kept for the message of the exception that follows them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: deque[str] = deque(maxlen=100)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._lines.append(msg)

        def clear(self) -> None:
            self._lines.clear()

        def reason(self) -> str:
            """The first error since `clear`, in one line."""
            return one_line(self._lines[0]) if self._lines else "no reason given"

    return Log()


def one_line(text: str) -> str:
    """A message of TensorRT in one line, without the complaint about a missing driver that follows each of its own."""
    lines = (line.strip() for line in text.splitlines())
    return "; ".join(line for line in lines if line and "catchCudaError" not in line)[:400]


@dataclass(frozen=True)
class EngineFacts:
    """What is known of an engine file without loading it.

    `version` is of the library that built it, `compute_capabilities` are the GPUs it was built for, `layers` the
    network's before the library fused them, `rows` the least, usual and largest batch. `validity` is for the library
    and GPU at hand, "unchecked" where there is no driver to ask; `reason` says why.
    """

    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    layers: int
    rows: tuple[int, int, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sha256: str
    validity: Validity = "unchecked"
    reason: str = ""


def facts_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def write_facts(engine: Path, facts: EngineFacts) -> None:
    """Write an engine's facts beside it; its validity belongs to a machine, not to the file."""
    facts_path(engine).write_text(to_json(facts, without=("validity", "reason")), encoding="utf-8")


def describe_engine(
    package: Package, path: Path, header: Callable[[Path], tuple[Validity, str]] = lambda path: ("unchecked", "")
) -> EngineFacts:
    """What is known of an engine file without loading it; `header` is what its own first bytes say of it.

    Raises: `BackendUnavailable`; `ValueError` for a file that is missing, or whose facts are.
    """
    installed, found = package.version(), _read_facts(path)
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"expected an engine in {path.name}, got {'an empty' if path.is_file() else 'no such'} file")
    if (found.backend, found.version) != (package.backend, installed):
        own = f"{package.backend} {installed}, which is installed"
        validity, reason = "invalid", f"built by {found.backend} {found.version}, not by {own}; build it again"
    else:
        validity, reason = header(path)
    return replace(found, validity=validity, reason=reason)


def require_valid(facts: EngineFacts, path: Path) -> None:
    """Raise `ValueError` for an engine that cannot be loaded here."""
    if facts.validity == "invalid":
        raise ValueError(f"{path.name} does not load here: {facts.reason}")


def _read_facts(engine: Path) -> EngineFacts:
    file = facts_path(engine)
    try:
        return from_json(EngineFacts, file.read_bytes())
    except (OSError, ValueError) as error:
        got = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"expected the facts of {engine.name} in {file.name} beside it, got {got}; build it again"
        ) from error


_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}


def spec(name: str, dtype: Any, shape: Any) -> TensorSpec:
    """A tensor of TensorRT's as every backend describes them."""
    kind: str = dtype.name
    sizes = tuple(free_size(name, axis) if size < 0 else int(size) for axis, size in enumerate(shape))
    return TensorSpec(name, _DTYPES.get(kind, kind.lower()), sizes)


def cache_path(*parts: str) -> Path:
    """A file of the user's cache folder for a library, version, GPU, engine: whatever `parts` say."""
    import platformdirs

    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return platformdirs.user_cache_path("fastcache") / parts[0] / f"{name}.cache"


def read_cache(path: Path) -> bytes:
    """A cached file, or nothing."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def write_cache(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, however many processes do. Raises: `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_bytes(content)
        os.replace(temporary, path)
