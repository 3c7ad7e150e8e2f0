"""An ONNX file -> an engine of ONNX Runtime, on the CPU or a CUDA GPU, bound to torch tensors without copies."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache_engines import onnx_files
from fastcache_engines.capturing import capture_lock, without_captures
from fastcache_engines.extras import install
from fastcache_engines.machine import NO_GPU, BackendUnavailable, device_index, device_kind, gpu, torch_device
from fastcache_engines.onnx_files import refuse_outside_weights
from fastcache_engines.protocol import Capabilities, LoadOptions, Support
from fastcache_engines.registry import refuse_targets
from fastcache_engines.tensors import TensorSpec, agreed, check_tensors

CAPABILITIES = Capabilities(
    name="onnxruntime",
    source="onnx",
    dtypes={"cpu": ("fp32",), "cuda": ("fp32", "fp16")},
    concurrent=("cpu",),
    free_tokens=True,
    fused_attention=True,
    layers=True,
    quantized=True,
    conditions=True,
)

build, describe, check_targets = onnx_files.keep_graphs, onnx_files.describe, refuse_targets

Providers = Sequence[tuple[str, dict[str, Any]]]


def version() -> str:
    """The installed version.

    Raises: `BackendUnavailable` where ONNX Runtime is not installed.
    """
    return library().__version__


def library() -> Any:
    """The onnxruntime module, which tells its makers nothing: it would write a device id when it is imported.

    Raises: `BackendUnavailable` where it is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendUnavailable(
            f"ONNX Runtime is not installed; run: {install('cpu')}, or for an NVIDIA GPU: {install('gpu')}"
        )
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, by the first import in a process
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # should others have imported it before
    return onnxruntime


def _clash() -> str:
    """What to say where both builds of ONNX Runtime are installed: they own the same folder, and the last one wins."""
    both = ("onnxruntime", "onnxruntime-gpu")
    if not all(any(metadata.distributions(name=name)) for name in both):
        return ""
    named = " and ".join(f"{name} {metadata.version(name)}" for name in both)
    return (
        f"; {named} are both installed and overwrite each other's files: run pip uninstall -y {' '.join(both)}, then "
        "pip install the one to keep"
    )


def support(device: str) -> Support:
    if device_kind(device) == "cuda":
        return provider_support("CUDAExecutionProvider", device)
    try:
        return Support(version(), True, True, f"ready, on the CPU in fp32{_clash()}")
    except BackendUnavailable as error:
        return Support(None, False, False, str(error))


def provider_support(provider: str, device: str) -> Support:
    """Whether an execution provider for GPUs is in the installed build, and a GPU is there to run it."""
    try:
        found = version()
    except BackendUnavailable as error:
        return Support(None, False, False, str(error))
    if provider not in library().get_available_providers():
        reason = f"this build of ONNX Runtime has no {provider}; " + (
            _clash().removeprefix("; ") or "run: pip uninstall -y onnxruntime, then pip install onnxruntime-gpu"
        )
    elif (here := gpu(device)) is None:
        reason = NO_GPU
    else:
        return Support(found, True, True, f"ready, on {here.name}{_clash()}")
    return Support(found, False, False, reason)


def load(path: Path, options: LoadOptions = LoadOptions()) -> OnnxRuntimeEngine:
    """An engine from an ONNX file.

    Raises: `BackendUnavailable`; `ValueError` for weights outside the graph's folder or a graph that does not load.
    """
    if device_kind(options.device) == "cpu":
        return OnnxRuntimeEngine(path, options, [("CPUExecutionProvider", {})])
    support(options.device).require()
    stream = torch.cuda.Stream(torch_device(options.device))
    # One graph launch replaces a thousand kernel launches.
    cuda = cuda_settings(options, stream) | {"enable_cuda_graph": "1"}
    return OnnxRuntimeEngine(path, options, [("CUDAExecutionProvider", cuda)], stream)


def on_gpu(device: str, stream: torch.cuda.Stream) -> dict[str, str]:
    """What every provider for GPUs is told: which of several, and the stream that it works in."""
    return {"device_id": str(device_index(device)), "user_compute_stream": str(stream.cuda_stream)}


def cuda_settings(options: LoadOptions, stream: torch.cuda.Stream) -> dict[str, str]:
    """What the CUDA provider is told besides: that fp32 is IEEE's.

    With FASTCACHE_ORT_NHWC=1 in the environment convolutions lie channels last, as tensor cores want them: to be
    measured on a GPU before it becomes the rule.
    """
    nhwc = os.environ.get("FASTCACHE_ORT_NHWC", "0")
    return on_gpu(options.device, stream) | {"use_tf32": "0", "prefer_nhwc": nhwc}


