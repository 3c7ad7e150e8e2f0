"""An ONNX file -> an engine of ONNX Runtime on the CPU, bound to torch tensors without copies."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache_engines import BackendUnavailable, TensorSpec, check_tensors

NAME = "onnxruntime"

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def version() -> str:
    """The installed version.

    Raises: `BackendUnavailable` where ONNX Runtime is not installed.
    """
    return _onnxruntime().__version__


def _onnxruntime() -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendUnavailable("ONNX Runtime is not installed; run: pip install onnxruntime")
    import onnxruntime

    return onnxruntime


def load(path: Path, *, threads: int = 0) -> OnnxRuntimeEngine:
    """An engine from an ONNX file; `threads` 0 means as many as torch uses.

    Raises: `BackendUnavailable`; `ValueError` for weights outside the graph's folder or a graph that does not load.
    """
    return OnnxRuntimeEngine(path, threads=threads)


class OnnxRuntimeEngine:
    """One ONNX graph in an inference session. Source: ONNX Runtime's IO binding."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        runtime = _onnxruntime()
        _refuse_outside_weights(path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        # Full and shallow are two sessions with a pool each: one's idle threads must not spin while the other runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise ValueError(f"ONNX Runtime cannot load {path.name}: {str(error).splitlines()[0]}") from error
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())

    def bind(self, tensors: Mapping[str, Tensor]) -> OnnxRuntimeBinding:
        """Bind by address: the graph reads and writes the tensors themselves."""
        check_tensors((*self.inputs, *self.outputs), tensors, "cpu")
        return OnnxRuntimeBinding(self._session, self.inputs, self.outputs, tensors)


class OnnxRuntimeBinding:
    """A session and the addresses it works on; holds the tensors so that they live as long."""

    def __init__(
        self,
        session: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        tensors: Mapping[str, Tensor],
    ) -> None:
        import numpy as np

        self._session, self._binding = session, session.io_binding()
        self._tensors = [tensors[spec.name] for spec in (*inputs, *outputs)]
        for specs, bind in ((inputs, self._binding.bind_input), (outputs, self._binding.bind_output)):
            for spec in specs:
                tensor = tensors[spec.name]
                bind(spec.name, "cpu", 0, np.dtype(spec.dtype), list(tensor.shape), tensor.data_ptr())

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


def _spec(value: Any) -> TensorSpec:
    dtype: str = value.type
    return TensorSpec(value.name, _DTYPES.get(dtype, dtype), tuple(value.shape))


def _refuse_outside_weights(path: Path) -> None:
    """External data may name any path (CVE-2024-27318 and its kin): only plain names beside the graph are let in."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's decode errors and OS errors share no base class
        raise ValueError(f"{path.name} is not a readable ONNX file: {str(error).splitlines()[0]}") from error
    for location in sorted(_locations(model)):
        file = path.parent / location
        if Path(location).name != location or file.is_symlink() or not file.is_file():
            raise ValueError(f"expected the weights of {path.name} in a file beside it, got {location!r}")


def _locations(message: Any) -> set[str]:
    """Every place that a tensor anywhere in the model says its data is: in subgraphs and functions, and said twice."""
    found: set[str] = set()
    for field, value in message.ListFields():
        if field.name == "external_data":
            found |= {entry.value for entry in value if entry.key == "location"}
        elif field.message_type is not None:
            for part in value if isinstance(value, Sequence) else (value,):
                found |= _locations(part)
    return found
