"""An ONNX file -> an engine of ONNX Runtime whose graph TensorRT compiles, through the TensorRT execution provider.

TensorRT's own plans are made when an engine is first loaded on a machine and kept in the user's cache folder: they
belong to the GPU, the driver and the TensorRT at hand, not to the bundle.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from fastcache_engines import onnxruntime as plain
from fastcache_engines.machine import device_kind, torch_device
from fastcache_engines.protocol import Capabilities, LoadOptions, Support
from fastcache_engines.registry import refuse_evaluate, refuse_targets

CAPABILITIES = Capabilities(
    name="onnxruntime-tensorrt",
    source="onnx",
    dtypes={"cuda": ("fp32", "fp16")},
    free_tokens=True,
)

version, build, describe = plain.version, plain.build, plain.describe
check_targets, evaluate = refuse_targets, refuse_evaluate
_PROVIDER = "TensorrtExecutionProvider"


def support(device: str) -> Support:
    if device_kind(device) != "cuda":
        return Support(None, False, False, "TensorRT runs on NVIDIA GPUs only; use openvino or onnxruntime")
    return plain.provider_support(_PROVIDER, device)


def load(path: Path, options: LoadOptions = LoadOptions()) -> plain.OnnxRuntimeEngine:
    """An engine from an ONNX file.

    Raises: `BackendUnavailable`; `ValueError` for weights outside the graph's folder or a graph that does not load.
    """
    plain.require(support(options.device))
    stream = torch.cuda.Stream(torch_device(options.device))
    own = plain.on_gpu(options.device, stream)
    return plain.OnnxRuntimeEngine(
        path, options, [(_PROVIDER, _settings(path) | own), ("CUDAExecutionProvider", own)], stream
    )


def _settings(path: Path) -> dict[str, Any]:
    """The provider's options; the folder of plans is named after the graph's bytes and place."""
    import platformdirs

    identity = hashlib.sha256(path.read_bytes() + str(path.resolve()).encode()).hexdigest()[:16]
    cache = platformdirs.user_cache_path("fastcache", ensure_exists=True) / "onnxruntime-tensorrt" / identity
    cache.mkdir(parents=True, exist_ok=True)
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache.parent),
        "trt_cuda_graph_enable": "1",
        "trt_fp16_enable": "1" if _is_half(path) else "0",
        "trt_layer_norm_fp32_fallback": "1",
    }


def _is_half(path: Path) -> bool:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
