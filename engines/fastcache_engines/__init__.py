"""Graph in, named tensors out: one small protocol that every backend speaks, one file a backend.

Knows nothing about diffusion: an engine is a compiled graph with named inputs and outputs. A caller binds its own
tensors once and then runs as often as it likes; the engine reads and writes those very tensors.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailable",
    "Binding",
    "BuildOptions",
    "Engine",
    "LoadOptions",
    "Support",
    "TensorSpec",
    "Workspace",
    "backend",
    "check_tensors",
    "choose",
    "device_here",
    "fast_bf16",
    "free_size",
    "refuse_targets",
]

# A backend's name -> its module here.
BACKENDS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "inductor": "inductor",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "onnxruntime-tensorrt": "onnxruntime_tensorrt",
}

DType = Literal["fp32", "fp16", "bf16"]


class BackendUnavailable(RuntimeError):
    """A backend is not installed, or cannot run on this machine; the message says what to do."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output: its name, its torch dtype by name, and its shape, symbols for free sizes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Support:
    """What a backend can do on this machine for one device; `reason` says why not, or under which conditions."""

    version: str | None
    can_build: bool
    can_run: bool
    reason: str


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built: in which arithmetic, for which device and which numbers of rows.

    `rows` are the least, usual and largest sizes of the batch axis, which is every input's first and mostly its only
    free one; `shapes` are those of the axes after it, by name, of inputs that have other free ones.
    `compute_capability` are the GPUs to build for, as "8.9"; the GPU at hand where there are none.
    """

    device: str = "cpu"
    dtype: DType = "fp32"
    rows: tuple[int, int, int] = (1, 2, 8)
    shapes: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict[str, tuple[tuple[int, ...], ...]])
    compute_capability: tuple[str, ...] = ()
    progress: Callable[[str], None] = field(default=lambda message: None, compare=False)


@dataclass(frozen=True)
class LoadOptions:
    """How an engine is loaded. `threads` 0 means as many as torch uses; `workspace` is shared by its user's engines.

    On a CPU, ONNX Runtime and OpenVINO run up to `streams` calls from several threads at once, which share `threads`.
    """

    device: str = "cpu"
    dtype: DType = "fp32"
    threads: int = 0
    workspace: Workspace | None = None
    streams: int = 1


class Workspace:
    """One block of device memory for the activations of engines that never run at the same time.

    It grows to the largest size asked for, so an engine asks for its place again before each run.
    """

    def __init__(self, device: str) -> None:
        self._device, self._block = device, None

    def reserve(self, num_bytes: int) -> Tensor:
        """The block, of at least `num_bytes` bytes. Shapes: (bytes,), uint8."""
        import torch

        if self._block is None or self._block.numel() < num_bytes:
            self._block = torch.empty(max(num_bytes, 1), dtype=torch.uint8, device=self._device)
        return self._block


class Binding(Protocol):
    """An engine with its tensors in place.

    One whose `run` a CUDA graph of the caller's may capture has a method `capturable`, which says whether it can now.
    """

    def run(self) -> None:
        """Compute every output from the inputs' present contents; on a GPU, in torch's current stream.

        Allocates nothing that the caller sees.
        """
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


class Backend(Protocol):
    """What a backend's module offers."""

    NAME: str
    SOURCE: Literal["onnx", "program"]  # what `build` starts from: ONNX files, or programs of torch.export
    TYPED: bool  # whether reduced precision is in the graph's own types; else the backend lowers a float32 graph
    DTYPES: Mapping[str, tuple[DType, ...]]  # device -> arithmetic it can be asked for there

    def support(self, device: str) -> Support:
        """What can be done here. Never raises."""
        ...

    def version(self) -> str:
        """The installed version. Raises: `BackendUnavailable`, saying what to install."""
        ...

    def check_targets(self, compute_capability: Sequence[str]) -> None:
        """Raise `ValueError` for GPUs that engines cannot be built for here."""
        ...

    def build(self, graphs: Mapping[str, Any], folder: Path, options: BuildOptions) -> dict[str, str]:
        """Turn graphs, by role, into engine files in `folder`, and remove what only the build needed.

        `graphs` are ONNX files in `folder` beside their weights, or `inductor.Program`s, as `SOURCE` says;
        the graphs of one call may share weights. Returns the name of each role's file.

        Raises: `BackendUnavailable`; `ValueError` with one line for a graph that does not build.
        """
        ...

    def describe(self, path: Path) -> Any:
        """What is known of an engine file without loading it, as a dataclass of plain values.

        Raises: `BackendUnavailable`; `ValueError` with one line for a file that cannot be read.
        """
        ...

    def load(self, path: Path, options: LoadOptions = LoadOptions()) -> Engine:
        """An engine from a file of a checked bundle.

        Raises: `BackendUnavailable`; `ValueError` with one line for a file that does not load.
        """
        ...


