"""The constants of several AOTInductor packages <-> one safetensors file, with a description of each package.

Equal constants are stored once. In memory they are one block, which engines that are alive together share. Knows
nothing about how packages are made or run.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache_engines.facts import from_json, to_json
from fastcache_engines.machine import device_kind, gpu
from fastcache_engines.tensors import TensorSpec

SUFFIX = ".weights.safetensors"
_ALIGNMENT_BYTES = 512  # of CUDA's own allocator; Triton kernels are compiled for constants aligned to 16

Place = tuple[str, list[int], list[int]]  # a constant's stored name, its shape and its strides


@dataclass(frozen=True)
class Package:
    """What the file of weights says of one role's package.

    `features` are the processor's at the build: the compiler was told to use all of them. `arguments` is the order in
    which the package takes its inputs, `max_rows` the largest batch it was compiled for, where there is one.
    `constants` are by the package's own names.
    """

    torch: str
    device: str
    isa: str
    features: dict[str, Any]
    compute_capability: str | None
    max_rows: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    arguments: tuple[str, ...]
    constants: dict[str, Place]


class Store:
    """Constants on their way into a file."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[torch.dtype, bytes], str] = {}

    def add(self, role: str, constants: Mapping[str, Tensor]) -> dict[str, Place]:
        """Keep a package's constants as the flat spans of memory that they are: safetensors knows no strides."""
        places: dict[str, Place] = {}
        for name, tensor in constants.items():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            span = tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,)).cpu()
            content: Any = span.view(torch.uint8).numpy()
            key = span.dtype, hashlib.sha256(content).digest()
            if key not in self._names:
                self._names[key] = name if name not in self._tensors else f"{role}:{name}"
                self._tensors[self._names[key]] = span
            places[name] = self._names[key], list(tensor.shape), list(tensor.stride())
        return places

    def write(self, file: Path, packages: Mapping[str, Package]) -> None:
        from safetensors.torch import save_file

        file.touch()
        mode = file.stat().st_mode
        save_file(self._tensors, file, {role: to_json(package) for role, package in packages.items()})
        file.chmod(mode)  # safetensors lets no one but the owner read


def features() -> dict[str, Any]:
    """What this processor has and another may lack: instruction sets, and lengths of vectors."""
    found = torch.cpu.get_capabilities().items()
    return {name: value for name, value in found if value is True or name.endswith("max_length")}


def compute_capability(device: str) -> str | None:
    """A GPU's, as "8.9"; None on a CPU."""
    here = gpu(device) if device_kind(device) == "cuda" else None
    return here and here.compute_capability


def reason_of(error: Exception) -> str:
    """The line of an error that says most: the compiler's own, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if " error: " in line), lines[0] if lines else type(error).__name__)


def find_packages(path: Path) -> tuple[dict[str, Package], Path]:
    """A package and those of the same program at other sizes, and the file of weights beside them that describes them.

    They are by the names of their files without the ending, the package itself first.

    Raises: `ValueError` where there is none, or one that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(path.parent.glob(f"*{SUFFIX}")):
        try:
            with safe_open(file, "pt") as source:
                said: dict[str, str] = source.metadata() or {}
            if path.stem in said:
                names = [path.stem, *(name for name in said if name.startswith(f"{path.stem}."))]
                return {name: from_json(Package, said[name]) for name in names}, file
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file.name} is not a readable file of weights: {reason_of(error)}") from error
    raise ValueError(f"expected a *{SUFFIX} file beside {path.name} that names {path.stem!r}, got none; build again")


class Weights:
    """The contents of one file, in one block of a device's memory, which is freed with this."""

    def __init__(self, file: Path, device: torch.device) -> None:
        from safetensors import safe_open

        self._tensors: dict[str, Tensor] = {}
        self._readers: set[int] = set()
        with safe_open(file, "pt") as source:
            mapped = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118 (no iterator)
            sizes = [-(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for tensor in mapped.values()]
            block = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            for (name, tensor), place in zip(mapped.items(), block.split(sizes), strict=True):
                self._tensors[name] = place[: tensor.nbytes].view(tensor.dtype).copy_(tensor)
        self._block = block
        # A package keeps its references to constants that are its user's for good (MaybeOwningAtenTensorHandle in
        # torch 2.11 and 2.13): without this, the memory would be held until the process ends.
        weakref.finalize(self, _free, block).atexit = False

    def note_reader(self, stream: torch.cuda.Stream) -> None:
        """Say that runs in a stream read this: once it is gone, its memory is used again only after them."""
        if stream.cuda_stream not in self._readers:
            self._readers.add(stream.cuda_stream)
            self._block.record_stream(stream)

    def constants(self, package: Package) -> dict[str, Tensor]:
        """A package's constants by its own names: views, which must not be read once this is gone."""
        return {
            name: self._tensors[stored].as_strided(shape, stride)
            for name, (stored, shape, stride) in package.constants.items()
        }


def _free(block: Tensor) -> None:
    """Give a block back without waiting: this may be called by the garbage collector in the midst of a capture.

    torch uses the memory again once the streams that read it have come so far. Replays of a graph of the caller's are
    not seen here: those are taken to be in its present stream or the default one.
    """
    if block.is_cuda:
        for stream in (torch.cuda.current_stream(block.device), torch.cuda.default_stream(block.device)):
            block.record_stream(stream)
    block.untyped_storage().resize_(0)


_loaded: weakref.WeakValueDictionary[tuple[Any, ...], Weights] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def load_weights(file: Path, device: torch.device) -> Weights:
    """The contents of a file, read once for all engines that are alive."""
    status = file.stat()
    key = file.resolve(), status.st_ino, status.st_size, status.st_mtime_ns, device
    with _loading:
        weights = _loaded.get(key)
        if weights is None:
            weights = _loaded[key] = Weights(file, device)
        return weights
