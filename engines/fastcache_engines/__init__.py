"""ONNX in, named tensors out: one small protocol that every backend speaks, one file a backend.

Knows nothing about diffusion: an engine is a compiled graph with named inputs and outputs. A caller binds its own
tensors once and then runs as often as it likes; the engine reads and writes those very tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BACKENDS", "Backend", "BackendUnavailable", "Binding", "Engine", "TensorSpec", "backend", "check_tensors"]

BACKENDS = {"onnxruntime": "onnxruntime"}  # a backend's name -> its module here, in the order `auto` prefers them


class BackendUnavailable(RuntimeError):
    """A backend is not installed, or cannot run on this machine; the message says what to do."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output: its name, its torch dtype by name, and its shape, symbols for free sizes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Binding(Protocol):
    """An engine with its tensors in place."""

    def run(self) -> None:
        """Compute every output from the inputs' present contents. Allocates nothing that the caller sees."""
        ...


class Engine(Protocol):
    """One compiled graph, loaded and ready."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def bind(self, tensors: Mapping[str, Tensor]) -> Binding:
        """Fix the tensors that inputs are read from and outputs are written to; others are ignored.

        Raises: `ValueError` for a missing tensor, or one of another dtype, shape, device or memory layout.
        """
        ...


def check_tensors(specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor], device: str) -> None:
    """Raise `ValueError` unless `tensors` holds a contiguous tensor of the right kind for every spec."""
    sizes: dict[str, int] = {}
    for spec in specs:
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise ValueError(
                f"expected a tensor named {spec.name!r} to bind, got {', '.join(sorted(tensors)) or 'none'}"
            )
        fits = len(tensor.shape) == len(spec.shape) and all(
            size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
            for size, wanted in zip(tensor.shape, spec.shape, strict=True)
        )
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not fits or dtype != spec.dtype or tensor.device.type != device or not tensor.is_contiguous():
            raise ValueError(
                f"expected {spec.name!r} to be contiguous {spec.dtype} {list(spec.shape)} on {device}, got "
                f"{'' if tensor.is_contiguous() else 'non-contiguous '}{dtype} {list(tensor.shape)} on {tensor.device}"
            )


class Backend(Protocol):
    """What a backend's module offers."""

    NAME: str

    def version(self) -> str:
        """The installed version. Raises: `BackendUnavailable`, saying what to install."""
        ...

    def load(self, path: Path, *, threads: int = 0) -> Engine:
        """An engine from a file of a checked bundle; `threads` 0 means as many as torch uses."""
        ...


def backend(name: str) -> Backend:
    """A backend by its name.

    Raises: `BackendUnavailable` for a name that this version does not have.
    """
    if name not in BACKENDS:
        raise BackendUnavailable(f"expected a backend of this version ({', '.join(BACKENDS)}), got {name!r}")
    return cast(Backend, importlib.import_module(f"fastcache_engines.{BACKENDS[name]}"))
