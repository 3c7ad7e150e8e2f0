"""A package on disk and its weights -> an engine bound to torch tensors; on a GPU, one CUDA graph a binding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastcache_engines.inductor.capture import capture, capture_stream
from fastcache_engines.inductor.loader import PackageLoader
from fastcache_engines.inductor.packages import stamp, unpacking
from fastcache_engines.inductor.weights import (
    Package,
    Weights,
    compute_capability,
    features,
    find_packages,
    load_weights,
    reason_of,
)
from fastcache_engines.machine import BackendUnavailable, ieee_float32, torch_device
from fastcache_engines.protocol import LoadOptions
from fastcache_engines.tensors import TensorSpec, agreed, check_tensors


def _refuse_foreign(path: Path, package: Package, device: torch.device) -> None:
    """Machine code built for another torch or machine would crash, or compute something else."""
    kind = device.type
    if package.device != kind:
        raise ValueError(f"{path.name} was built for {package.device}, got {kind} to load it on; build for {kind}")
    lacking = sorted(name for name, value in package.features.items() if features().get(name) != value)
    here = compute_capability(str(device))
    for needed, found, fits in (
        (f"torch {package.torch}", f"torch {torch.__version__}", package.torch == torch.__version__),
        (f"a processor with {package.isa}", f"one without {', '.join(lacking)}", not lacking),
        (f"compute capability {package.compute_capability}", here, package.compute_capability == here),
    ):
        if not fits:
            raise ValueError(f"{path.name} was built for {needed}, got {found}; build again on this machine")


class _Loaded:
    """One package, and the constants that it shares with others."""

    def __init__(self, path: Path, package: Package, weights: Path, device: torch.device) -> None:
        _refuse_foreign(path, package, device)
        try:
            with unpacking(path):
                self.loader = PackageLoader(path, device.index if device.type == "cuda" else -1)
            self.weights = load_weights(weights, device)
            self.loader.load_constants(self.weights.constants(package))
        except BackendUnavailable:
            raise
        except Exception as error:  # what torch, safetensors and a map that does not fit raise
            raise ValueError(f"AOTInductor cannot load {path.name}: {reason_of(error)}") from error


class InductorEngine:
    """A package, and those of the same program at other sizes, each loaded when it is first bound."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, path: Path, options: LoadOptions) -> None:
        self._path, self._options, self._device = path, options, torch_device(options.device)
        self._packages, self._weights = find_packages(path)
        first = self._packages[path.stem]
        self._loaded = {path.stem: _Loaded(path, first, self._weights, self._device)}
        self._stamps = {name: stamp(path.with_name(f"{name}.pt2")) for name in self._packages}
        self.inputs = agreed(path.name, first.inputs, options.inputs)
        self.outputs = agreed(path.name, first.outputs, options.outputs)

    def bind(self, tensors: Mapping[str, Tensor]) -> InductorBinding:
        """Fix the tensors. On a GPU this captures a CUDA graph that reads and writes them."""
        fitting = (name for name, package in self._packages.items() if _takes(package, tensors))
        name = next(fitting, self._path.stem)
        package = self._packages[name]
        check_tensors((*package.inputs, *package.outputs), tensors, self._device)
        rows = next((tensors[s.name].shape[0] for s in package.inputs if "batch" in s.shape[:1]), 1)
        most = package.max_rows
        if rows < 1 or (most is not None and rows > most):
            raise ValueError(f"expected 1 to {most} rows to bind, got {rows}")
        if name not in self._loaded:
            path = self._path.with_name(f"{name}.pt2")
            if stamp(path) != self._stamps[name]:
                raise ValueError(f"expected {path.name} as it was checked, got another; load the bundle again")
            self._loaded[name] = _Loaded(path, package, self._weights, self._device)
        call = _Call(
            self._loaded[name].loader,
            self._loaded[name].weights,
            [tensors[name] for name in package.arguments],
            [tensors[spec.name] for spec in package.outputs],
        )
        return InductorBinding(call, self._options, self._device)


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

    loader: PackageLoader
    weights: Weights
    arguments: Sequence[Tensor]
    outputs: Sequence[Tensor]

    def __call__(self) -> None:
        with torch.inference_mode():
            for output, result in zip(self.outputs, self.loader.run(list(self.arguments)), strict=True):
                output.copy_(result)

    def on_own_tensors(self) -> _Call:
        """The same on zeros, for the tensors may hold anything yet: a token out of range ends CUDA's context."""
        arguments = [torch.zeros_like(tensor) for tensor in self.arguments]
        return replace(self, arguments=arguments, outputs=[torch.empty_like(tensor) for tensor in self.outputs])


class InductorBinding:
    """A call, or on a GPU the graph captured from it: one launch, at fixed addresses."""

    def __init__(self, call: _Call, options: LoadOptions, device: torch.device) -> None:
        self._call, self._threads, self._device, self._graph = call, options.threads, device, None
        if device.type == "cuda":
            call.weights.note_reader(capture_stream(device))
            self._graph = capture(call, call.on_own_tensors, device, options.workspace)

    def capturable(self) -> bool:
        return self._graph is not None

    def run(self) -> None:
        if self._graph is not None:
            self._run_on_gpu(self._graph)
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

    def _run_on_gpu(self, graph: torch.cuda.CUDAGraph) -> None:
        self._call.weights.note_reader(torch.cuda.current_stream(self._device))
        if not torch.cuda.is_current_stream_capturing():
            graph.replay()
            return
        with ieee_float32():  # into a capture of the caller's go the kernels: no graph can be launched there
            self._call()
