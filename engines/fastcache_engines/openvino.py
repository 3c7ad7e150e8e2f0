"""An ONNX file -> an engine of OpenVINO on the CPU, in float32 or bfloat16, bound to torch tensors without copies.

The graph is compiled when tensors are bound to it, from weights that are mapped from the file. What was compiled is
kept for other processes, for each shape (`compiled.py`), where that pays: of graphs with 8-bit layers, and of those
below 256 MiB. SD1.5's 8-bit passes compile in 6.5 s and are imported in 4.4 s, from 0.9 GiB; the bundled model's graphs
compile in 3.6 s of a core and are imported in 1.3 s. In float SD1.5's compile in 1.1 s, and 3.4 GB of them are imported
no sooner. OpenVINO takes a damaged blob without a word: entries are hashed.

Shapes are compiled for themselves: with sizes known OpenVINO fuses more and decides less at run time. The bundled
model's steps take 11 to 25% less time, SD1.5's at 256x256 1 to 2% less (interleaved medians, two threads). As each
compilation holds the weights once more, those after the first are made while they stay below 256 MiB together, and all
further shapes share one for free sizes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fastcache_engines import compiled, onnx_files
from fastcache_engines.extras import install
from fastcache_engines.machine import BackendUnavailable, device_kind, fast_bf16
from fastcache_engines.onnx_files import refuse_outside_weights
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

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # by the inputs' names

_PRECISION = {"fp32": "f32", "bf16": "bf16"}
_ROUNDING: Final = "FakeQuantize"  # what an 8-bit layer's input goes through
_DTYPES: Mapping[str, str] = {"f32": "float32", "i64": "int64", "i32": "int32", "boolean": "bool"}
_TELEMETRY: Final = "openvino_telemetry"


def version() -> str:
    """The installed version.

    Raises: `BackendUnavailable` where OpenVINO is not installed.
    """
    return _openvino().__version__.split("-")[0]


def _openvino() -> Any:
    if importlib.util.find_spec("openvino") is None:
        raise BackendUnavailable(f"OpenVINO is not installed; run: {install('openvino')}")
    modules: dict[str, Any] = sys.modules
    if "openvino" not in modules:
        # It takes this for not installed, and so tells nobody of being imported, for which it would fork this process.
        modules.setdefault(_TELEMETRY, None)
    import openvino

    if modules.get(_TELEMETRY, openvino) is None:
        modules.pop(_TELEMETRY, None)
    return openvino


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
    graph = OpenVinoEngine(path, options).compiled_for(inputs)
    results = graph({name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(value) for port, value in results.items() for name in port.get_names()}


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
        is_kept = self._weights_bytes <= _OWN_BYTES or any(op.get_type_name() == _ROUNDING for op in operations)
        self._own: dict[_Shapes, Any] = {}
        self._mapped: list[Any] = []  # what compiled graphs that were kept read their weights from
        self._identity = options.identity if is_kept else ""

    def bind(self, tensors: Mapping[str, Tensor]) -> OpenVinoBinding:
        """Bind by address: the graph reads and writes the tensors themselves.

        Raises: `ValueError` for tensors that do not fit, or a graph that OpenVINO cannot compile.
        """
        specs = (*self.inputs, *self.outputs)
        check_tensors(specs, tensors, "cpu")
        graph = self.compiled_for(tensors)
        return OpenVinoBinding(graph.create_infer_request(), [(s.name, tensors[s.name]) for s in specs])

    def compiled_for(self, tensors: Mapping[str, Tensor]) -> Any:
        """The compiled graph that takes inputs of these tensors' shapes."""
        shapes = tuple((spec.name, tuple(tensors[spec.name].shape)) for spec in self.inputs)
        if shapes not in self._own:
            if len(self._own) * self._weights_bytes > _OWN_BYTES:
                return self._for_free_sizes
            self._own[shapes] = self._kept(shapes) or self._compile(shapes)
        return self._own[shapes]

    def _kept(self, shapes: _Shapes) -> Any:
        """What this or another process has compiled before, if anything."""
        key = self._key(shapes)
        blob = compiled.kept(key) if self._identity else None
        if blob is None:
            return None
        content = np.frombuffer(blob, np.uint8)
        try:
            made = self._core.import_model(_openvino().Tensor(content, shared_memory=True), "CPU", self._settings)
        except RuntimeError:
            compiled.drop(key)
            return None
        self._mapped.append(content)
        return made

    def _compile(self, shapes: _Shapes) -> Any:
        graph = self._graph.clone()
        with self._loading():
            graph.reshape({name: list(shape) for name, shape in shapes})
            made = self._core.compile_model(graph, "CPU", self._settings)
            if self._identity:
                compiled.keep(self._key(shapes), made.export_model().getvalue())
        return made

    def _key(self, shapes: _Shapes) -> tuple[str, ...]:
        """Whatever decides what OpenVINO makes of the graph."""
        found = _openvino().get_version()
        return CAPABILITIES.name, found, compiled.processor(), self._identity, repr(shapes), repr(self._settings)

    @cached_property
    def _for_free_sizes(self) -> Any:
        with self._loading():
            return self._core.compile_model(self._graph, "CPU", self._settings)

    @contextmanager
    def _loading(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ValueError(f"OpenVINO cannot load {self._name}: {lines[-1] if lines else 'no message'}") from error


class OpenVinoBinding:
    """An inference request and the tensors it works on, which it keeps alive."""

    def __init__(self, request: Any, tensors: list[tuple[str, Tensor]]) -> None:
        openvino = _openvino()
        self._request, self._tensors = request, tensors
        for name, tensor in tensors:
            request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))

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
