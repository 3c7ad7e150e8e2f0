"""An ONNX file -> an engine of NVIDIA TensorRT for RTX, for any RTX GPU, at hand or not.

An engine holds no kernels: they are compiled for the GPU when it is loaded, and kept in the user's cache folder. So it
is built on any machine, for the GPUs that `BuildOptions.compute_capability` names. Where that names none, it is for the
GPU at hand, and without one for all of Ampere and later (8.0, 8.6, 8.9, 12.0, 12.1), as the library builds by itself.
Turing (7.5) has to be named: TensorRT-RTX multiplies matrices there in float16 only, and refuses graphs that need more.

Source: NVIDIA's pages on CPU-only engines, the support matrix and CUDA graphs of TensorRT-RTX 1.7.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastcache_engines.machine import BackendUnavailable, Gpu, device_kind, gpu
from fastcache_engines.protocol import BuildOptions, Capabilities, LoadOptions, Support
from fastcache_engines.registry import refuse_evaluate
from fastcache_engines.tensorrt.builder import build_engines
from fastcache_engines.tensorrt.library import (
    CPU,
    EngineFacts,
    Package,
    Validity,
    cache_path,
    describe_engine,
    log_of,
    read_cache,
    require_valid,
    write_cache,
)
from fastcache_engines.tensorrt.run import TensorRTEngine

CAPABILITIES = Capabilities(
    name="tensorrt-rtx",
    source="onnx",
    dtypes={"cuda": ("fp32", "fp16", "bf16")},
    targets=True,
    captured=True,
    free_tokens=True,
)

_PACKAGE = Package(CAPABILITIES.name, "tensorrt_rtx", "TensorRT-RTX")
_TURING = "7.5"

version, evaluate = _PACKAGE.version, refuse_evaluate


def support(device: str) -> Support:
    """What can be done here. Never raises."""
    if device_kind(device) != "cuda":
        return CPU
    try:
        found, known = version(), list(_capabilities())
    except BackendUnavailable as error:
        return Support(None, False, False, str(error))
    here = gpu(device)
    if here is None:
        needed = "running them needs one, and PyTorch finds none"
        return Support(found, True, False, f"builds engines for GPUs of compute capability {_or(known)}; {needed}")
    if here.compute_capability not in known:
        return Support(found, True, False, _unsupported(here))
    return Support(found, True, True, f"ready, on {here.name}")


def check_targets(compute_capability: Sequence[str]) -> None:
    """Raise `ValueError` for a GPU that is not RTX."""
    known = _capabilities()
    if unknown := [capability for capability in compute_capability if capability not in known]:
        raise ValueError(
            f"expected compute capabilities that TensorRT-RTX builds for ({', '.join(known)}), "
            f"got {', '.join(unknown)}; use tensorrt or inductor on such a GPU"
        )


def build(graphs: Mapping[str, Path], folder: Path, options: BuildOptions) -> dict[str, str]:
    """Build each role's engine, for the GPUs asked for, the one at hand, or all of Ampere and later.

    Raises: `BackendUnavailable`; `ValueError` for a GPU that is not RTX, or a graph that does not build.
    """
    targets = _targets(options.compute_capability, options.device)
    compute_capabilities = targets or [known for known in _capabilities() if known != _TURING]
    return build_engines(_PACKAGE, graphs, folder, options, compute_capabilities, partial(_configured, targets))


def load(path: Path, options: LoadOptions = LoadOptions()) -> TensorRTEngine:
    """An engine from a file of a checked bundle; its kernels are compiled when it is bound and first runs.

    Raises: `BackendUnavailable`; `ValueError` for a file that is damaged, or of another version or GPU.
    """
    facts, here, found = describe(path), gpu(options.device), support(options.device)
    require_valid(facts, path)
    _PACKAGE.require(options.device)
    if here is None or not found.can_run:
        raise BackendUnavailable(found.reason)
    kernels = cache_path(CAPABILITIES.name, facts.version, here.name, facts.sha256)
    return TensorRTEngine(_PACKAGE, path, options, partial(_JitContexts, kernels))


def describe(path: Path) -> EngineFacts:
    """What is known of an engine file without loading it; a damaged header is found without a GPU, too.

    Raises: `BackendUnavailable`; `ValueError` where its facts are missing.
    """
    return describe_engine(_PACKAGE, path, _header)


def _header(path: Path) -> tuple[Validity, str]:
    """What the library reads in an engine's first bytes."""
    trt = _PACKAGE.library()
    runtime, flags = trt.Runtime(log_of(trt)), trt.EngineInvalidityDiagnostics
    with path.open("rb") as stream:
        verdict, found = runtime.get_engine_validity(stream.read(runtime.engine_header_size))
    if verdict == trt.EngineValidity.VALID:
        return "valid", "for this library and GPU"
    if not found & ~int(flags.CUDA_ERROR):  # 0 is what is found where there is no driver
        return "unchecked", "its header is whole; there is no driver to check more"
    reason = ", ".join(name for name, flag in flags.__members__.items() if found & int(flag))
    return "suboptimal" if verdict == trt.EngineValidity.SUBOPTIMAL else "invalid", reason


def _capabilities() -> dict[str, Any]:
    """What TensorRT-RTX can build for: compute capabilities and its own names of them."""
    members = _PACKAGE.library().ComputeCapability.__members__
    return {f"{int(sm) // 10}.{int(sm) % 10}": sm for name, sm in members.items() if name.startswith("SM")}


def _targets(asked: Sequence[str], device: str) -> list[str]:
    """The compute capabilities to build for; none is the library's own choice."""
    check_targets(asked)
    known, here = _capabilities(), gpu(device)
    if asked or here is None:
        return list(dict.fromkeys(asked))
    if here.compute_capability not in known:
        raise BackendUnavailable(f"{_unsupported(here)}, or name the compute capability to build for")
    return [here.compute_capability]


def _unsupported(here: Gpu) -> str:
    known = _or(_capabilities())
    return f"{here.name} is of compute capability {here.compute_capability}, not {known}; use tensorrt or inductor"


def _or(capabilities: Sequence[str] | Mapping[str, Any]) -> str:
    *others, last = capabilities
    return f"{', '.join(others)} or {last}"


@contextmanager
def _configured(targets: Sequence[str], config: Any) -> Generator[None]:
    known = _capabilities()
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        if not config.set_compute_capability(known[target], i):
            raise ValueError(f"TensorRT-RTX does not build for {', '.join(targets)} at once; build for each alone")
    yield


class _JitContexts:
    """Makes an engine's contexts, and keeps the kernels compiled for them once the engine is no longer used."""

    def __init__(self, path: Path, engine: Any) -> None:
        self._engine = engine
        config = engine.create_runtime_config()
        self._cache, stored = config.create_runtime_cache(), read_cache(path)
        if stored and not self._cache.deserialize(stored):  # of another driver or GPU; it will be written anew
            stored = b""
        weakref.finalize(self, _keep, self._cache, path, stored, (engine, config))

    def __call__(self) -> Any:
        trt = _PACKAGE.library()
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # A binding has one shape for good, and kernels that came later would be missing in a graph captured before.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # fastcache captures the whole loop itself
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(runtime_config=config)


def _keep(cache: Any, path: Path, stored: bytes, owners: tuple[Any, ...]) -> None:
    """Write an engine's compiled kernels if there are new ones; `owners` live until then."""
    content = cache.serialize()
    if content is None or bytes(content) == stored:
        return
    try:
        write_cache(path, bytes(content))
    except OSError as error:
        logging.getLogger(__name__).warning("kernels of TensorRT-RTX were not kept in %s: %s", path, error)
