"""What every backend speaks: graphs in, engines with named tensors out.

Knows nothing about diffusion: an engine is a compiled graph with named inputs and outputs. A caller binds its own
tensors once and then runs as often as it likes; the engine reads and writes those very tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fastcache_engines.dtypes import Device, DType
from fastcache_engines.machine import BackendUnavailable, device_kind
from fastcache_engines.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do wherever it runs; what it can do on one machine is `Support`.

    `source` is what it builds from: ONNX files, or programs of torch.export. `dtypes` are, by device, the arithmetic it
    can be asked for there; where it is `typed`, reduced precision is in the graph's own types, else the backend lowers
    a float32 graph. On the devices of `concurrent` one engine may be called from several threads at once. The others,
    all but `source`, `dtypes` and `typed`, are off unless a backend says so:

    `targets`: it builds for GPUs that are named, at hand or not. `captured`: a CUDA graph of the caller's can hold its
    runs. `shares_weights`: engines of one build that are alive together hold equal weights once. `free_tokens`: one
    engine runs several prompt lengths. `kernels`: a graph may hold operators of the caller's. `fused_attention`: a
    graph may hold ONNX Runtime's own attention. `layers`: `evaluate` gives every tensor of a graph, for comparing.
    `quantized`: on a CPU it computes a graph's 8-bit layers in 8 bits. `conditions`: on a CPU an `If` in a graph takes
    only the branch that is chosen, and a tensor may be both what it takes and what it gives.
    """

    name: str
    source: Literal["onnx", "program"]
    dtypes: Mapping[Device, tuple[DType, ...]]
    typed: bool = True
    concurrent: tuple[Device, ...] = ()
    targets: bool = False
    captured: bool = False
    shares_weights: bool = False
    free_tokens: bool = False
    kernels: bool = False
    fused_attention: bool = False
    layers: bool = False
    quantized: bool = False
    conditions: bool = False

    @property
    def named(self) -> tuple[str, ...]:
        """Those that are on, of all that are on or off."""
        return tuple(one.name for one in fields(self) if getattr(self, one.name) is True)

    def computes(self, device: str) -> tuple[DType, ...]:
        """The dtypes of a device; none of one that it does not run on."""
        return self.dtypes.get(device_kind(device), ())


@dataclass(frozen=True)
class Support:
    """What a backend can do on this machine for one device; `reason` says why not, or under which conditions."""

    version: str | None
    can_build: bool
    can_run: bool
    reason: str

    def require(self) -> None:
        """Raise `BackendUnavailable` where engines cannot run."""
        if not self.can_run:
            raise BackendUnavailable(self.reason)


@dataclass(frozen=True)
class Program:
    """A program called as `module(inputs={name: tensor})`, and the names of its inputs and outputs.

    `others` are the same program at other sizes of its inputs, beside the first, which is free.
    """

    exported: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    others: tuple[ExportedProgram, ...] = ()


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


@dataclass(frozen=True)
class LoadOptions:
    """How an engine is loaded: on which device, which may be one of several, as in `cuda:1`, and in which arithmetic.

    `threads` 0 means as many as torch uses; `workspace` is shared by its user's engines. On the devices that a backend
    calls concurrent, up to `streams` calls from several threads run at once, which share `threads`. `inputs` and
    `outputs` are what the caller knows of the file's tensors, with the names of free sizes; else the file is asked.
    `identity` is a name that no other content of the file has, from a caller that has checked it: what a backend
    compiles as it loads, it may keep under that name for other processes; without one it keeps nothing.
    """

    device: str = "cpu"
    dtype: DType = "fp32"
    threads: int = 0
    workspace: Workspace | None = None
    streams: int = 1
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    identity: str = ""


class Binding(Protocol):
    """An engine with its tensors in place."""

    def run(self) -> None:
        """Compute every output from the inputs' present contents; on a GPU, in torch's current stream.

        Allocates nothing that the caller sees.
        """
        ...

    def capturable(self) -> bool:
        """Whether torch's current stream could capture `run` in a CUDA graph of the caller's."""
        ...


class Engine(Protocol):
    """One compiled graph, loaded and ready."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def bind(self, tensors: Mapping[str, Tensor]) -> Binding:
        """Fix the tensors that inputs are read from and outputs are written to; others are ignored.

        Raises: `ValueError` for a missing tensor, or one of another dtype, shape, device or memory layout.
        """
        ...


class Backend(Protocol):
    """What a backend's module offers."""

    CAPABILITIES: Capabilities

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

        `graphs` are ONNX files in `folder` beside their weights, or `Program`s, as `Capabilities.source` says; the
        graphs of one call may share weights. Returns the name of each role's file.

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

        Raises: `BackendUnavailable`; `ValueError` with one line for a file that does not load, or has other tensors
        than the options say.
        """
        ...

    def evaluate(self, path: Path, inputs: Mapping[str, Tensor], options: LoadOptions = LoadOptions()) -> Any:
        """Every output of a graph on the CPU by name, in new tensors: for comparing, not for speed.

        Raises: as `load`; `BackendUnavailable` for a backend without `Capabilities.layers`.
        """
        ...
