"""A U-Net's graph that gives every block's residual -> the same with each block in an `If`, for one engine of patterns.

A block runs where `RUNS` is 1; else its residual is what the graph takes as `kept`, which the caller lets lie where the
last call that ran the block wrote it. Knows ONNX; knows nothing of steps or engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fastcache.cut.chain import RUNS, kept


def add_conditions(model: ir.Model, blocks: Mapping[str, Sequence[str]]) -> None:
    """Put the blocks of a graph, each by its residual and what it takes, in an `If` of their own."""
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    bodies = {name: ir.convenience.extract(graph, [*takes], [name]) for name, takes in blocks.items()}
    rows = (values["sample"].shape or ir.Shape([None]))[0]
    runs = ir.Value(name=RUNS, shape=ir.Shape([rows, len(blocks)]), type=ir.TensorType(ir.DataType.FLOAT))
    first = ir.node("Constant", [], {"value_int": 0})
    row = ir.node("Gather", [runs, first.outputs[0]], {"axis": 0})
    graph.insert_before(graph[0], [first, row])
    graph.inputs.append(runs)
    for block, (name, body) in enumerate(bodies.items()):
        residual = values[name]
        before = ir.Value(name=kept(name), shape=residual.shape, type=residual.type)
        graph.inputs.append(before)
        place = ir.node("Constant", [], {"value_ints": [block]})
        flag = ir.node("Gather", [row.outputs[0], place.outputs[0]], {"axis": 0})
        condition = ir.node("Cast", flag.outputs, {"to": int(ir.DataType.BOOL)})
        branches = {"then_branch": _computed(body, graph, values, name), "else_branch": _reused(before, name)}
        chosen = ir.node("If", condition.outputs, branches, name=name)
        own, made = chosen.outputs[0], residual.producer()
        own.shape, own.type = residual.shape, residual.type
        if made is None:
            raise ValueError(f"expected a node that computes {name}, got a graph that takes it")
        graph.insert_after(made, [place, flag, condition, chosen])
        residual.name = f"{name}/computed"  # by nodes that nobody needs any more
        own.name = name
        ir.convenience.replace_all_uses_with(residual, own, replace_graph_outputs=True)
    RemoveUnusedNodesPass()(model)


def _computed(body: ir.Graph, graph: ir.Graph, outer: Mapping[str, ir.Value], name: str) -> ir.Graph:
    """A block as a branch of a graph, whose values it sees and which holds its weights; its own have new names.

    ONNX Runtime refuses weights of a branch itself that lie in a file with more than one hard link.
    """
    for taken in [*body.inputs]:
        ir.convenience.replace_all_uses_with(taken, outer[taken.name or ""])
    nodes, (result,), weights = [*body], [*body.outputs], [*body.initializers.values()]
    body.outputs.clear()
    body.initializers.clear()
    body.remove(nodes)
    for value in (*weights, *(output for node in nodes for output in node.outputs)):
        value.name = f"{name}/{value.name}"
    for weight in weights:
        graph.register_initializer(weight)
    return ir.Graph([], [result], nodes=nodes, name=f"{name}/run")


def _reused(before: ir.Value, name: str) -> ir.Graph:
    same = ir.node("Identity", [before])
    (result,) = same.outputs
    result.name, result.shape, result.type = f"{name}/reused", before.shape, before.type
    return ir.Graph([], [result], nodes=[same], name=f"{name}/reuse")
