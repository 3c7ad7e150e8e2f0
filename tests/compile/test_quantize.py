"""8-bit engines: which layers stay in float, what is refused, and that what is built computes what the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file

import fastcache
import fastcache_engines
from build_store import BuildStore
from fastcache import Bundle
from fastcache.bundle.bundle import REFERENCE
from fastcache.bundle.parity import graph_error
from fastcache.bundle.recipe import recipe_from
from fastcache.compile import quantize
from fastcache.compile.builder import resolve
from fastcache.compile.quantize import AIM_DB, MOST_KEPT, Group
from fastcache.errors import BackendUnavailable
from fastcache.evaluate.quality import psnr_db
from fastcache.health.verify import verify_bundle
from fastcache_engines import INT8_GRAPH_TOLERANCE, INT8_TOLERANCE, LoadOptions


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1)), min_size=1, max_size=30))
def test_what_stays_in_float_is_little_and_worth_it(layers: list[tuple[int, float]]) -> None:
    groups = [Group(f"down.{k}", "conv", (f"node_{k}",), work) for k, (work, _) in enumerate(layers)]
    errors = {group: error for group, (_, error) in zip(groups, layers, strict=True)}
    kept = quantize._worst(groups, errors)
    assert len({*kept}) == len(kept)
    assert sum(group.work for group in kept) <= MOST_KEPT * sum(group.work for group in groups)
    aim = 10 ** (-AIM_DB / 10)
    assert all(errors[group] > aim / 10 for group in kept)  # less would cost time and gain nothing
    if sum(errors.values()) <= aim:
        assert kept == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"backend": "inductor"}, r"8-bit layers on a CPU \(onnxruntime, openvino\), got inductor"),
        ({"backend": "tensorrt-rtx", "dtype": "fp16", "onnx_only": True}, "got tensorrt-rtx on cuda"),
    ],
)
def test_a_backend_without_8_bit_layers_is_refused(fields: dict[str, Any], said: str, tiny_model: Path) -> None:
    with pytest.raises(BackendUnavailable, match=said):
        resolve(recipe_from({"model": str(tiny_model), "quantize": "int8", **fields}))


@pytest.mark.parametrize("beside", [{"blocks": "transformer"}, {"kernels": True}, {"controlnet": "folder"}])
def test_what_does_not_go_with_8_bits_is_refused(beside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected quantize without blocks, kernels or networks"):
        recipe_from({"quantize": "int8", **beside})


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="quantize: Input should be 'int8', got 'int4'"):
        recipe_from({"quantize": "int4"})


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def bundle(request: pytest.FixtureRequest, builds: BuildStore, tiny_model: Path) -> Bundle:
    return builds.bundle(tiny_model, backend=request.param, quantize="int8")


@pytest.mark.slow
def test_an_8_bit_bundle_draws_nearly_what_the_float_one_draws(bundle: Bundle, tiny_bundle: Bundle) -> None:
    made = bundle.manifest.quantized
    assert made is not None
    assert made.weight_bits == fastcache_engines.int8_weight_bits()
    assert {*made.engines} == {"full", "shallow-0"}
    assert all(engine.layers > 0 and engine.snr_db > 15 for engine in made.engines.values())
    assert bundle.manifest.weights_bytes < 0.6 * tiny_bundle.manifest.weights_bytes
    assert bundle.manifest.parity.tolerance == INT8_TOLERANCE
    found = verify_bundle(bundle.path)
    assert found.problems == []
    assert found.parity is not None
    assert found.parity.full_vs_model > 1e-4  # it is not the float engine that was measured

    def draw(one: Bundle) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return fastcache.load(one.path)(
            "a red", num_inference_steps=4, cache_interval=2, guidance_scale=2.0, generator=generator, output_type="pt"
        ).images

    assert 20 < psnr_db(draw(bundle), draw(tiny_bundle)) < 100


@pytest.mark.slow
def test_an_8_bit_engine_is_held_against_its_own_graph(
    bundle: Bundle, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, graph = load_file(bundle.file(REFERENCE)), bundle.engine_path("full")
    backend = fastcache_engines.backend(bundle.manifest.backend)
    own = graph_error(backend, graph, known, LoadOptions())
    assert own < INT8_GRAPH_TOLERANCE / 5  # what lies between two 8-bit numbers may go either way, and others follow
    load = backend.load
    other = tiny_bundle.engine_path("full")
    monkeypatch.setattr(backend, "load", lambda path, options: load(other, options))  # as of one that does not round
    assert graph_error(backend, graph, known, LoadOptions()) > own


@pytest.mark.slow
def test_weights_of_8_bits_are_refused_where_they_overflow(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundle.manifest.quantized
    assert made is not None
    if made.weight_bits == 7:
        pytest.skip("this processor has no VNNI: the bundle has 7 bits, and runs everywhere")
    monkeypatch.setattr(fastcache_engines, "int8_weight_bits", lambda: 7)
    with pytest.raises(BackendUnavailable, match="expected a processor with VNNI"):
        fastcache.load(bundle.path)


def test_rounding_stands_before_layers_and_not_before_reshapes() -> None:
    """Both users of a rounded tensor, one behind a reshape and a transpose, and the graph gives what it gave."""
    rng = np.random.default_rng(0)
    constants = {
        "scale": np.float32(0.02),
        "zero": np.int8(-10),
        "shape": np.array([-1, 4, 4, 8]),
        "conv": rng.normal(size=(8, 8, 1, 1)).astype(np.float32),
        "linear": rng.normal(size=(8, 8)).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["narrow"]),
        helper.make_node("DequantizeLinear", ["narrow", "scale", "zero"], ["wide"]),
        helper.make_node("Reshape", ["wide", "shape"], ["square"]),
        helper.make_node("Transpose", ["square"], ["channels first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["channels first", "conv"], ["a"]),
        helper.make_node("MatMul", ["wide", "linear"], ["b"]),
    ]
    graph = helper.make_graph(
        nodes,
        "rounding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 16, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ab"],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    changed = ir.serde.deserialize_model(model)
    quantize.round_next_to_layers(changed.graph)

    by_type = {node.op_type: node for node in changed.graph}
    assert [node.op_type for node in changed.graph].count("QuantizeLinear") == 2
    assert by_type["Reshape"].inputs[0] is changed.graph.inputs[0]
    assert all(quantize._before_rounding(by_type[name].inputs[0]) is not None for name in ("Conv", "MatMul"))
    x = rng.normal(size=(2, 16, 8)).astype(np.float32)
    before, after = (ReferenceEvaluator(one).run(None, {"x": x}) for one in (model, ir.serde.serialize_model(changed)))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
