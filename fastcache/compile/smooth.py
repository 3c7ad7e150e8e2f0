"""A graph in float32 and inputs that it meets -> one that computes the same, and whose layers' channels are more alike.

All channels of a layer's input share one 8-bit scale, so one large channel leaves little of the small ones. Here each
channel is divided by a number, and the layer's weights are multiplied by it. NNCF's own smoothing keeps what it changes
inside the graph, where more than 2 GiB of weights do not fit; this writes them beside it.

Source: SmoothQuant, arXiv 2211.10438, equation 4, here of convolutions too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

STRENGTH: Final = 0.85  # alpha, of 1: how much of the channels' differences the weights take over
_WEIGHTS: Final = "smooth.weights"
_LARGE_BYTES: Final = 1024

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer, and which axes of its input and its weights count input channels."""

    node: ir.Node
    input_rank: int
    input_axis: int
    weight: ir.Value
    weight_axis: int


def smooth(path: Path, calls: Sequence[Mapping[str, npt.NDArray[Any]]], folder: Path) -> Path:
    """Write the smoothed graph of the one at `path`, and all its weights, into `folder`; returns its path.

    The weights of the graph at `path` lie beside it. Nothing there is changed.
    """
    model = ir.load(path)
    layers = _layers(model.graph)
    for (given, readers), largest in zip(layers.items(), _largest(path, [*layers.values()], calls), strict=True):
        _divide(model.graph, given, largest, readers)
    ir.save(model, folder / path.name, external_data=_WEIGHTS, size_threshold_bytes=_LARGE_BYTES)
    return folder / path.name


def _layers(graph: ir.Graph) -> dict[ir.Value, list[_Layer]]:
    """The layers that read each tensor along the same axis, of those whose weights are theirs alone."""
    found = dict[ir.Value, list[_Layer]]()
    for node in graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        given, weight = node.inputs[:2]
        if given is None or given.shape is None or given.const_value is not None or weight is None:
            continue
        if weight.const_value is None or len(weight.uses()) > 1:
            continue
        attributes, rank = node.attributes, len(given.shape)
        if node.op_type == "Conv" and attributes.get_int("group", 1) == 1:
            layer = _Layer(node, rank, 1, weight, 1)
        elif node.op_type == "Gemm" and not attributes.get_int("transA", 0):
            layer = _Layer(node, rank, 1, weight, attributes.get_int("transB", 0))
        elif node.op_type == "MatMul" and len(weight.const_value.shape) == 2:
            layer = _Layer(node, rank, rank - 1, weight, 0)
        else:
            continue
        others = found.setdefault(given, [])
        if not others or others[0].input_axis == layer.input_axis:
            others.append(layer)
    return found


def _largest(
    path: Path, layers: Sequence[Sequence[_Layer]], calls: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[Vector]:
    """The largest magnitude in each channel of what some layers are given, over all calls."""
    import onnxruntime

    model, wanted = ir.load(path), list[str]()
    graph, nodes = model.graph, {node.name: node for node in model.graph}
    for first, *_ in layers:
        rest = [axis for axis in range(first.input_rank) if axis != first.input_axis]
        axes = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(rest, np.int64))})
        sizes = ir.node("Abs", nodes[first.node.name].inputs[:1])
        largest = ir.node("ReduceMax", [*sizes.outputs, *axes.outputs], attributes={"keepdims": 0})
        wanted.append(f"largest {len(wanted)}")
        largest.outputs[0].name, largest.outputs[0].type = wanted[-1], ir.TensorType(ir.DataType.FLOAT)
        graph.extend([axes, sizes, largest])
        graph.outputs.append(largest.outputs[0])
    watched = path.with_name(f"watched-{path.name}")  # beside the weights
    try:
        ir.save(model, watched)
        session: Any = onnxruntime.InferenceSession(str(watched), providers=["CPUExecutionProvider"])
        found = [session.run(wanted, dict(call)) for call in calls]
    finally:
        watched.unlink(missing_ok=True)
    return [np.max(of_one, axis=0) for of_one in zip(*found, strict=True)]


def _divide(graph: ir.Graph, given: ir.Value, largest: Vector, layers: Sequence[_Layer]) -> None:
    """Divide a tensor's channels before its layers, and multiply these layers' weights; the largest are `largest`."""
    by_channel = [np.moveaxis(np.asarray(layer.weight.const_value), layer.weight_axis, 0) for layer in layers]
    heaviest = np.max([np.abs(each).reshape(len(each), -1).max(axis=1) for each in by_channel], axis=0)
    divisor, used = np.ones_like(largest), (largest > 0) & (heaviest > 0)
    divisor[used] = largest[used] ** STRENGTH / heaviest[used] ** (1 - STRENGTH)
    first = layers[0]
    shape = [-1 if axis == first.input_axis else 1 for axis in range(first.input_rank)]
    factor = ir.node("Constant", [], attributes={"value": ir.tensor((1 / divisor).reshape(shape))})
    divided = ir.node("Mul", [given, *factor.outputs])
    graph.insert_before(first.node, [factor, divided])
    for layer, each in zip(layers, by_channel, strict=True):
        layer.node.replace_input_with(0, divided.outputs[0])
        scaled = np.moveaxis(each * divisor.reshape(-1, *[1] * (each.ndim - 1)), 0, layer.weight_axis)
        layer.weight.const_value = ir.tensor(np.ascontiguousarray(scaled), name=layer.weight.name)
