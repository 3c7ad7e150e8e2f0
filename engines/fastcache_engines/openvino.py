"""An ONNX file -> an engine of OpenVINO on the CPU, in float32 or bfloat16, bound to torch tensors without copies.

The graph is compiled when tensors are bound to it, from weights that are mapped from the file. What was compiled is
kept for other processes, for each shape (`openvino_kept.py`), where that pays: of graphs with 8-bit layers, and of
those below 256 MiB. SD1.5's 8-bit passes compile in 6.5 s and are imported in 4.4 s, from 0.9 GiB; the bundled model's
graphs compile in 3.6 s of a core and are imported in 1.3 s. In float SD1.5's compile in 1.1 s, and 3.4 GB of them are
imported no sooner. OpenVINO takes a damaged blob without a word: entries are hashed.

Shapes are compiled for themselves: with sizes known OpenVINO fuses more and decides less at run time. The bundled
model's steps take 11 to 25% less time, SD1.5's at 256x256 1 to 2% less (interleaved medians, two threads). As each
compilation holds the weights once more, those after the first are made while they stay below 256 MiB together, and all
further shapes share one for free sizes.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastcache_engines import onnx_files, openvino_kept
from fastcache_engines.machine import BackendUnavailable, device_kind, fast_bf16
from fastcache_engines.onnx_files import refuse_outside_weights
from fastcache_engines.openvino_kept import Compiled, Shapes
from fastcache_engines.openvino_kept import openvino as _openvino
from fastcache_engines.protocol import BuildOptions, Capabilities, LoadOptions, Support
from fastcache_engines.registry import refuse_targets
from fastcache_engines.tensors import TensorSpec, agreed, check_tensors, free_size

CAPABILITIES = Capabilities(
    name="openvino",
    source="onnx",
    dtypes={"cpu": ("fp32", "bf16")},
    typed=False,  # OpenVINO lowers a float32 graph itself, and knows what must stay in float32
    concurrent=("cpu",),
    free_tokens=True,
    layers=True,
    quantized=True,
    conditions=True,
)

describe, check_targets = onnx_files.describe, refuse_targets

_NO_BF16 = "no bf16, which this processor lacks: engines in bf16 compute fp32 here"
_OWN_BYTES = 256 << 20  # of weights, in compilations for shapes after the first

_PRECISION = {"fp32": "f32", "bf16": "bf16"}
_ROUNDING: Final = "FakeQuantize"  # what an 8-bit layer's input goes through
_DTYPES: Mapping[str, str] = {"f32": "float32", "i64": "int64", "i32": "int32", "boolean": "bool"}


def version() -> str:
    """The installed version.

    Raises: `BackendUnavailable` where OpenVINO is not installed.
    """
    return _openvino().__version__.split("-")[0]


def support(device: str) -> Support:
    try:
        found = version()
    except BackendUnavailable as error:
        return Support(None, False, False, str(error))
    if device_kind(device) != "cpu":
        return Support(found, False, False, "OpenVINO runs on CPUs here; use tensorrt, inductor or onnxruntime")
    speed = "bf16 at the processor's own speed" if fast_bf16() else "bf16 without the processor's help (slow)"
    return Support(found, True, True, f"ready, on the CPU in fp32, and {speed if _has_bf16() else _NO_BF16}")


def _has_bf16() -> bool:
    """Whether OpenVINO computes bfloat16 on this processor; where it does not, it takes float32 without a word."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def build(graphs: Mapping[str, Path], folder: Path, options: BuildOptions) -> dict[str, str]:
    """The ONNX files as they are."""
    if options.dtype == "bf16" and not _has_bf16():
        options.progress(f"OpenVINO: {_NO_BF16}")
    return onnx_files.keep_graphs(graphs, folder, options)


def load(path: Path, options: LoadOptions = LoadOptions()) -> OpenVinoEngine:
    """An engine from an ONNX file.

    Raises: `BackendUnavailable`; `ValueError` for weights outside the graph's folder or a graph that does not load.
    """
    return OpenVinoEngine(path, options)


def evaluate(path: Path, inputs: Mapping[str, Tensor], options: LoadOptions = LoadOptions()) -> dict[str, Tensor]:
    """Every output of a graph, in new tensors: for comparing, not for speed.

    Raises: as `load`.
    """
    return OpenVinoEngine(path, options).run_once(inputs)


