"""Smoothing leaves what a graph computes as it is, and brings its layers' channels nearer to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastcache.compile.smooth import smooth

RANGES = np.array([0.01, 1, 100, 0], np.float32)  # of the channels; the last is never anything but zero


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two convolutions that read one tensor, a matrix product, and a linear layer, with their weights beside them."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> npt.NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    constants = {
        "w1": weights(6, 4, 3, 3),
        "w2": weights(4, 4, 1, 1),
        "w3": weights(4, 5),
        "w4": weights(7, 4),
        "grouped": weights(4, 1, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "conv 1", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "w2"], ["b"], "conv 2"),
        helper.make_node("Conv", ["x", "grouped"], ["c"], "conv 3", group=4),
        helper.make_node("MatMul", ["rows", "w3"], ["d"], "matmul"),
        helper.make_node("Gemm", ["rows", "w4"], ["e"], "gemm", transB=1),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8]),
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 4]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "abcde"]
    kept = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "layers", inputs, outputs, kept)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "full.onnx"), save_as_external_data=True, location="w", size_threshold=0)
    return tmp_path / "full.onnx"


def calls(count: int) -> list[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, 2, 4, 8, 8)) * RANGES[:, None, None]
    rows = rng.normal(size=(count, 2, 4)) * RANGES
    return [{"x": a.astype(np.float32), "rows": b.astype(np.float32)} for a, b in zip(x, rows, strict=True)]


def run(path: Path, given: dict[str, npt.NDArray[np.float32]]) -> list[Any]:
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, given)


def test_a_smoothed_graph_computes_the_same_from_more_even_channels(graph: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    folder = tmp_path / "smooth"
    folder.mkdir()
    given = calls(3)
    made = smooth(graph, given, folder)
    for call in given:
        for one, other in zip(run(graph, call), run(made, call), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before

    found = onnx.load(str(made))
    factors = {init.name: numpy_helper.to_array(init) for init in found.graph.initializer}
    factors |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in found.graph.node if n.op_type == "Constant"
    }
    divided = {
        node.output[0]: (node.input[0], factors[node.input[1]]) for node in found.graph.node if node.op_type == "Mul"
    }
    assert sorted(name for name, _ in divided.values()) == ["rows", "x"]
    for name, factor in divided.values():
        sizes = [np.abs(call[name] * factor).max(axis=(0, *range(2, call[name].ndim))) for call in given]
        largest = np.max(sizes, axis=0)
        assert largest[:3].max() / largest[:3].min() < 20  # 10,000 before
    readers = {node.name: node.input[0] for node in found.graph.node if node.input}
    assert readers["conv 1"] == readers["conv 2"] != readers["matmul"] == readers["gemm"]
    assert readers["conv 3"] == "x"