def backend(name: str) -> Backend:
    """A backend by its name.

    Raises: `BackendUnavailable` for a name that this version does not have.
    """
    if name not in BACKENDS:
        raise BackendUnavailable(f"expected a backend of this version ({', '.join(BACKENDS)}), got {name!r}")
    return cast(Backend, importlib.import_module(f"fastcache_engines.{BACKENDS[name]}"))


def preference(device: str) -> tuple[tuple[str, ...], str]:
    """The backends of a device, the fastest first, and what that order rests on."""
    if device == "cuda":
        return ("tensorrt", "inductor", "onnxruntime", "tensorrt-rtx"), "the order expected on a GPU"
    if fast_bf16():
        order = ("openvino", "onnxruntime", "inductor")
        return order, "OpenVINO measured fastest on processors with AVX512-BF16 or AMX"
    order = ("onnxruntime", "openvino", "inductor")
    return order, "ONNX Runtime is the default on processors without AVX512-BF16 and AMX"


def choose(device: str, dtype: DType) -> tuple[str, str]:
    """The backend that `auto` means on a device for a dtype, and why.

    Raises: `BackendUnavailable` saying what each one lacks.
    """
    device_here(device)
    order, reason = preference(device)
    lacking: list[str] = []
    for name in order:
        module = backend(name)
        if dtype not in module.DTYPES.get(device, ()):
            lacking.append(f"{name} has no {dtype} there")
        elif not (support := module.support(device)).can_build or not support.can_run:
            lacking.append(f"{name}: {support.reason}")
        else:
            passed = f"; passed over: {', '.join(lacking)}" if lacking else ""
            return name, f"{reason}{passed}"
    raise BackendUnavailable(f"no backend for {dtype} on {device}: {'; '.join(lacking)}")


def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones (AVX512-BF16 or AMX)."""
    import torch

    cpu: Any = torch.cpu  # its public get_capabilities is younger than the oldest torch that will do
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


def free_size(name: str, axis: int) -> str:
    """What a free size is called where the engine file does not keep its name: the batch, or one of its own."""
    return "batch" if axis == 0 else f"{name}[{axis}]"


def refuse_targets(compute_capability: Sequence[str]) -> None:
    """`check_targets` of a backend that builds for the machine at hand."""
    if compute_capability:
        raise ValueError(
            "expected no compute capability, for this backend builds for the machine at hand, got "
            f"{', '.join(compute_capability)}; use tensorrt-rtx"
        )


def device_here(device: str) -> str:
    """The machine at hand as bundles name it: `cpu-x86_64`, `cuda-sm90`.

    Raises: `BackendUnavailable` for a GPU where PyTorch finds none.
    """
    import torch

    if device == "cpu":
        return f"cpu-{platform.machine()}"
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "PyTorch finds no CUDA GPU; install an NVIDIA driver and a CUDA build of PyTorch, or use device cpu"
        )
    return "cuda-sm{}{}".format(*torch.cuda.get_device_capability())


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
