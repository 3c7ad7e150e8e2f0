"""A bundle -> a model repository for Triton Inference Server, and the model that Triton's Python backend runs from it.

Triton's dynamic batcher gathers requests; those of equal settings are drawn in one batch. Knows Triton's files and
tensors; how rows are drawn is `rows.py`'s business. Source: the Python backend's and the model configuration's own
documentation, for Triton 2.40 and later.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError

from fastcache.bundle.bundle import open_bundle, publish
from fastcache.bundle.manifest import Manifest
from fastcache.errors import BundleError
from fastcache.expect import first_problem
from fastcache.files import write_whole
from fastcache.pipeline.request import MAX_SEED
from fastcache.serve.cluster.rows import Outcome, Row, draw_rows
from fastcache_engines import Device

_ENGINES: Final = "engines"
_MODEL: Final = '''"""What Triton's Python backend loads; its interpreter needs fastcache and the bundle's backend."""

from fastcache.serve.cluster.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
# name, Triton's data type, whether a request may leave it out
_INPUTS: Final = (
    ("prompt", "TYPE_STRING", False),
    ("negative_prompt", "TYPE_STRING", True),
    ("num_inference_steps", "TYPE_INT32", True),
    ("guidance_scale", "TYPE_FP32", True),
    ("sampler", "TYPE_STRING", True),
    ("cache_interval", "TYPE_INT32", True),
    ("seed", "TYPE_INT64", True),
)


def export_repository(engines: Path, output: Path, name: str = "fastcache") -> Path:
    """Write `output`/`name`: config.pbtxt, 1/model.py and a copy of the bundle. Returns that folder.

    Raises: `BundleError`; `ValueError` for a name that is no folder's, or a model that stands already.
    """
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ValueError(f"expected a name of letters, digits, - and _, got {name!r}")
    bundle = open_bundle(engines)
    if controls := bundle.manifest.model.controls:
        raise BundleError(f"expected a text-to-image bundle, got one with {controls[0].name}, which needs a picture")
    bundle.engine_path("vae_decoder")
    bundle.engine_path("text_encoder")
    target = output / name
    if target.exists():
        raise ValueError(f"expected no model in {target} yet, got one; remove it, or give another --name")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as scratch:
        model = Path(scratch) / name
        shutil.copytree(bundle.path, model / "1" / _ENGINES)
        open_bundle(model / "1" / _ENGINES)
        write_whole(model / "1" / "model.py", _MODEL.encode())
        write_whole(model / "config.pbtxt", config_text(name, bundle.manifest).encode())
        publish(model, target)
    return target


def config_text(name: str, manifest: Manifest) -> str:
    """The model's configuration, as text protobuf."""
    most = manifest.profiles["batch"].max
    inputs = ",\n".join(
        f'  {{ name: "{field}" data_type: {kind} dims: [ 1 ]{" optional: true" if optional else ""} }}'
        for field, kind, optional in _INPUTS
    )
    kind = "KIND_GPU" if manifest.device_type == "cuda" else "KIND_CPU"
    return f"""name: "{name}"
backend: "python"
max_batch_size: {most}
input [
{inputs}
]
output [
  {{ name: "image" data_type: TYPE_UINT8 dims: [ {manifest.height}, {manifest.width}, 3 ] }},
  {{ name: "seed" data_type: TYPE_INT64 dims: [ 1 ] }}
]
dynamic_batching {{ max_queue_delay_microseconds: 10000 }}
instance_group [ {{ kind: {kind} count: 1 }} ]
"""


class TritonPythonModel:
    """What Triton calls, by the names that its Python backend expects."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that lies beside model.py."""
        import triton_python_backend_utils as utils  # pyright: ignore[reportMissingImports] (Triton brings it)

        from fastcache.pipeline.pipeline import FastCachePipeline

        self._utils: Any = utils
        folder = Path(args["model_repository"]) / args["model_version"] / _ENGINES
        bundle = open_bundle(folder)
        expected: Device = "cuda" if args["model_instance_kind"] == "GPU" else "cpu"
        if bundle.manifest.device_type != expected:
            raise ValueError(
                f"expected an instance_group for {bundle.manifest.device_type}, got {expected}; see config.pbtxt"
            )
        self._pipe = FastCachePipeline(bundle)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request. A request that does not fit fails alone."""
        asked = [self._rows(number, request) for number, request in enumerate(requests)]
        rows = [row for found in asked if isinstance(found, list) for row in found]
        outcomes = {outcome.row.id: outcome for outcome in draw_rows(self._pipe, rows)}
        return [
            self._failed(found) if isinstance(found, str) else self._response([outcomes[row.id] for row in found])
            for found in asked
        ]

    def finalize(self) -> None:
        del self._pipe

    def _rows(self, number: int, request: Any) -> list[Row] | str:
        """The rows of a request's batch, or what is wrong with it."""
        columns: dict[str, list[Any]] = {}
        for name, kind, _ in _INPUTS:
            tensor = self._utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values = tensor.as_numpy().reshape(-1).tolist()
                columns[name] = [_text(value) for value in values] if kind == "TYPE_STRING" else values
        try:
            rows = list[Row]()
            for index in range(len(columns["prompt"])):
                fields = {name: values[index] for name, values in columns.items()}
                fields.setdefault("seed", secrets.randbelow(MAX_SEED))
                rows.append(Row.model_validate({"id": f"{number}-{index}", **fields}))
        except ValidationError as error:
            return first_problem(error, "the request")
        except UnicodeDecodeError:
            return "expected texts in UTF-8"
        return rows

    def _response(self, outcomes: Sequence[Outcome]) -> Any:
        for outcome in outcomes:
            if outcome.error is not None:
                return self._failed(outcome.error)
        images = np.stack([np.asarray(outcome.picture, dtype=np.uint8) for outcome in outcomes])
        seeds = np.array([[outcome.row.seed] for outcome in outcomes], dtype=np.int64)
        tensors = [self._utils.Tensor("image", images), self._utils.Tensor("seed", seeds)]
        return self._utils.InferenceResponse(output_tensors=tensors)

    def _failed(self, message: str) -> Any:
        return self._utils.InferenceResponse(output_tensors=[], error=self._utils.TritonError(message))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
