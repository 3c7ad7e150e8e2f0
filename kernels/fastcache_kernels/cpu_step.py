"""A run's steps on a CPU -> two calls of compiled C for each, one before its engine and one after it.

The C is `cpu_step.c`, a shared library beside this file where CMake was there when fastcache was installed. A step's
addresses and numbers are laid out here, once, so that a call passes one address. Knows tensors and nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache_kernels.launch import KernelError
from fastcache_kernels.manifest import folder_of
from fastcache_kernels.values import expect

LIBRARY, SOURCE = "libfastcache_cpu.so", "cpu_step.c"
Call = Callable[[], object]

_CPU = torch.device("cpu")
_ADDRESSES = ("latents", "model_input", "timesteps", "noise_pred", "guided", "following", "rows", "weights", "contrast")
_SIZES = ("num_rows", "images", "size", "input_stride", "halves")
_NUMBERS = ("input_scale", "timestep", "guidance_scale", "image_guidance_scale", "rescale")


class _Step(ctypes.Structure):
    """`fastcache_step` of the C, with what its addresses point to."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _ADDRESSES),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_float) for name in _NUMBERS),
    ]
    kept: tuple[object, ...]


class Library:
    """The C functions in a folder.

    Raises: `KernelError` where there are none, or of another source.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / LIBRARY
        if not file.is_file():
            raise KernelError(f"no {LIBRARY} in fastcache_kernels; install again with CMake and a C compiler")
        try:
            library = ctypes.CDLL(str(file))
            stamp: Any = library.fastcache_cpu_source_sha256
            self.begin, self.end = library.fastcache_step_begin, library.fastcache_step_end
        except (OSError, AttributeError) as error:
            raise KernelError(f"{LIBRARY} does not load: {error}; install again") from error
        self.begin.restype = self.end.restype = None
        stamp.restype = ctypes.c_char_p
        if stamp().decode() != source_hash():
            raise KernelError(f"{LIBRARY} is of another {SOURCE} than the one installed; install again")


def source_hash() -> str:
    return hashlib.sha256(Path(__file__).with_name(SOURCE).read_bytes()).hexdigest()


@cache
def found_library() -> Library | KernelError:
    """The library that was built where fastcache was installed, or why there is none."""
    try:
        return Library(folder_of(LIBRARY))
    except KernelError as error:
        return error


def source() -> tuple[str, str]:
    """What a loop on the CPU does its own work with, "aot" or "torch", and why."""
    found = found_library()
    if isinstance(found, Library):
        return "aot", "compiled C, one call before each engine and one after it"
    return "torch", f"PyTorch's operations: {found}"


@dataclass(frozen=True)
class StepRows:
    """What engines read and write on some rows, `halves` times each image, checked by `CpuSteps.rows`."""

    tensors: tuple[Tensor, Tensor, Tensor]
    addresses: tuple[int, int, int]
    input_stride: int
    halves: int


class CpuSteps:
    """The loop's own work around a run's engine calls, on the loop's own buffers.

    `ring` holds the rows x, e and z of the last calls, call i in place i % ring calls: the latents, the guided
    prediction and the noise drawn, which must stand there before a call ends. `updates` are each call's: the first call
    it looks back to, and weights for x, e and z from there to its own; a row of weight 0 is not read. The newest x may
    take the oldest's place. Guidance is `reference.guide` for two halves; for three, without text and image, with the
    image and with both, e = p0 + image_guidance_scale (p1 - p0) + guidance_scale (p2 - p1). With `contrasts` a call's z
    is the last half less the one before it, 0 of one half, and written here.

    Shapes: `ring` (calls, 3, N, C, ...), float32, on the CPU.
    Raises: `ValueError` for a ring that does not fit, or updates that look back further.
    Source: arXiv 2211.09800, equation 3 (three halves).
    """

    def __init__(
        self,
        library: Library,
        ring: Tensor,
        updates: Sequence[tuple[int, Sequence[float]]],
        *,
        input_scales: Sequence[float],
        timesteps: Sequence[float],
        guidance_scale: float = 1.0,
        image_guidance_scale: float = 0.0,
        rescale: float = 0.0,
        contrasts: bool = False,
    ) -> None:
        expect("ring", ring, (len(ring), 3, *ring.shape[2:]), (torch.float32,), _CPU)
        widest = max(call + 1 - first for call, (first, _) in enumerate(updates))
        if widest > len(ring):
            raise ValueError(f"expected a ring of {widest} calls or more for these updates, got {len(ring)}")
        self._library, self._ring, self._updates = library, ring, updates
        self._numbers = list(zip(input_scales, timesteps, strict=True))
        self._guidance, self._contrasts = (guidance_scale, image_guidance_scale, rescale), contrasts
        self._image = ring.shape[2], ring[0, 0, 0].numel()
        row_bytes = ring.stride(1) * ring.element_size()
        self._rows = [ring.data_ptr() + row * row_bytes for row in range(3 * len(ring))]

    def rows(self, sample: Tensor, timestep: Tensor, noise_pred: Tensor) -> StepRows:
        """Tensors that engines read and write.

        Shapes: `sample` (halves * N, C or more, ...), the latents in its first channels; `timestep` (halves * N,);
        `noise_pred` (halves * N, C, ...); float32, on the CPU.
        Raises: `ValueError` for tensors that do not fit.
        """
        images, channels, *plane = self._ring.shape[2:]
        count, fp32 = len(noise_pred), (torch.float32,)
        if count not in (images, 2 * images, 3 * images) or sample.shape[1] < channels:
            raise ValueError(
                f"expected 1 to 3 rows for each of {images} images and a sample of {channels} channels or more, got "
                f"{count} rows and {list(sample.shape)}"
            )
        expect("sample", sample, (count, sample.shape[1], *plane), fp32, _CPU)
        expect("timestep", timestep, (count,), fp32, _CPU)
        expect("noise_pred", noise_pred, (count, channels, *plane), fp32, _CPU)
        addresses = sample.data_ptr(), timestep.data_ptr(), noise_pred.data_ptr()
        return StepRows((sample, timestep, noise_pred), addresses, sample.stride(0), count // images)

    def calls(self, call: int, rows: StepRows) -> tuple[Call, Call]:
        """What a U-Net call begins with, its input and timesteps, and what it ends with, e and the next x."""
        first, weights = self._updates[call]
        kept = [(self._row(3 * first + i), weight) for i, weight in enumerate(weights) if weight]
        addresses = (ctypes.c_void_p * len(kept))(*[row for row, _ in kept])
        factors = (ctypes.c_float * len(kept))(*[weight for _, weight in kept])
        step = _Step(
            self._row(3 * call),
            *rows.addresses,
            *(self._row(3 * call + 1), self._row(3 * call + 3)),
            *(ctypes.addressof(addresses), ctypes.addressof(factors)),
            *(self._row(3 * call + 2) if self._contrasts else None, len(kept)),
            *(*self._image, rows.input_stride, rows.halves),
            *(*self._numbers[call], *self._guidance),
        )
        step.kept = self._ring, rows, addresses, factors  # a reference to the step keeps what it points to
        return partial(self._library.begin, ctypes.byref(step)), partial(self._library.end, ctypes.byref(step))

    def _row(self, number: int) -> int:
        return self._rows[number % len(self._rows)]