class OpenVinoEngine:
    """One ONNX graph compiled by OpenVINO's CPU plugin."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, path: Path, options: LoadOptions) -> None:
        refuse_outside_weights(path)
        self._name, self._core = path.name, _openvino().Core()
        threads = options.threads or torch.get_num_threads()
        self._settings: dict[str, Any] = {
            **({"PERFORMANCE_HINT": "LATENCY"} if options.streams == 1 else {"NUM_STREAMS": options.streams}),
            "INFERENCE_PRECISION_HINT": _PRECISION[options.dtype],
            "INFERENCE_NUM_THREADS": threads,
            # It pins threads to the machine's first cores, whoever else is there. Two threads on four cores, beside
            # other programs, then took 1.3 times the median of a full step and 7 times its 90th percentile.
            "ENABLE_CPU_PINNING": threads >= _cores(),
        }
        with self._loading():
            self._graph = self._core.read_model(path)
        self.inputs = agreed(path.name, [_spec(port) for port in self._graph.inputs], options.inputs)
        self.outputs = agreed(path.name, [_spec(port) for port in self._graph.outputs], options.outputs)
        operations = self._graph.get_ops()
        self._weights_bytes: int = sum(op.get_byte_size() for op in operations if op.get_type_name() == "Constant")
        is_quick = self._weights_bytes > _OWN_BYTES and all(op.get_type_name() != _ROUNDING for op in operations)
        self._identity = "" if is_quick else options.identity
        self._streams = options.streams
        self._own: dict[Shapes, Compiled] = {}

    def bind(self, tensors: Mapping[str, Tensor]) -> OpenVinoBinding:
        """Bind by address: the graph reads and writes the tensors themselves.

        Raises: `ValueError` for tensors that do not fit, or a graph that OpenVINO cannot compile.
        """
        specs = (*self.inputs, *self.outputs)
        check_tensors(specs, tensors, "cpu")
        return OpenVinoBinding(self._compiled_for(tensors), [(s.name, tensors[s.name]) for s in specs])

    def run_once(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output of the graph for these inputs, in new tensors."""
        results = self._compiled_for(tensors).graph({name: tensor.numpy() for name, tensor in tensors.items()})
        return {name: torch.from_numpy(value) for port, value in results.items() for name in port.get_names()}

    def _compiled_for(self, tensors: Mapping[str, Tensor]) -> Compiled:
        """The compiled graph that takes inputs of these tensors' shapes."""
        shapes = tuple((spec.name, tuple(tensors[spec.name].shape)) for spec in self.inputs)
        if shapes not in self._own:
            if len(self._own) * self._weights_bytes > _OWN_BYTES:
                return self._for_free_sizes
            kept = openvino_kept.imported(self._identity, shapes, self._settings) if self._identity else None
            self._own[shapes] = kept or self._compile(shapes)
            if self._identity and self._streams == 1 and len(self._own) == 1:
                openvino_kept.note(self._identity, shapes, self._settings)
        return self._own[shapes]

    def _compile(self, shapes: Shapes) -> Compiled:
        graph = self._graph.clone()
        with self._loading():
            graph.reshape({name: list(shape) for name, shape in shapes})
            made = self._core.compile_model(graph, "CPU", self._settings)
            if self._identity:
                openvino_kept.keep(self._identity, shapes, self._settings, made)
        return Compiled(made)

    @cached_property
    def _for_free_sizes(self) -> Compiled:
        with self._loading():
            return Compiled(self._core.compile_model(self._graph, "CPU", self._settings))

    @contextmanager
    def _loading(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ValueError(f"OpenVINO cannot load {self._name}: {lines[-1] if lines else 'no message'}") from error


class OpenVinoBinding:
    """An inference request, and the graph and the tensors that it works on, which it keeps alive."""

    def __init__(self, compiled: Compiled, tensors: list[tuple[str, Tensor]]) -> None:
        self._compiled, self._tensors = compiled, tensors
        self._request = compiled.graph.create_infer_request()
        for name, tensor in tensors:
            self._request.set_tensor(name, _openvino().Tensor(tensor.numpy(), shared_memory=True))

    def capturable(self) -> bool:
        return False

    def run(self) -> None:
        self._request.infer(share_outputs=True)  # else it copies every output into a new array


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spec(port: Any) -> TensorSpec:
    kind: str = port.element_type.to_string()
    name: str = port.any_name
    sizes = enumerate(port.partial_shape)
    shape = tuple(size.get_length() if size.is_static else free_size(name, axis) for axis, size in sizes)
    return TensorSpec(name, _DTYPES.get(kind, kind), shape)
