"""A kernel's name and its arguments -> something to call that launches it, ahead-of-time compiled or by Triton.

The ahead-of-time kernels are a shared library beside this file, with a manifest of what is in it; `aot.py` makes both.
They are used where the manifest is of these very sources and has the kernel for these dtypes and alignments. Else
Triton compiles; and where there is neither, or no GPU, the caller computes the plain PyTorch meaning.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache_kernels.manifest import ALIGNMENT, MANIFEST, SOURCE, folder_of, has_image, source_hash

Argument = Tensor | int | float
Launch = Callable[[], None]

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
_C_TYPES: dict[str, Any] = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


class KernelError(RuntimeError):
    """A kernel was not launched; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One kernel of the library, for certain dtypes, constants and alignments."""

    symbol: str
    types: tuple[str, ...]
    aligned: tuple[bool, ...]


class GpuLibrary:
    """The ahead-of-time kernels of a folder.

    Raises: `KernelError` where there are none, or none of these sources.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / MANIFEST
        if not file.is_file():
            raise KernelError(f"no {MANIFEST} in fastcache_kernels; install with FASTCACHE_AOT=1 to have one")
        self.manifest: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if self.manifest["source_sha256"] != source_hash():
            raise KernelError("the ahead-of-time kernels are of other sources than those installed; install again")
        try:
            self._library = ctypes.CDLL(str(folder / self.manifest["library"]))
        except OSError as error:
            raise KernelError(f"the ahead-of-time kernels do not load: {error}") from error
        self._error = self._library.fastcache_error
        self._error.restype, self._error.argtypes = ctypes.c_char_p, [ctypes.c_int]
        stamp = self._library.fastcache_source_sha256
        stamp.restype = ctypes.c_char_p
        if stamp().decode() != source_hash():
            raise KernelError(f"{MANIFEST} and {self.manifest['library']} are of different builds; install again")
        self.variants: dict[object, Variant] = {}
        for entry in self.manifest["kernels"]:
            types = tuple(parameter["type"] for parameter in entry["parameters"])
            aligned = tuple(parameter["aligned"] for parameter in entry["parameters"])
            self.variants[_key(entry["kernel"], types, entry["num_warps"], entry["constants"])] = Variant(
                entry["symbol"], types, aligned
            )

    def serves(self, device: torch.device) -> bool:
        """Whether a kernel runs on a GPU: one compiled for it, or the PTX that newer ones compile."""
        major, minor = torch.cuda.get_device_capability(device)
        return has_image(10 * major + minor, self.manifest["architectures"], self.manifest["ptx"])

    def find(
        self, kernel: str, arguments: Mapping[str, Argument], num_warps: int, constants: Mapping[str, int]
    ) -> Variant | None:
        """The kernel for these arguments, or None where it is not in the library."""
        types = tuple(_type(argument) for argument in arguments.values())
        variant = self.variants.get(_key(kernel, types, num_warps, constants))
        if variant is None or not all(map(_is_aligned, arguments.values(), variant.aligned)):
            return None
        return variant

    def bind(self, variant: Variant, grid: tuple[int, int, int], arguments: Mapping[str, Argument]) -> Launch:
        """Load the kernel, and fix everything but the stream, which is torch's current one at each launch.

        Raises: `KernelError` where it cannot be loaded.
        """
        function = self._library[variant.symbol]
        values: list[Any] = [
            _c_value(argument, kind) for argument, kind in zip(arguments.values(), variant.types, strict=True)
        ]
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 3, *[type(value) for value in values]]
        device = _device(arguments)
        place = device.index  # a tensor's device always has one
        kept = tuple(arguments.values())  # the addresses are good for as long as their tensors live

        def check(code: int) -> None:
            if code != 0:
                raise KernelError(f"{variant.symbol} was not launched: {self._error(code).decode()}")

        def launch(kept: tuple[Argument, ...] = kept) -> None:
            check(function(place, torch.cuda.current_stream(place).cuda_stream, *grid, *values))

        check(function(place, None, 0, 0, 0, *values))  # only loads: while a graph is captured that would fail
        return launch


@cache
def _found_library() -> GpuLibrary | KernelError:
    try:
        return GpuLibrary(folder_of(MANIFEST))
    except KernelError as error:
        return error


def source() -> tuple[str, str]:
    """Where kernels come from on this machine, "aot", "triton" or "reference", and why."""
    if not torch.cuda.is_available():
        if _interpreted():
            return "triton", "TRITON_INTERPRET is set: kernels run in Triton's interpreter, slowly, on the CPU"
        return "reference", "PyTorch finds no CUDA GPU: plain PyTorch operations are the kernels"
    found = _found_library()
    if isinstance(found, GpuLibrary) and found.serves(torch.device("cuda")):
        names = ", ".join(f"sm_{number}" for number in found.manifest["architectures"])
        return "aot", f"compiled ahead of time for {names}"
    why = "the ahead-of-time kernels are for other GPUs" if isinstance(found, GpuLibrary) else str(found)
    if _triton_version() is not None:
        return "triton", f"Triton {_triton_version()} compiles at first use: {why}"
    return "reference", f"{why}; nor is Triton installed: pip install triton"


def prepare(
    kernel: str,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Argument],
    *,
    num_warps: int,
    **constants: int,
) -> Launch | None:
    """Something to call that launches a kernel on these very tensors, or None where only PyTorch can compute it.

    `arguments` are the kernel's, in its order; `constants` those that it takes at compile time.
    """
    device = _device(arguments)
    if device.type == "cuda":
        found = _found_library()
        if isinstance(found, GpuLibrary) and found.serves(device):
            variant = found.find(kernel, arguments, num_warps, constants)
            if variant is not None:
                return found.bind(variant, grid, arguments)
    if not has_triton(device):
        return None
    function: Any = getattr(importlib.import_module(f"fastcache_kernels.{SOURCE}"), kernel)
    # fused multiply-adds by name: Triton 3.10 changes what it does unasked
    run = partial(function[grid], **arguments, **constants, num_warps=num_warps, enable_fp_fusion=True)
    if device.type == "cpu":
        return run

    with torch.cuda.device(device):  # Triton works on the current device, whatever its arguments'
        compiled = function.warmup(
            *arguments.values(), grid=grid, **constants, num_warps=num_warps, enable_fp_fusion=True
        )
        _ = compiled.run  # loads it too: while a graph is captured that would fail

    def launch() -> None:
        with torch.cuda.device(device):
            run()

    return launch


@cache
def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("triton").__version__


def has_triton(device: torch.device) -> bool:
    """Whether Triton can launch kernels on a device: a GPU, or the CPU where it interprets."""
    return _triton_version() is not None if device.type == "cuda" else device.type == "cpu" and _interpreted()


def _interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; it must be told so before it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _triton_version() is not None


def _device(arguments: Mapping[str, Argument]) -> torch.device:
    return next(argument.device for argument in arguments.values() if isinstance(argument, Tensor))


def _key(kernel: str, types: tuple[str, ...], num_warps: int, constants: Mapping[str, int]) -> object:
    return kernel, types, num_warps, tuple(sorted(constants.items()))


def _type(argument: Argument) -> str:
    if isinstance(argument, Tensor):
        return _TYPES.get(argument.dtype, str(argument.dtype))
    return "i32" if isinstance(argument, int) else "fp32"


def _is_aligned(argument: Argument, wanted: bool) -> bool:
    number = argument.data_ptr() if isinstance(argument, Tensor) else argument
    return not wanted or number % ALIGNMENT == 0


def _c_value(argument: Argument, kind: str) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return _C_TYPES[kind](argument)
