"""A device's name -> what it is on this machine: which of several, how new, and what it multiplies fast.

Knows processors and GPUs; knows nothing about engines.
"""

from __future__ import annotations

import platform
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from fastcache_engines.dtypes import Device

if TYPE_CHECKING:
    import torch

NO_GPU = "PyTorch finds no CUDA GPU; install an NVIDIA driver and a CUDA build of PyTorch"


class BackendUnavailable(RuntimeError):
    """A backend is not installed, or cannot run on this machine; the message says what to do."""


def device_kind(device: str) -> Device:
    """The kind of a device that may be one of several: `cuda` of `cuda:1`."""
    return cast(Device, device.partition(":")[0])


def device_index(device: str) -> int:
    """Which of several devices a name means: 1 of `cuda:1`; of `cuda` the one that torch uses now."""
    import torch

    _, _, index = device.partition(":")
    if index or device_kind(device) == "cpu":
        return int(index or 0)
    return torch.cuda.current_device()


def torch_device(device: str) -> torch.device:
    """A device as torch has it, a GPU with its number."""
    import torch

    return torch.device("cuda", device_index(device)) if device_kind(device) == "cuda" else torch.device(device)


def device_here(device: str) -> str:
    """The machine at hand as bundles name it: `cpu-x86_64`, `cuda-sm90`.

    Raises: `BackendUnavailable` for a GPU where PyTorch finds none.
    """
    if device_kind(device) == "cpu":
        return f"cpu-{platform.machine()}"
    here = gpu(device)
    if here is None:
        raise BackendUnavailable(f"{NO_GPU}, or use device cpu")
    return f"cuda-sm{here.compute_capability.replace('.', '')}"


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and its compute capability as "8.9"."""

    name: str
    compute_capability: str


def gpu(device: str = "cuda") -> Gpu | None:
    """A GPU of this machine, the one that torch uses where none is numbered; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    index = device_index(device)
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), f"{major}.{minor}")


def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones (AVX512-BF16 or AMX)."""
    import torch

    cpu: Any = torch.cpu  # its public get_capabilities is younger than the oldest torch that will do
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


def int8_weight_bits() -> Literal[7, 8]:
    """How many bits an 8-bit layer's weights may have here.

    Without VNNI x86 adds two products of unsigned and signed bytes in 16 bits, which 8-bit weights overflow: on the
    bundled model a shallow pass then has 13 dB of signal to noise in place of 26.
    """
    import torch

    cpu: Any = torch.cpu
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return 7 if on_x86 and not (cpu._is_vnni_supported() or cpu._is_amx_tile_supported()) else 8


@contextmanager
def ieee_float32() -> Generator[None]:
    """Within this torch's float32 on a GPU is IEEE's; cuDNN's own default is TF32, whose error is 1e-3.

    The old switches are written with the new ones: reading them is an error where they differ, and Inductor does read
    them. What was there before comes back.
    """
    import torch

    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, cuda)
    before = [switch.fp32_precision for switch in switches]

    def write(precisions: Sequence[str]) -> None:
        cudnn.allow_tf32, cuda.allow_tf32 = precisions[0] == "tf32", precisions[2] == "tf32"
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision

    write(["ieee"] * 3)
    try:
        yield
    finally:
        write(before)
