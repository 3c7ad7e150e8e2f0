"""ONNX files -> engine files of TensorRT or TensorRT-RTX, through the one API that both have.

Networks are strongly typed: every layer computes in the types that the ONNX file gives it. Constants are not folded
beforehand: Polygraphy takes the U-Net of SD1.5 from 1824 nodes to 1728, all shape arithmetic, and the engine that
comes of it has the same kernels and the same number of bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastcache_engines.onnx_files import refuse_outside_weights
from fastcache_engines.protocol import BuildOptions
from fastcache_engines.tensorrt.library import EngineFacts, Package, log_of, one_line, spec, write_facts

_PROGRESS_SECONDS = 2.0

Configured = Callable[[Any], AbstractContextManager[None]]


def build_engines(
    package: Package,
    graphs: Mapping[str, Path],
    folder: Path,
    options: BuildOptions,
    compute_capabilities: Sequence[str],
    configured: Configured,
) -> dict[str, str]:
    """Build each role's engine with its facts beside it, then remove the graphs and their weights.

    `configured` sets what only one library of the two has in a builder's configuration, around the build.

    Raises: `BackendUnavailable` for another device than a GPU; `ValueError` for a graph that does not build.
    """
    package.require(options.device)
    weights = {file for path in graphs.values() for file in refuse_outside_weights(path)}
    for role, path in graphs.items():
        engine = folder / f"{role}.engine"
        options.progress(
            f"{package.title} builds {engine.name} for compute capability {', '.join(compute_capabilities)}"
        )
        content, facts = engine_from_onnx_path(package, path, options, compute_capabilities, configured)
        engine.write_bytes(content)
        write_facts(engine, facts)
    for path in weights | set(graphs.values()):
        path.unlink()
    return {role: f"{role}.engine" for role in graphs}


def engine_from_onnx_path(
    package: Package, path: Path, options: BuildOptions, compute_capabilities: Sequence[str], configured: Configured
) -> tuple[memoryview, EngineFacts]:
    """Parse and build. Raises: `ValueError` with the library's own reason."""
    trt = package.library()
    log = log_of(trt)
    log.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))  # 10; 11 always is
    parser = trt.OnnxParser(network, log)  # owns the weights that the network refers to
    if not parser.parse_from_file(str(path)):  # by its path, for the weights are beside it
        raise ValueError(f"{package.title} cannot build {path.name}: {_parser_error(trt, parser)}")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, inputs, options, path.name))
    _set_flags(trt, config, options)
    monitor = _monitor(trt, path.stem, options.progress)
    config.progress_monitor = monitor
    with configured(config):
        plan = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        raise ValueError(f"{package.title} cannot build {path.name}: {log.reason()}")
    content = memoryview(plan)
    return content, EngineFacts(
        backend=package.backend,
        version=package.version(),
        compute_capabilities=tuple(compute_capabilities),
        layers=network.num_layers,
        rows=options.rows,
        inputs=tuple(spec(t.name, t.dtype, t.shape) for t in inputs),
        outputs=tuple(spec(t.name, t.dtype, t.shape) for t in outputs),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _profile(builder: Any, inputs: Sequence[Any], options: BuildOptions, name: str) -> Any:
    """The sizes to build for. Raises: `ValueError` for a free size, beside the first, that the options do not give."""
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        first, *others = (*tensor.shape, 0)
        shapes = options.shapes.get(tensor.name, (tuple(tensor.shape)[1:],) * 3)
        if any(size < 0 for size in others) and tensor.name not in options.shapes:
            raise ValueError(
                f"expected {name} to have no free size but its inputs' first, got {tensor.name} {list(tensor.shape)}"
            )
        if first < 0:
            profile.set_shape(
                tensor.name, *((count, *sizes) for count, sizes in zip(options.rows, shapes, strict=True))
            )
    return profile


def _set_flags(trt: Any, config: Any, options: BuildOptions) -> None:
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT-RTX allocates at run time otherwise, which a stream under capture cannot.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.dtype == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # rounds to 10 bits, 1e-3, as large an error as verify lets pass


def _parser_error(trt: Any, parser: Any) -> str:
    if not parser.num_errors:
        return log_of(trt).reason()
    error = parser.get_error(0)
    node = f"operator {error.node_operator()} (node {error.node_name()}): " if error.node_operator() else ""
    reason = one_line(error.desc())
    return f"{node}{error.code().name}{'' if reason == 'false' else f', {reason}'}"


def _monitor(trt: Any, role: str, progress: Callable[[str], None]) -> Any:
    """What turns the builder's phases into a line of progress every couple of seconds."""

    class Monitor(trt.IProgressMonitor):
        """`failure` is what `progress` raised: it ends the build, and TensorRT would only print it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._steps: dict[str, int] = {}
            self._last = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(f"{phase_name} ({step + 1} of {self._steps.get(phase_name, '?')})")
            return self.failure is None

        def _tell(self, phase: str) -> None:
            now = time.monotonic()
            if self.failure is not None or now - self._last < _PROGRESS_SECONDS:
                return
            self._last = now
            try:
                progress(f"{role}: {phase}")
            except BaseException as error:
                self.failure = error

    return Monitor()
