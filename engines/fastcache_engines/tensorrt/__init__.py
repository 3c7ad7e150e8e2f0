"""An ONNX file -> an engine of NVIDIA TensorRT, for the GPU at hand.

Kernels are chosen by timing them, so engines are built where they will run. What was timed is kept in the user's cache
folder. Needs TensorRT 10 or 11; the precision of either is in the graph's own types.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastcache_engines.machine import BackendUnavailable, Gpu, device_kind, gpu
from fastcache_engines.protocol import BuildOptions, Capabilities, LoadOptions, Support
from fastcache_engines.registry import refuse_evaluate, refuse_targets
from fastcache_engines.tensorrt.builder import build_engines
from fastcache_engines.tensorrt.library import (
    CPU,
    EngineFacts,
    Package,
    cache_path,
    describe_engine,
    read_cache,
    require_valid,
    write_cache,
)
from fastcache_engines.tensorrt.run import Contexts, TensorRTEngine

CAPABILITIES = Capabilities(
    name="tensorrt",
    source="onnx",
    dtypes={"cuda": ("fp32", "fp16", "bf16")},
    captured=True,
    free_tokens=True,
)

_PACKAGE = Package(CAPABILITIES.name, "tensorrt", "TensorRT")
_NO_GPU = "TensorRT builds and runs on the GPU at hand, and PyTorch finds none; use tensorrt-rtx to build without one"

version, check_targets, evaluate = _PACKAGE.version, refuse_targets, refuse_evaluate


def support(device: str) -> Support:
    """What can be done here. Never raises."""
    if device_kind(device) != "cuda":
        return CPU
    try:
        found = version()
    except BackendUnavailable as error:
        return Support(None, False, False, str(error))
    here = gpu(device)
    if here is None:
        return Support(found, False, False, _NO_GPU)
    return Support(found, True, True, f"ready, on {here.name}")


def build(graphs: Mapping[str, Path], folder: Path, options: BuildOptions) -> dict[str, str]:
    """Build each role's engine for the GPU at hand.

    Raises: `BackendUnavailable`; `ValueError` for compute capabilities, or a graph that does not build.
    """
    _PACKAGE.library()
    check_targets(options.compute_capability)
    here = _here(options.device)
    timed = partial(_timing_cache, here, options.progress)
    return build_engines(_PACKAGE, graphs, folder, options, [here.compute_capability], timed)


def load(path: Path, options: LoadOptions = LoadOptions()) -> TensorRTEngine:
    """An engine from a file of a checked bundle.

    Raises: `BackendUnavailable`; `ValueError` for a file of another version or GPU.
    """
    require_valid(describe(path), path)
    _PACKAGE.require(options.device)
    _here(options.device)
    return TensorRTEngine(_PACKAGE, path, options, _contexts)


def describe(path: Path) -> EngineFacts:
    """What is known of an engine file without loading it.

    Raises: `BackendUnavailable`; `ValueError` where its facts are missing.
    """
    return describe_engine(_PACKAGE, path)


def _here(device: str) -> Gpu:
    here = gpu(device)
    if here is None:
        raise BackendUnavailable(_NO_GPU)
    return here


def _contexts(engine: Any) -> Contexts:
    strategy = _PACKAGE.library().ExecutionContextAllocationStrategy.USER_MANAGED
    return partial(engine.create_execution_context, strategy)


@contextmanager
def _timing_cache(here: Gpu, progress: Callable[[str], None], config: Any) -> Generator[None]:
    """Use what was timed before on such a GPU, and keep what is timed now; a cache that is of no use is passed over."""
    path = cache_path("tensorrt", version(), here.name)
    cache = config.create_timing_cache(read_cache(path))
    if cache is None or not config.set_timing_cache(cache, False):
        progress(f"TensorRT's timing cache {path.name} is broken or of another machine; timing everything again")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    yield
    try:
        write_cache(path, bytes(cache.serialize()))
    except OSError as error:
        progress(f"TensorRT's timing cache was not kept: {error}")
