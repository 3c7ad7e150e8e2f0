"""A chain of engines' graphs -> one graph that does the same: with every block in an `If`, or with some left out.

These are the other two ways in which engines could leave blocks out; `block_times.py` times all three. The graphs keep
the names of what lies between pieces, so a lane's tensors fit them all. Knows ONNX; knows nothing of steps or time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

KEPT, RUN = "kept.", "run."  # what an `If` takes beside its block: the residual to reuse, and 1 where the block runs


def with_conditions(files: Sequence[Path], blocks: Collection[Path], output: Path) -> None:
    """Write a chain's graphs as one in which a block runs, or gives the residual of `KEPT`, as `RUN` says."""
    pieces = [_read(file) for file in files]
    nodes, weights, flags = list[NodeProto](), list[TensorProto](), list[ValueInfoProto]()
    for file, piece in zip(files, pieces, strict=True):
        if file not in blocks:
            nodes += piece.graph.node
            weights += piece.graph.initializer
            continue
        (residual,) = piece.graph.output
        kept = _renamed(residual, KEPT + residual.name)
        flag = helper.make_tensor_value_info(RUN + residual.name, TensorProto.FLOAT, [1])
        flags += [kept, flag]
        nodes += _choice(piece.graph, residual, kept.name, flag.name)
    _write(pieces, nodes, weights, flags, output)


def without(files: Sequence[Path], left_out: Collection[Path], output: Path) -> None:
    """Write a chain's graphs as one, but for some blocks, whose residuals it takes."""
    pieces = [_read(file) for file in files if file not in left_out]
    nodes = [node for piece in pieces for node in piece.graph.node]
    _write(pieces, nodes, [weight for piece in pieces for weight in piece.graph.initializer], [], output)


def _read(file: Path) -> ModelProto:
    """A graph in which every name but those of its inputs and outputs is its own: all count their values alike."""
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)} | {""}

    def own(names: Iterable[str]) -> list[str]:
        return [name if name in fixed else f"{file.stem}/{name}" for name in names]

    for node in graph.node:
        node.name = f"{file.stem}/{node.name}"
        node.input[:], node.output[:] = own(node.input), own(node.output)
    for weight in graph.initializer:
        (weight.name,) = own([weight.name])
    return model


def _choice(block: GraphProto, residual: ValueInfoProto, kept: str, flag: str) -> list[NodeProto]:
    """An `If` around a block. Its branches see what is around them, and give names of their own."""
    name = residual.name
    ran, reused = (
        helper.make_graph(
            [*nodes, helper.make_node("Identity", [source], [f"{name}.{way}"])],
            f"{name}.{way}",
            [],
            [_renamed(residual, f"{name}.{way}")],
            weights,
        )
        for way, nodes, source, weights in (
            ("ran", block.node, f"{name}.computed", block.initializer),
            ("reused", (), kept, ()),
        )
    )
    for node in ran.node[:-1]:
        node.output[:] = [f"{name}.computed" if one == name else one for one in node.output]
    condition = f"{name}.condition"
    return [
        helper.make_node("Cast", [flag], [condition], to=TensorProto.BOOL),
        helper.make_node("If", [condition], [name], then_branch=ran, else_branch=reused),
    ]


def _renamed(value: ValueInfoProto, name: str) -> ValueInfoProto:
    found = ValueInfoProto()
    found.CopyFrom(value)
    found.name = name
    return found


def _write(
    pieces: Sequence[ModelProto],
    nodes: Sequence[NodeProto],
    weights: Sequence[TensorProto],
    more: Sequence[ValueInfoProto],
    output: Path,
) -> None:
    """One model, which takes what its pieces lack, and `more`, and gives what any of them gives."""
    given = {value.name: value for piece in pieces for value in piece.graph.output}
    taken = {value.name: value for piece in pieces for value in piece.graph.input if value.name not in given}
    graph = helper.make_graph(nodes, output.stem, [*taken.values(), *more], [*given.values()], weights)
    model = helper.make_model(graph, opset_imports=pieces[0].opset_import, ir_version=pieces[0].ir_version)
    onnx.save(model, str(output))
