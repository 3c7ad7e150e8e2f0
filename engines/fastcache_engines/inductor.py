"""A program of torch.export -> an engine compiled ahead of time by torch's own AOTInductor, for CPUs and NVIDIA GPUs.

A build writes one package for each role and one file of weights for all of them, equal tensors once; engines that are
alive together hold one copy of it in memory. Needs nothing but torch, and to build a C++ compiler and on a GPU Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastcache_engines import (
    BackendUnavailable,
    BuildOptions,
    DType,
    LoadOptions,
    Support,
    TensorSpec,
    Workspace,
    check_tensors,
    refuse_targets,
)
from fastcache_engines._inductor_weights import (
    Package,
    Weights,
    compute_capability,
    features,
    find_package,
    find_packages,
    load_weights,
    reason_of,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NAME = "inductor"
SOURCE: Literal["program"] = "program"
TYPED = True
DTYPES: Mapping[str, tuple[DType, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")}

_NO_GPU = "PyTorch finds no CUDA GPU; install an NVIDIA driver and a CUDA build of PyTorch"
_WARM_UP_RUNS = 3  # as torch.cuda.make_graphed_callables has it


@dataclass(frozen=True)
class Program:
    """A program called as `module(inputs={name: tensor})`, and the names of its inputs and outputs.

    `others` are the same program at other sizes of its inputs, beside the first, which is free.
    """

    exported: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    others: tuple[ExportedProgram, ...] = ()


def version() -> str:
    """The version of torch, to which packages are bound."""
    return torch.__version__


check_targets = refuse_targets


def support(device: str) -> Support:
    """Building needs a C++ compiler, and Triton on a GPU; running needs neither."""
    if device == "cuda" and not torch.cuda.is_available():
        return Support(version(), False, False, _NO_GPU)
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return Support(version(), False, True, "AOTInductor builds for GPUs with Triton; run: pip install triton")
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception:  # a compiler that is missing, one that fails and one that may not run: no common base class
        reason = "AOTInductor builds with a C++ compiler; install g++, or name one in the environment variable CXX"
        return Support(version(), False, True, reason)
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU in fp32 and bf16"
    return Support(version(), True, True, f"ready, on {where}")


def build(graphs: Mapping[str, Program], folder: Path, options: BuildOptions) -> dict[str, str]:
    """Compile programs into `ROLE.pt2` each and one `FIRST_ROLE.weights.safetensors`; others of theirs beside them.

    These are `ROLE.1.pt2`, `ROLE.2.pt2` and so on, and an engine loads each when it is first bound to that size.

    For a GPU, programs that were exported on the CPU are moved there, in place.

    Raises: `BackendUnavailable`; `ValueError` for a GPU other than the one at hand, or a program that does not build.
    """
    found = support(options.device)
    if not found.can_build:
        raise BackendUnavailable(found.reason)
    here = compute_capability(options.device)
    if set(options.compute_capability) - {here}:
        raise ValueError(
            f"expected to build for the device at hand (compute capability {here}), got "
            f"{', '.join(options.compute_capability)}; AOTInductor builds for no other: build on that GPU"
        )
    from fastcache_engines import _inductor_build

    return _inductor_build.build(graphs, folder, options)


@dataclass(frozen=True)
class PackageFacts:
    """What the file of weights says of a package: for which torch, device, vector instructions or GPU, and how much."""

    torch: str
    device: str
    isa: str
    compute_capability: str | None
    max_rows: int | None
    constants: int


def describe(path: Path) -> PackageFacts:
    """What is known of a package without loading it.

    Raises: `ValueError` where its weights' description is missing or damaged.
    """
    package, _ = find_package(path)
    capability, constants = package.compute_capability, len(package.constants)
    return PackageFacts(package.torch, package.device, package.isa, capability, package.max_rows, constants)


def load(path: Path, options: LoadOptions = LoadOptions()) -> InductorEngine:
    """An engine from a package and the weights beside it.

    A package holds a shared library, whose code runs as soon as it is loaded, and torch's loader notices no changed
    byte of it: only for files whose hashes were checked.
    `options.threads`, where it is not 0, is set as torch's number of threads while the engine runs.

    Raises: `BackendUnavailable`; `ValueError` for files that are missing, damaged, or built for another torch, device,
    processor or GPU.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(_NO_GPU)
    return InductorEngine(path, options)


def _refuse_foreign(path: Path, package: Package, device: str) -> None:
    """Machine code built for another torch or machine would crash, or compute something else."""
    if package.device != device:
        raise ValueError(f"{path.name} was built for {package.device}, got {device} to load it on; build for {device}")
    lacking = sorted(name for name, value in package.features.items() if features().get(name) != value)
    here = compute_capability(device)
    for needed, found, fits in (
        (f"torch {package.torch}", f"torch {version()}", package.torch == version()),
        (f"a processor with {package.isa}", f"one without {', '.join(lacking)}", not lacking),
        (f"compute capability {package.compute_capability}", here, package.compute_capability == here),
    ):
        if not fits:
            raise ValueError(f"{path.name} was built for {needed}, got {found}; build again on this machine")