def evaluate(path: Path, inputs: Mapping[str, Tensor], options: LoadOptions = LoadOptions()) -> dict[str, Tensor]:
    """Every output of a graph on the CPU, its nodes as they stand, in new tensors: for comparing, not for speed.

    Raises: as `load`.
    """
    refuse_outside_weights(path)
    runtime = library()
    settings = runtime.SessionOptions()
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    results = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(result) for name, result in zip(names, results, strict=True)}


# What computes the sizes of tensors: the CUDA provider leaves it to the CPU on purpose, where sizes are.
_OF_SIZES = {
    *("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Max"),
    *("Min", "Mod", "Mul", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze"),
    "Where",
}


def refuse_cpu_work(name: str, assigned: Sequence[Any]) -> None:
    """Raise `ValueError` for a graph of which the CPU would compute more than sizes: in each step, back and forth.

    `assigned` is what ONNX Runtime says of a session: which provider runs which nodes.
    """
    of_cpu = [part.get_nodes() for part in assigned if part.ep_name == "CPUExecutionProvider"]
    work = sorted({node.op_type for nodes in of_cpu for node in nodes} - _OF_SIZES)
    if work:
        raise ValueError(
            f"expected {name} to run on the GPU, got {', '.join(work)} on the CPU, for which this ONNX Runtime has no "
            "CUDA kernel; run: pip install -U onnxruntime-gpu, or use another backend"
        )


class OnnxRuntimeEngine:
    """One ONNX graph in an inference session. On a GPU it runs in `stream`, as each binding's own CUDA graph.

    Source: ONNX Runtime's IO binding, and its CUDA execution provider's documentation on CUDA graphs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(
        self, path: Path, options: LoadOptions, providers: Providers, stream: torch.cuda.Stream | None = None
    ) -> None:
        runtime = library()
        refuse_outside_weights(path)
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = max(1, (options.threads or torch.get_num_threads()) // options.streams)
        settings.log_severity_level = 3
        # Full and shallow are two sessions with a pool each: one's idle threads must not spin while the other runs.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        self.stream, self._device, self._bindings = stream, torch_device(options.device), 0
        if self._device.type == "cuda":
            settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if (self._device.type, options.dtype) == ("cpu", "fp16"):
            # A CPU only checks such graphs: SDXL takes 15 GB as it stands, over 18 with its weights widened beforehand.
            settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            with without_captures(options.device):  # it allocates
                self.session = runtime.InferenceSession(str(path), settings, providers=list(providers))
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise ValueError(f"ONNX Runtime cannot load {path.name}: {str(error).splitlines()[0]}") from error
        if self._device.type == "cuda":
            refuse_cpu_work(path.name, self.session.get_provider_graph_assignment_info())
        self.inputs = agreed(path.name, [_spec(value) for value in self.session.get_inputs()], options.inputs)
        self.outputs = agreed(path.name, [_spec(value) for value in self.session.get_outputs()], options.outputs)

    def bind(self, tensors: Mapping[str, Tensor]) -> OnnxRuntimeBinding:
        """Bind by address: the graph reads and writes the tensors themselves."""
        check_tensors((*self.inputs, *self.outputs), tensors, self._device)
        self._bindings += 1
        return OnnxRuntimeBinding(self, tensors, graph_id=self._bindings)


class OnnxRuntimeBinding:
    """A session and the addresses it works on; holds the tensors so that they live as long."""

    def __init__(self, engine: OnnxRuntimeEngine, tensors: Mapping[str, Tensor], graph_id: int) -> None:
        import onnx

        self._session, self._stream, self._captured = engine.session, engine.stream, False
        self._binding = binding = engine.session.io_binding()
        self._tensors = [tensors[spec.name] for spec in (*engine.inputs, *engine.outputs)]
        for specs, bind in ((engine.inputs, binding.bind_input), (engine.outputs, binding.bind_output)):
            for spec in specs:
                tensor, device = tensors[spec.name], tensors[spec.name].device
                kind = onnx.TensorProto.DataType.Value("FLOAT" if spec.dtype == "float32" else spec.dtype.upper())
                bind(spec.name, device.type, device.index or 0, kind, list(tensor.shape), tensor.data_ptr())
        self._options = library().RunOptions()
        if engine.stream is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def capturable(self) -> bool:
        return False  # on a GPU it replays a graph of its own, and none can be launched into another

    def run(self) -> None:
        if self._stream is None:
            self._session.run_with_iobinding(self._binding, self._options)
            return
        # ONNX Runtime takes torch's default stream, 0, for none given, so it has a stream of its own, in order with it.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        # It captures in its first run, in a mode in which what any other thread allocates is an error.
        with nullcontext() if self._captured else capture_lock:
            self._session.run_with_iobinding(self._binding, self._options)
        self._captured = True
        current.wait_stream(self._stream)


def _spec(value: Any) -> TensorSpec:
    dtype = value.type.removeprefix("tensor(").removesuffix(")")  # all but one are called as in torch
    return TensorSpec(value.name, "float32" if dtype == "float" else dtype, tuple(value.shape))
