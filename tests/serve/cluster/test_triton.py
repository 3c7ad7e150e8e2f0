"""`fastcache export-triton`: the repository it writes, and its model.py in the hands of a small Triton."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import fastcache
from fastcache import Bundle
from fastcache.bundle.bundle import open_bundle
from fastcache.serve.cluster.rows import Row, draw_rows
from fastcache.serve.cluster.triton import config_text, export_repository

pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

STEPS = 4


@dataclass
class Tensor:
    """What Triton hands over and takes back."""

    tensor_name: str
    array: np.ndarray[Any, Any]

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self.array

    def name(self) -> str:
        return self.tensor_name


@dataclass
class Response:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: Any = None

    def array(self, name: str) -> np.ndarray[Any, Any]:
        return next(tensor.array for tensor in self.output_tensors if tensor.tensor_name == name)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """`triton_python_backend_utils`, which exists only inside Triton: as much of it as a model needs."""
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, Response, str
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)


@pytest.fixture(scope="module")
def exported(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_repository(tiny_bundle.path, tmp_path_factory.mktemp("repository"), "tiny")


@pytest.fixture
def model(exported: Path, backend: None) -> Iterator[Any]:
    """The exported model.py, loaded from its file as Triton does it."""
    spec = importlib.util.spec_from_file_location("exported_model", exported / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = module.TritonPythonModel()
    loaded.initialize({"model_repository": str(exported), "model_version": "1", "model_instance_kind": "CPU"})
    yield loaded
    loaded.finalize()


def asked(*prompts: str, **fields: Any) -> dict[str, Tensor]:
    kinds = {
        "seed": np.int64,
        "num_inference_steps": np.int32,
        "cache_interval": np.int32,
        "guidance_scale": np.float32,
    }
    columns: dict[str, Any] = {"num_inference_steps": STEPS, **fields}
    request = {"prompt": Tensor("prompt", np.array([[p.encode()] for p in prompts], dtype=object))}
    for name, value in columns.items():
        values = value if isinstance(value, list) else [value] * len(prompts)
        array = np.array([[v.encode() if isinstance(v, str) else v] for v in values], dtype=kinds.get(name, object))
        request[name] = Tensor(name, array)
    return request


def test_a_repository_is_whole(exported: Path, tiny_bundle: Bundle) -> None:
    assert {path.name for path in exported.iterdir()} == {"1", "config.pbtxt"}
    assert open_bundle(exported / "1" / "engines").manifest == tiny_bundle.manifest
    with pytest.raises(ValueError, match=r"expected no model in .*, got one"):
        export_repository(tiny_bundle.path, exported.parent, "tiny")
    with pytest.raises(ValueError, match="expected a name of letters"):
        export_repository(tiny_bundle.path, exported.parent, "../tiny")
    assert [path.name for path in exported.parent.iterdir()] == ["tiny"]


def test_the_configuration_is_tritons(exported: Path, tiny_bundle: Bundle) -> None:
    pytest.importorskip("rapidjson", reason="needs the message types of tritonclient")
    configs = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient")
    from google.protobuf import text_format

    config = text_format.Parse((exported / "config.pbtxt").read_text(), configs.ModelConfig())
    assert (config.name, config.backend) == ("tiny", "python")
    assert config.max_batch_size == tiny_bundle.manifest.profiles["batch"].max
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["prompt"]
    assert {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.output} == {
        "image": (configs.TYPE_UINT8, [32, 32, 3]),
        "seed": (configs.TYPE_INT64, [1]),
    }
    assert config.instance_group[0].kind == configs.ModelInstanceGroup.KIND_CPU
    assert config.HasField("dynamic_batching")
    on_a_gpu = tiny_bundle.manifest.model_copy(update={"device": "cuda-sm90"})
    config = text_format.Parse(config_text("other", on_a_gpu), configs.ModelConfig())
    assert config.instance_group[0].kind == configs.ModelInstanceGroup.KIND_GPU


def test_requests_are_answered_as_the_pipeline_draws(model: Any, tiny_bundle: Bundle) -> None:
    one, two = model.execute(
        [asked("abc", seed=5, cache_interval=2), asked("abc", "z", seed=[6, 7], sampler="euler_a", guidance_scale=3.0)]
    )
    assert one.error is None
    assert two.error is None
    assert one.array("image").shape == (1, 32, 32, 3)
    assert two.array("seed").tolist() == [[6], [7]]
    pipe = fastcache.load(tiny_bundle.path, threads=1)
    expected = pipe(
        ["abc"], num_inference_steps=STEPS, cache_interval=2, generator=[torch.Generator().manual_seed(5)]
    ).images[0]
    assert np.abs(one.array("image")[0].astype(int) - np.asarray(expected).astype(int)).max() <= 1
    others = pipe(
        ["abc", "z"],
        num_inference_steps=STEPS,
        sampler="euler_a",
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (6, 7)],
    ).images
    for got, other in zip(two.array("image"), others, strict=True):
        assert np.abs(got.astype(int) - np.asarray(other).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sampler": "magic"}, "sampler: .*expected a sampler"),
        ({"num_inference_steps": 0}, "num_inference_steps: "),
        ({"seed": -1}, "seed: "),
        ({"sampler": "lcm", "num_inference_steps": 800}, "800"),
    ],
)
def test_a_request_that_does_not_fit_fails_alone(fields: dict[str, Any], says: str, model: Any) -> None:
    bad, good = model.execute([asked("a", **fields), asked("a")])
    assert re.search(says, bad.error)
    assert bad.output_tensors == []
    assert good.error is None
    assert good.array("seed").min() >= 0


def test_an_instance_on_another_device_is_refused(exported: Path, backend: None) -> None:
    from fastcache.serve.cluster.triton import TritonPythonModel

    with pytest.raises(ValueError, match="expected an instance_group for cpu, got cuda"):
        TritonPythonModel().initialize(
            {"model_repository": str(exported), "model_version": "1", "model_instance_kind": "GPU"}
        )


def test_rows_of_other_settings_are_drawn_beside_each_other(tiny_bundle: Bundle) -> None:
    """More rows than a batch takes, of two settings: each once, and each as it is drawn alone."""
    pipe = fastcache.load(tiny_bundle.path, threads=1)
    rows = [
        Row(id=str(k), prompt="abc"[: 1 + k % 3], num_inference_steps=3 + k % 2, cache_interval=2, seed=k)
        for k in range(7)
    ]
    drawn = {outcome.row.id: outcome.picture for outcome in draw_rows(pipe, rows)}
    assert sorted(drawn) == [row.id for row in rows]
    for row in rows[:3]:
        (alone,) = draw_rows(pipe, [row])
        together = drawn[row.id]
        assert alone.picture is not None
        assert together is not None
        a, b = (np.asarray(picture).astype(int) for picture in (alone.picture, together))
        assert np.abs(a - b).max() <= 1
