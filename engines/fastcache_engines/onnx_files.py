"""What every backend that reads ONNX files asks of them: that their weights lie beside them, and what is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache_engines.protocol import BuildOptions


def keep_graphs(graphs: Mapping[str, Path], folder: Path, options: BuildOptions) -> dict[str, str]:
    """`build` of a backend whose engines are the ONNX files as they are."""
    return {role: path.name for role, path in graphs.items()}


@dataclass(frozen=True)
class GraphFacts:
    """What an ONNX file says of itself: its nodes by operator, most frequent first, and its operator sets' versions."""

    nodes: int
    operators: dict[str, int]
    opsets: dict[str, int]
    ir_version: int


def describe(path: Path) -> GraphFacts:
    """What is in an ONNX file, its weights not read.

    Raises: `ValueError` for a file that is not ONNX.
    """
    model = read_graph(path)
    operators = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in model.graph.node)
    opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
    return GraphFacts(len(model.graph.node), dict(operators.most_common()), opsets, model.ir_version)


def read_graph(path: Path) -> Any:
    """An ONNX file, its weights not read. Raises: `ValueError` for a file that is not ONNX."""
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's decode errors and OS errors share no base class
        raise ValueError(f"{path.name} is not a readable ONNX file: {str(error).splitlines()[0]}") from error


def refuse_outside_weights(path: Path) -> set[Path]:
    """External data may name any path (CVE-2024-27318 and its kin): only plain names beside the graph are let in.

    Returns the files that hold it.

    Raises: `ValueError` for weights anywhere else, a graph with functions, or a file that is not ONNX.
    """
    model, files = read_graph(path), set[Path]()
    if model.functions:  # backends inline them: 26 that each call the next twice are 2^26 nodes
        raise ValueError(f"expected a graph without functions in {path.name}, got {len(model.functions)}; inline them")
    for location in sorted(external_locations(model)):
        file = path.parent / location
        if Path(location).name != location or file.is_symlink() or not file.is_file():
            raise ValueError(f"expected the weights of {path.name} in a file beside it, got {location!r}")
        files.add(file)
    return files


def external_locations(message: Any) -> set[str]:
    """Every place that a tensor anywhere in the model says its data is: in subgraphs and functions, and said twice."""
    found: set[str] = set()
    for field, value in message.ListFields():
        if field.name == "external_data":
            found |= {entry.value for entry in value if entry.key == "location"}
        elif field.message_type is not None:
            for part in value if isinstance(value, Sequence) else (value,):
                found |= external_locations(part)
    return found
