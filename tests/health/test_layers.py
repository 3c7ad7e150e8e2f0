"""When `verify` fails, the comparison of layers names the tensors that went wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

import fastcache
from build_store import BuildStore
from fastcache.bundle.bundle import Bundle, read_manifest
from fastcache.health.layers import compare_layers
from fastcache_engines import onnx_files


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def built(
    request: pytest.FixtureRequest, tiny_model: Path, builds: BuildStore, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return copied(builds.bundle(tiny_model, backend=request.param, device="cpu"), tmp_path_factory.mktemp("built"))


def copied(bundle: Bundle, folder: Path) -> Bundle:
    """A bundle of this module's own: comparing links its weights, by which others that hold it open see a change."""
    return Bundle(Path(shutil.copytree(bundle.path, folder / "bundle")), bundle.manifest)


def test_a_right_bundle_has_no_wrong_tensor(built: Bundle) -> None:
    beside = sorted(built.path.parent.iterdir())
    errors = compare_layers(built.path, built.manifest)
    assert {layer.role for layer in errors} == {"full", "shallow-0"}
    operators = onnx_files.describe(built.engine_path("full")).operators
    assert sum(layer.operator == "Conv" for layer in errors if layer.role == "full") == operators["Conv"]
    assert max(layer.error for layer in errors) < 1e-4
    assert sorted(built.path.parent.iterdir()) == beside


def test_blocks_in_conditions_are_run(tiny_model: Path, builds: BuildStore, tmp_path: Path) -> None:
    bundle = copied(builds.bundle(tiny_model, backend="onnxruntime", blocks="transformer", branch_id="0,2"), tmp_path)
    errors = compare_layers(bundle.path, bundle.manifest)
    assert {layer.role for layer in errors} == {"full", "shallow-0", "shallow-2"}
    assert sum(layer.operator == "If" for layer in errors if layer.role == "full") == 4
    assert max(layer.error for layer in errors) < 1e-4


def test_backends_without_graphs_say_so(built: Bundle) -> None:
    manifest = built.manifest.model_copy(update={"backend": "inductor"})
    with pytest.raises(fastcache.BackendUnavailable, match="expected a backend whose layers can be compared"):
        compare_layers(built.path, manifest)


@pytest.mark.slow
def test_bf16_differs_and_the_first_layer_least(tiny_model: Path, builds: BuildStore, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 that OpenVINO uses: it computes in float32")
    bundle = copied(builds.bundle(tiny_model, backend="openvino", device="cpu", dtype="bf16"), tmp_path)
    errors = [layer.error for layer in compare_layers(bundle.path, read_manifest(bundle.path)) if layer.role == "full"]
    assert 1e-4 < max(errors) < 0.2


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_leaves_the_bundle_as_it_is(built: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.path, tmp_path / "copy"))
    before = contents(copy)
    compare_layers(copy, built.manifest)
    assert contents(copy) == before
    assert onnx.load(copy / "full.onnx", load_external_data=False).graph.output[0].name == "noise_pred"