class _Loaded:
    """One package, and the constants that it shares with others."""

    def __init__(self, path: Path, options: LoadOptions) -> None:
        from torch._C import _aoti  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs leave it out)

        self.package, file = find_package(path)
        _refuse_foreign(path, self.package, options.device)
        try:
            # True: without locks and events between threads, which no graph capture allows.
            self.loader = _aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
            self.weights = load_weights(file, options.device)
            # Not into the inactive buffer; all of them, or an error; no copies.
            self.loader.load_constants(self.weights.constants(self.package), False, True, True)
        except Exception as error:  # what torch, safetensors and a map that does not fit raise
            raise ValueError(f"AOTInductor cannot load {path.name}: {reason_of(error)}") from error


class InductorEngine:
    """A package, and those of the same program at other sizes, each loaded when it is first bound."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, path: Path, options: LoadOptions) -> None:
        self._path, self._options = path, options
        first = _Loaded(path, options)
        self._loaded, self._packages = {path.stem: first}, find_packages(path)
        self.inputs, self.outputs = first.package.inputs, first.package.outputs

    def bind(self, tensors: Mapping[str, Tensor]) -> InductorBinding:
        """Fix the tensors. On a GPU this captures a CUDA graph that reads and writes them."""
        fitting = (name for name, package in self._packages.items() if _takes(package, tensors))
        name = next(fitting, self._path.stem)
        package = self._packages[name]
        check_tensors((*package.inputs, *package.outputs), tensors, self._options.device)
        rows = next((tensors[s.name].shape[0] for s in package.inputs if "batch" in s.shape[:1]), 1)
        most = package.max_rows
        if rows < 1 or (most is not None and rows > most):
            raise ValueError(f"expected 1 to {most} rows to bind, got {rows}")
        if name not in self._loaded:
            self._loaded[name] = _Loaded(self._path.with_name(f"{name}.pt2"), self._options)
        call = _Call(
            self._loaded[name].loader,
            self._loaded[name].weights,
            [tensors[name] for name in package.arguments],
            [tensors[spec.name] for spec in package.outputs],
        )
        return InductorBinding(call, self._options)


def _takes(package: Package, tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are of the sizes that a package was compiled for."""
    given = [(spec.shape, tensors[spec.name].shape) for spec in package.inputs if spec.name in tensors]
    return all(
        len(wanted) == len(sizes) and all(isinstance(w, str) or w == s for w, s in zip(wanted, sizes, strict=True))
        for wanted, sizes in given
    )


@dataclass(frozen=True)
class _Call:
    """A package, the tensors it reads and the tensors its results go to; all live as long as this."""

    loader: Any
    weights: Weights
    arguments: Sequence[Tensor]
    outputs: Sequence[Tensor]

    def __call__(self) -> None:
        with torch.inference_mode():
            for output, result in zip(self.outputs, self.loader.boxed_run(list(self.arguments)), strict=True):
                output.copy_(result)


class InductorBinding:
    """A call, or on a GPU the graph captured from it: one launch, at fixed addresses."""

    def __init__(self, call: _Call, options: LoadOptions) -> None:
        self._call, self._threads = call, options.threads
        self._graph = _capture(call, options.workspace) if options.device == "cuda" else None

    def capturable(self) -> bool:
        """Whether `run` may be captured in a CUDA graph of the caller's."""
        return self._graph is not None

    def run(self) -> None:
        if self._graph is not None:
            # Into a capture of the caller's go the kernels: no graph can be launched there.
            self._call() if torch.cuda.is_current_stream_capturing() else self._graph.replay()
            return
        before = torch.get_num_threads()
        if self._threads in (0, before):
            self._call()
            return
        torch.set_num_threads(self._threads)
        try:
            self._call()
        finally:
            torch.set_num_threads(before)


_pools: weakref.WeakKeyDictionary[Workspace, Any] = weakref.WeakKeyDictionary()


def _capture(call: _Call, workspace: Workspace | None) -> torch.cuda.CUDAGraph:
    """Capture a call; graphs of one workspace share the memory for what lies between inputs and outputs.

    That is safe for graphs that never run at the same time: none leaves anything there for a later run.
    """
    pool = None if workspace is None else _pools.setdefault(workspace, torch.cuda.graph_pool_handle())
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    # On zeros, for the tensors may hold anything yet, and a class label or token out of range ends CUDA's context.
    trial = dataclasses.replace(
        call,
        arguments=[torch.zeros_like(tensor) for tensor in call.arguments],
        outputs=[torch.empty_like(tensor) for tensor in call.outputs],
    )
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):
            trial()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for each stream it has seen, 32 MiB on Hopper."""
    return torch.cuda.Stream(device)
