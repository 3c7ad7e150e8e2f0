"""An exported graph -> the same graph with its shapes as constants, as far as sizes are fixed.

The exporter computes a shape from a tensor in each run, although all of it but the batch is known; ONNX Runtime does
such arithmetic on the CPU even where a GPU computes the rest. Knows graphs; knows nothing about what they compute for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

Content = list[int | str]  # of a tensor of sizes: what each is, by its symbol where it is free


def fold_shapes(model: ir.Model) -> None:
    """Give each Reshape whose shape is computed a constant one, in place, and drop what computed it.

    One free size may be left out of a shape (-1), and so may those that stay where they were (0); a Reshape to other
    free sizes keeps its arithmetic.
    """
    contents: dict[ir.Value, Content] = {}
    constants: dict[tuple[int, ...], ir.Value] = {}
    for node in model.graph:
        (output, *others) = node.outputs
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Reshape" and not node.attributes.get_int("allowzero", 0):
            data, shape = inputs
            wanted = _content(shape, contents)
            if wanted is None:
                continue
            target = _target(_sizes(data), wanted)
            if target is not None and shape.const_value is None:
                node.replace_input_with(1, _constant(model, target, constants))
            if not any(size in (0, -1) for size in wanted):  # else the exporter knows better
                output.shape = ir.Shape(wanted)
        elif node.op_type == "Transpose" and (sizes := _sizes(inputs[0])) is not None:
            output.shape = ir.Shape([sizes[axis] for axis in node.attributes["perm"].as_ints()])
        elif not others and (found := _evaluate(node, inputs, contents)) is not None:
            contents[output] = found
    RemoveUnusedNodesPass()(model)


def _sizes(value: ir.Value) -> Content | None:
    """A tensor's sizes; None where one is not known."""
    if value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in sizes else [size for size in sizes if size is not None]


def _content(value: ir.Value, contents: Mapping[ir.Value, Content]) -> Content | None:
    """What a tensor of sizes holds."""
    constant = value.const_value
    if constant is None:
        return contents.get(value)
    if constant.dtype != ir.DataType.INT64 or constant.size > 8:
        return None
    return [int(size) for size in constant.numpy().reshape(-1)]


def _evaluate(node: ir.Node, inputs: Sequence[ir.Value], contents: Mapping[ir.Value, Content]) -> Content | None:
    """What a node makes of sizes; None for one that is no arithmetic of shapes, or not known here."""
    if node.op_type == "Shape":
        sizes = _sizes(inputs[0])
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        return None if sizes is None else sizes[start:end]
    evaluate = _ARITHMETIC.get(node.op_type)
    if evaluate is None:
        return None
    given = [_content(value, contents) for value in inputs]
    return None if None in given else evaluate(*given)


def _slice(sizes: Content, starts: Any, ends: Any, axes: Any = (0,), steps: Any = (1,)) -> Content | None:
    return sizes[starts[0] : ends[0]] if tuple(axes) == (0,) and tuple(steps) == (1,) else None


def _concat(*parts: Content) -> Content:
    return [size for part in parts for size in part]


def _gather(sizes: Content, indices: Any) -> Content:
    return [sizes[index] for index in indices]


def _same(sizes: Content, axes: Any = ()) -> Content:
    return sizes


_ARITHMETIC: dict[str, Callable[..., Content | None]] = {
    "Slice": _slice,
    "Concat": _concat,
    "Gather": _gather,
    "Squeeze": _same,
    "Unsqueeze": _same,
    "Cast": _same,
}


def _target(data: Content | None, wanted: Content) -> tuple[int, ...] | None:
    """A constant that means the sizes wanted; None where that cannot be said."""
    stay = [data is not None and axis < len(data) and data[axis] == size for axis, size in enumerate(wanted)]
    free = [axis for axis, size in enumerate(wanted) if isinstance(size, str)]
    moved = [axis for axis in free if not stay[axis]]
    alone = moved or free[:1]
    if len(alone) > 1 or (alone and -1 in wanted):
        return None
    return tuple(-1 if axis in alone else 0 if isinstance(size, str) else size for axis, size in enumerate(wanted))


def _constant(model: ir.Model, target: tuple[int, ...], constants: dict[tuple[int, ...], ir.Value]) -> ir.Value:
    """An initializer of the graph that holds a shape, one for all that are equal."""
    if target not in constants:
        name = f"shape_{'x'.join(map(str, target))}"
        tensor = ir.tensor(np.array(target, np.int64), name=name)
        value = ir.Value(name=name, shape=ir.Shape([len(target)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(value)
        constants[target] = value
    return constants[target]
