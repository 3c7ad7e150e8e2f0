"""Shapes that are known when a graph is exported are constants in it, and it computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from fastcache.compile import components, export, graph_passes, passes
from fastcache.compile.export import Exportable, Free
from fastcache.compile.fold import fold_shapes
from fastcache.compile.models import find_model
from fastcache.cut.partition import partition_branches
from fastcache_engines import BACKENDS, LoadOptions, backend, onnxruntime
from tensorrt_graphs import few_layers

# What computes with sizes and what computes with numbers has one name in ONNX; these are of sizes alone.
OF_SIZES = {"Shape", "Size", "Gather", "Range", "ConstantOfShape", "Expand"}


def graph_of(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')


def evaluate(model: ir.Model, folder: Path, **inputs: np.ndarray) -> dict[str, Tensor]:
    ir.save(model, folder / "graph.onnx")
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return onnxruntime.evaluate(folder / "graph.onnx", given, LoadOptions())


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


HEADS = """
heads (float[batch, 2, 6, 4] x) => (float[batch, 2, 4, 6] y)
<int64[1] minus_one = {-1}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] three = {3}, int64[1] four = {4}>
{
    sizes = Shape(x)
    outer = Slice(sizes, zero, two)
    rows = Slice(sizes, two, three)
    columns = Slice(sizes, three, four)
    flat_sizes = Concat<axis=0>(minus_one, rows, columns)
    flat = Reshape(x, flat_sizes)
    turned = Transpose<perm=[0, 2, 1]>(flat)
    back_sizes = Concat<axis=0>(outer, columns, rows)
    y = Reshape(turned, back_sizes)
}
"""


def test_a_chain_around_one_free_size_becomes_constants(tmp_path: Path) -> None:
    """As the exporter turns keys in attention."""
    model, plain = graph_of(HEADS), graph_of(HEADS)
    fold_shapes(model)
    assert operators(model) == ["Reshape", "Transpose", "Reshape"]
    for batch in (1, 3):
        x = np.random.default_rng(batch).normal(size=(batch, 2, 6, 4)).astype(np.float32)
        assert torch.equal(evaluate(model, tmp_path, x=x)["y"], evaluate(plain, tmp_path, x=x)["y"])
        assert torch.equal(evaluate(model, tmp_path, x=x)["y"], torch.from_numpy(x).mT)


NORM = """
norm (float[batch, 4, h, w] x) => (float[batch, 4, h, w] y)
<int64[3] groups = {0, 2, -1}>
{
    grouped = Reshape(x, groups)
    sizes = Shape(x)
    y = Reshape(grouped, sizes)
}
"""


def test_several_free_sizes_keep_their_arithmetic(tmp_path: Path) -> None:
    model = graph_of(NORM)
    fold_shapes(model)
    assert operators(model) == ["Reshape", "Shape", "Reshape"]
    x = np.ones((2, 4, 3, 5), np.float32)
    assert evaluate(model, tmp_path, x=x)["y"].shape == (2, 4, 3, 5)


STAYING = """
staying (float[batch, tokens, 6] x) => (float[batch, tokens, 2, 3] y)
<int64[1] zero = {0}, int64[1] two = {2}, int64[2] heads = {2, 3}>
{
    sizes = Shape(x)
    outer = Slice(sizes, zero, two)
    wanted = Concat<axis=0>(outer, heads)
    y = Reshape(x, wanted)
}
"""


def test_free_sizes_that_stay_where_they_were_are_no_obstacle(tmp_path: Path) -> None:
    model = graph_of(STAYING)
    fold_shapes(model)
    assert operators(model) == ["Reshape"]
    for batch, tokens in ((1, 7), (3, 5)):
        x = np.arange(batch * tokens * 6, dtype=np.float32).reshape(batch, tokens, 6)
        found = evaluate(model, tmp_path, x=x)["y"]
        assert torch.equal(found, torch.from_numpy(x).reshape(batch, tokens, 2, 3))


def test_a_shape_that_is_not_known_is_left_alone() -> None:
    text = "given (float[batch, 4] x, int64[2] sizes) => (float[a, b] y) { y = Reshape(x, sizes) }"
    model = graph_of(text)
    fold_shapes(model)
    assert operators(model) == ["Reshape"]
    assert [value.name for value in model.graph.node(0).inputs] == ["x", "sizes"]


def arithmetic(model: ir.Model) -> list[ir.Node]:
    """The nodes of a graph that compute with whole numbers or sizes."""
    return [
        node
        for node in model.graph
        if node.op_type in OF_SIZES or any(value.dtype == ir.DataType.INT64 for value in node.outputs)
    ]


# One export each: the first is enough for a quick look.
ONNX_BACKENDS = [name for name in BACKENDS if backend(name).CAPABILITIES.source == "onnx"]
EXPORTED = [pytest.param(name, marks=[pytest.mark.slow] * (name != ONNX_BACKENDS[0])) for name in ONNX_BACKENDS]


@pytest.mark.parametrize("name", EXPORTED)
def test_a_unet_of_fixed_size_holds_no_arithmetic_of_sizes(name: str) -> None:
    """Every backend's own graphs, in the dtype whose translations add most."""
    unet = few_layers()
    cuts = partition_branches(unet, (0,))
    translations = graph_passes.translations(backend(name).CAPABILITIES, "fp16")
    for part in passes.exportable_unet(cuts, passes.unet_inputs(unet, 2, 8, 8, 7)):
        model, _ = export.export(part, translations)
        assert arithmetic(model) == []


@pytest.mark.slow
def test_the_pictures_own_networks_hold_none_either(tiny_model: Path) -> None:
    model = find_model(str(tiny_model), random_weights=False)
    vae = model.load_vae()
    for part in (
        components.exportable_vae_decoder(vae, 8, 8, 4),
        components.exportable_vae_encoder(vae, 8, 8, 4, scaled=True),
    ):
        exported, _ = export.export(part)
        assert arithmetic(exported) == []


class Attention(nn.Module):
    """What a transformer block does between its projections, over tokens of an image."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        x = inputs["sample"]
        tokens = x.flatten(2).mT.unflatten(2, (2, -1)).transpose(1, 2)
        attended: Any = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return attended.transpose(1, 2).flatten(2).mT.reshape(x.shape)


def test_free_heights_compute_what_the_module_does(tmp_path: Path) -> None:
    part = Exportable(
        "full", Attention(), {"sample": torch.randn(2, 8, 4, 6)}, ("noise_pred",), {"sample": 1, "noise_pred": 1}
    )
    free = Free(height=True, width=True)
    model, _ = export.export(part, free=free)
    export.save_graphs([("graph.onnx", model)], tmp_path, "weights")
    for shape in ((1, 8, 4, 6), (3, 8, 2, 5)):
        sample = torch.randn(shape)
        (found,) = onnxruntime.evaluate(tmp_path / "graph.onnx", {"sample": sample}).values()
        torch.testing.assert_close(found, Attention()({"sample": sample}))
