"""A bundle's ONNX graphs, every tensor made an output -> where its backend leaves ONNX Runtime's plain result.

For finding out why `verify` fails. Knows graphs and tensors; knows nothing about steps or pictures.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file

import fastcache_engines
from fastcache.bundle.bundle import REFERENCE
from fastcache.bundle.manifest import Manifest, Role
from fastcache.bundle.parity import relative_error
from fastcache.cut.chain import RUNS, kept_name
from fastcache.errors import BackendUnavailable
from fastcache_engines import LoadOptions, onnx_files


@dataclass(frozen=True)
class LayerError:
    """A tensor of a graph, the operator that makes it, and its error relative to the largest reference value."""

    role: Role
    tensor: str
    operator: str
    error: float


def compare_layers(folder: Path, manifest: Manifest) -> list[LayerError]:
    """The error of every tensor of the passes' graphs, in the order in which they are computed.

    The shallow graph's cached feature is the reference's, and every block runs. Weights are linked into a temporary
    folder on the bundle's file system, not copied.

    Raises: `BackendUnavailable` for a backend whose bundles hold no ONNX graphs, or where Polygraphy is missing.
    """
    backend, plain = (fastcache_engines.backend(name) for name in (manifest.backend, fastcache_engines.REFERENCE))
    if not backend.CAPABILITIES.layers:
        compared = fastcache_engines.backends_with("layers")
        raise BackendUnavailable(
            f"expected a backend whose layers can be compared ({compared}), got {manifest.backend}"
        )
    known = load_file(folder / REFERENCE)
    known[RUNS] = torch.ones(len(known["sample"]), len(manifest.blocks))
    errors: list[LayerError] = []
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".layers-") as temporary:
        for role in dict.fromkeys(role for one in manifest.passes.values() for role in one.engines):
            entry = manifest.engines[role]
            graph = _with_every_tensor_out(folder / entry.file, Path(temporary))
            inputs = {spec.name: known[kept_name(spec.name) or spec.name] for spec in entry.inputs}
            expected = plain.evaluate(graph, inputs, LoadOptions())
            known |= {spec.name: expected[spec.name] for spec in entry.outputs}
            got = backend.evaluate(graph, inputs, LoadOptions(manifest.device_type, entry.dtype))
            for operator, name in _made(graph):
                if name in expected and name in got and expected[name].is_floating_point():
                    error = relative_error(got[name].float(), expected[name].float())
                    errors.append(LayerError(role, name, operator, error))
    return errors


def _with_every_tensor_out(graph: Path, folder: Path) -> Path:
    """A copy of a graph with every tensor an output, beside links to its weights."""
    if importlib.util.find_spec("polygraphy") is None:
        raise BackendUnavailable("comparing layers needs Polygraphy; run: pip install polygraphy")
    from polygraphy.backend.onnx.loader import modify_outputs  # pyright: ignore[reportAttributeAccessIssue]
    from polygraphy.constants import MARK_ALL

    model: Any = onnx.load(graph, load_external_data=False)
    for location in onnx_files.external_locations(model):
        if not (folder / location).exists():
            os.link(graph.parent / location, folder / location)
    marked: Any = modify_outputs(model, outputs=MARK_ALL)
    onnx.save(marked, folder / graph.name)
    return folder / graph.name


def _made(graph: Path) -> list[tuple[str, str]]:
    """Every tensor that a node makes, with its operator, in the graph's order."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    return [(node.op_type, name) for node in nodes for name in node.output if name]
