"""An ONNX file -> an engine of ONNX Runtime whose graph TensorRT compiles, through the TensorRT execution provider.

TensorRT's own plans are made when an engine is first loaded on a machine and kept in the user's cache folder: they
belong to the GPU, the driver and the TensorRT at hand, not to the bundle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastcache_engines import onnxruntime as plain
from fastcache_engines.machine import device_kind, torch_device
from fastcache_engines.onnx_files import read_graph
from fastcache_engines.protocol import BuildOptions, Capabilities, LoadOptions, Support
from fastcache_engines.registry import refuse_evaluate, refuse_targets

CAPABILITIES = Capabilities(
    name="onnxruntime-tensorrt",
    source="onnx",
    dtypes={"cuda": ("fp16",)},  # its fp32 would be TF32, which this provider has no switch for (onnxruntime#26029)
    free_tokens=True,
)

version, describe = plain.version, plain.describe
check_targets, evaluate = refuse_targets, refuse_evaluate
_PROVIDER = "TensorrtExecutionProvider"
_SHAPES = "fastcache.shapes"  # in an ONNX file's metadata


def support(device: str) -> Support:
    if device_kind(device) != "cuda":
        return Support(None, False, False, "TensorRT runs on NVIDIA GPUs only; use openvino or onnxruntime")
    return plain.provider_support(_PROVIDER, device)


def build(graphs: Mapping[str, Path], folder: Path, options: BuildOptions) -> dict[str, str]:
    """The ONNX files are the engines; each is told the least, usual and largest sizes of its inputs.

    Without them TensorRT would build for the sizes it has seen, and anew for others: under graphs that are captured.

    Raises: `ValueError` for a free size, beside the first, that the options do not give.
    """
    import onnx

    for path in graphs.values():
        model = read_graph(path)
        told = model.metadata_props.add()
        told.key, told.value = _SHAPES, json.dumps(_shapes(model.graph.input, path.name, options))
        onnx.save(model, str(path))
    return {role: path.name for role, path in graphs.items()}


def _shapes(inputs: Iterable[Any], graph: str, options: BuildOptions) -> list[str]:
    """The least, the usual and the largest sizes of all inputs, each as TensorRT's provider reads them."""
    found: tuple[list[str], ...] = ([], [], [])
    for value in inputs:
        first, *others = value.type.tensor_type.shape.dim
        own = [size.dim_value for size in others]
        if not all(own) and value.name not in options.shapes:
            raise ValueError(f"expected {graph} to have no free size but its inputs' first, got {value.name}")
        shapes = options.shapes.get(value.name, (own,) * 3)
        for lines, rows, sizes in zip(found, options.rows, shapes, strict=True):
            lines.append(f"{value.name}:{'x'.join(map(str, (first.dim_value or rows, *sizes)))}")
    return [",".join(lines) for lines in found]


def load(path: Path, options: LoadOptions = LoadOptions()) -> plain.OnnxRuntimeEngine:
    """An engine from an ONNX file.

    Raises: `BackendUnavailable`; `ValueError` for weights outside the graph's folder or a graph that does not load.
    """
    support(options.device).require()
    stream = torch.cuda.Stream(torch_device(options.device))
    own, rest = plain.on_gpu(options.device, stream), plain.cuda_settings(options, stream)
    return plain.OnnxRuntimeEngine(
        path, options, [(_PROVIDER, _settings(path) | own), ("CUDAExecutionProvider", rest)], stream
    )


def _settings(path: Path) -> dict[str, Any]:
    """The provider's options; the folder of plans is named after the graph's bytes and place.

    Raises: `ValueError` for a graph that is not told its inputs' sizes.
    """
    import onnx
    import platformdirs

    model = read_graph(path)
    told = next((entry.value for entry in model.metadata_props if entry.key == _SHAPES), None)
    if told is None:
        raise ValueError(f"expected {path.name} to say its inputs' sizes, got a graph that does not; build it again")
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    identity = hashlib.sha256(path.read_bytes() + str(path.resolve()).encode()).hexdigest()[:16]
    cache = platformdirs.user_cache_path("fastcache", ensure_exists=True) / CAPABILITIES.name / identity
    cache.mkdir(parents=True, exist_ok=True)
    least, usual, largest = json.loads(told)
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache.parent),
        "trt_cuda_graph_enable": "1",
        "trt_fp16_enable": "1" if half else "0",
        "trt_layer_norm_fp32_fallback": "1",
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": usual,
        "trt_profile_max_shapes": largest,
    }
