"""An engine file of TensorRT or TensorRT-RTX -> an engine bound to torch tensors, in memory that its user manages.

A plan is executable content: it is read with the raw runtime, whose `engine_host_code_allowed` stays False, and only
from a bundle whose bytes were checked.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache_engines.machine import torch_device
from fastcache_engines.protocol import LoadOptions, Workspace
from fastcache_engines.tensorrt.in_flight import InFlight
from fastcache_engines.tensorrt.library import Package, log_of, spec
from fastcache_engines.tensors import TensorSpec, agreed, check_tensors

Contexts = Callable[[], Any]

_contexts = InFlight()  # of bindings that are gone: a context must not end before its work


class TensorRTEngine:
    """One deserialised plan. `contexts`, given the library's engine, makes execution contexts without memory."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, package: Package, path: Path, options: LoadOptions, contexts: Callable[[Any], Contexts]) -> None:
        trt = package.library()
        self.name, self.title, self.log = path.name, package.title, log_of(trt)
        self._runtime = trt.Runtime(self.log)
        self._engine = self._deserialize(path)
        self._contexts = contexts(self._engine)
        self._device = torch_device(options.device)
        self._workspace = options.workspace or Workspace(str(self._device))
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        takes = [self._spec(name) for name in names if modes[name] == trt.TensorIOMode.INPUT]
        gives = [self._spec(name) for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self.inputs = agreed(path.name, takes, options.inputs)
        self.outputs = agreed(path.name, gives, options.outputs)

    def _deserialize(self, path: Path) -> Any:
        self.log.clear()
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ValueError(f"{self.title} cannot load {self.name}: {self.log.reason()}; build it again for this GPU")
        return engine

    def _spec(self, name: str) -> TensorSpec:
        return spec(name, self._engine.get_tensor_dtype(name), self._engine.get_tensor_shape(name))

    def bind(self, tensors: Mapping[str, Tensor]) -> TensorRTBinding:
        """Bind by address: kernels read and write the tensors themselves.

        Raises: `ValueError` as the protocol says; `RuntimeError` where the GPU has no memory left.
        """
        check_tensors((*self.inputs, *self.outputs), tensors, self._device)
        for name in (given.name for given in self.inputs):
            least, _, largest = self._engine.get_tensor_profile_shape(name, 0)
            rows = tensors[name].shape[0]
            if not least[0] <= rows <= largest[0]:
                raise ValueError(
                    f"expected {least[0]} to {largest[0]} rows, which {self.name} was built for, got {rows}; "
                    "build it for another batch"
                )
        self.log.clear()
        _contexts.let_go()
        with torch.cuda.device(self._device):
            context = self._contexts()
            if context is None:
                raise RuntimeError(f"{self.title} cannot prepare {self.name} to run: {self.log.reason()}")
            return TensorRTBinding(self, context, tensors, self._workspace)


class _LastStream:
    """Where a binding ran last."""

    stream: torch.cuda.Stream | None = None

    def mark(self) -> torch.cuda.Event | None:
        """An event behind all that is in that stream by now; none while it is being captured, which holds no events."""
        event, stream = torch.cuda.Event(), self.stream or torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            if torch.cuda.is_current_stream_capturing():
                return None
        event.record(stream)
        return event


class TensorRTBinding:
    """An execution context with its sizes and addresses set, and the tensors that are there, which it keeps alive."""

    def __init__(
        self, engine: TensorRTEngine, context: Any, tensors: Mapping[str, Tensor], workspace: Workspace
    ) -> None:
        self._engine, self._context, self._workspace = engine, context, workspace
        self._tensors = [tensors[given.name] for given in (*engine.inputs, *engine.outputs)]
        self._stream = torch.cuda.Stream()
        self._last = _LastStream()
        placed = all(context.set_input_shape(s.name, tuple(tensors[s.name].shape)) for s in engine.inputs) and all(
            context.set_tensor_address(s.name, tensors[s.name].data_ptr()) for s in (*engine.inputs, *engine.outputs)
        )
        if not placed:
            raise ValueError(f"{engine.title} cannot bind {engine.name}: {engine.log.reason()}")
        self._workspace_bytes = context.update_device_memory_size_for_shapes()
        self._block: Tensor | None = None
        self._captured: list[Tensor] = []  # blocks that a caller's graph works in
        weakref.finalize(
            self, _contexts.keep, (context, self._captured, self._tensors, engine), self._last.mark
        ).atexit = False
        self._settle()

    def _settle(self) -> None:
        """Take the place that the shared workspace has now; a captured run goes on in the one it was captured with."""
        block = self._workspace.reserve(self._workspace_bytes)
        if block is not self._block:
            self._block = block
            self._context.set_device_memory(block.data_ptr(), block.numel())
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(block)

    def capturable(self) -> bool:
        """Whether torch's current stream could capture `run` in a CUDA graph; TensorRT's own always could."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or asked(torch.cuda.current_stream().cuda_stream)

    def run(self) -> None:
        """As the protocol says. Raises: `RuntimeError` with the library's own reason."""
        self._settle()
        current = torch.cuda.current_stream()
        if current.cuda_stream:
            self._enqueue(current)
        else:  # in the default stream TensorRT waits for the whole device, before and after
            self._stream.wait_stream(current)
            self._enqueue(self._stream)
            current.wait_stream(self._stream)

    def _enqueue(self, stream: torch.cuda.Stream) -> None:
        self._last.stream = stream
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"{self._engine.title} cannot run {self._engine.name}: {self._engine.log.reason()}")
