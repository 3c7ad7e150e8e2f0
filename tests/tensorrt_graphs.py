"""Small graphs to build TensorRT engines of, and what a test needs to know before it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper

from fastcache.compile import export, passes
from fastcache_engines import BuildOptions, tensorrt_rtx
from fastcache_engines.tensorrt.library import facts_path
from small_unets import small_unet

WIDTH = 64
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

built = pytest.mark.skipif(
    not tensorrt_rtx.support("cuda").can_build, reason=f"needs TensorRT-RTX: {tensorrt_rtx.support('cuda').reason}"
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")


def cuda(**changes: Any) -> BuildOptions:
    return BuildOptions(**({"device": "cuda"} | changes))


def save_graph(
    folder: Path, op: str = "MatMul", *, dtype: str = "fp32", location: str = "weights", **shape: Any
) -> Path:
    """y = x @ w, or another operator of x and w, with w in a file; x is of shape (batch, 64) unless said otherwise."""
    folder.mkdir(exist_ok=True)
    kind = TYPES[dtype]
    weight = TensorProto(name="w", data_type=kind, dims=[WIDTH, WIDTH], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    content = torch.eye(WIDTH).mul(2).to(getattr(torch, TORCH[dtype])).view(torch.uint8).numpy().tobytes()
    (folder / "weights").write_bytes(content)
    x = helper.make_tensor_value_info("x", shape.get("x_type", kind), shape.get("x", ["batch", WIDTH]))
    y = helper.make_tensor_value_info("y", kind, shape.get("y", ["batch", WIDTH]))
    node = helper.make_node(op, shape.get("inputs", ["x", "w"]), ["y"], name="the_node")
    graph = helper.make_graph([node], "graph", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return folder / "graph.onnx"


def build_graph(folder: Path, options: BuildOptions, dtype: str = "fp32") -> Path:
    names = tensorrt_rtx.build({"full": save_graph(folder, dtype=dtype)}, folder, options)
    assert names == {"full": "full.engine"}
    return folder / "full.engine"


def change_facts(engine: Path, **changes: Any) -> None:
    content = json.loads(facts_path(engine).read_text())
    facts_path(engine).write_text(json.dumps(content | changes))


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def few_layers() -> Any:
    """Exporting takes seconds for each layer: one block has every kind of layer that a shallow pass has."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}
    return small_unet("sd15", block_out_channels=(32,), layers_per_block=1, **blocks)


def save_unet(cut: Any, folder: Path) -> tuple[dict[str, export.Specs], dict[str, Path]]:
    inputs = passes.unet_inputs(few_layers(), 2, 8, 8, 7)
    exported = {part.role: export.export(part) for part in passes.exportable_unet(cut, inputs)}
    export.save_graphs([(f"{role}.onnx", model) for role, (model, _) in exported.items()], folder, "unet.weights")
    return {role: specs for role, (_, specs) in exported.items()}, {role: folder / f"{role}.onnx" for role in exported}
