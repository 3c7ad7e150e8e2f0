"""Torch modules -> ONNX graphs with stable names, a free batch size, and one shared file of weights.

Graphs are exported by torch's dynamo exporter; weights that several graphs use are written once (`save_graphs`).
Knows nothing about what a module computes (`passes.py`, `components.py`), about backends or bundles.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fastcache.bundle.manifest import Role
from fastcache.compile import graph_passes
from fastcache.compile.conditions import add_conditions
from fastcache.compile.fold import fold_shapes
from fastcache.compile.simplify import simplify
from fastcache.cut.chain import RUNS, kept_name
from fastcache.errors import BuildError
from fastcache.expect import first_line
from fastcache_engines import Program, TensorSpec

OPSET = 20
_ALIGNMENT_BYTES = 4096  # lets a backend map the weights file page by page

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Exportable:
    """A module called with one dict of named tensors, an example of it, and the names of what comes out.

    `strides` says of tensors with rows and columns of an image, by name, how many pixels apart these are.
    """

    role: Role
    module: nn.Module
    inputs: Inputs
    outputs: tuple[str, ...]
    strides: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Free:
    """Which sizes of a graph are left free beside the batch; the example's hold for the others.

    `height` and `width` are free in multiples of `step` pixels, `tokens` up to `max_tokens` where that is given.
    """

    height: bool = False
    width: bool = False
    step: int = 1
    max_tokens: int | None = None

    def axes(self, name: str, stride: int | None) -> dict[int, tuple[str, int, int | None]]:
        """The free axes of a tensor but its first: the size's name, in how many steps it comes, and its upper end."""
        if name == "encoder_hidden_states" and self.max_tokens is not None:
            return {1: ("tokens", 1, self.max_tokens)}
        if stride is None:
            return {}
        sizes = ((2, "height", self.height), (3, "width", self.width))
        return {axis: (size, self.step // stride, None) for axis, size, free in sizes if free}


Specs = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # a graph's inputs and outputs

# diffusers' upsampler copies its input at 64 rows or more, without effect on the result; a range that ends before
# lets torch.export succeed at its first attempt, and the graph's batch is free all the same.
_BATCH = torch.export.Dim("batch", min=1, max=63)


def _dynamic_shapes(part: Exportable, free: Free) -> dict[str, dict[str, dict[int, Any]]]:
    """The free sizes of a part as torch.export is told of them: one symbol each, shared by all inputs."""
    found: dict[str, Any] = {}

    def size_of(name: str, steps: int, most: int | None) -> Any:
        symbol = found.setdefault(name, torch.export.Dim(name, min=1 if most is None else 2, max=most))
        return symbol if steps == 1 else steps * symbol

    return {
        "inputs": {
            name: {0: _BATCH} | {axis: size_of(*size) for axis, size in free.axes(name, part.strides.get(name)).items()}
            for name in part.inputs
        }
    }


def export_program(part: Exportable, free: Free = Free(), others: Sequence[tuple[int, int]] = ()) -> tuple[Any, Specs]:
    """A module as a program of `torch.export`, with a free batch size, and what it takes and gives.

    `others` are further heights and widths in pixels, for which programs of their own come with it; `free` is what is
    then said to be free.

    Raises: `BuildError` with the exporter's reason.
    """
    program = _program(part)
    sized = others if any(name in part.strides for name in part.inputs) else ()
    further = tuple(_program(_at_size(part, *size)) for size in sized)
    results: Any = program.graph.output_node().args[0]
    values = [node.meta["val"] for node in results]
    outputs = tuple(
        _spec(part, free, name, value.dtype, value.shape) for name, value in zip(part.outputs, values, strict=True)
    )
    inputs = tuple(_spec(part, free, name, value.dtype, value.shape) for name, value in part.inputs.items())
    return Program(program, tuple(part.inputs), part.outputs, further), (inputs, outputs)


def _program(part: Exportable) -> Any:
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(
                part.module, (), {"inputs": part.inputs}, dynamic_shapes=_dynamic_shapes(part, Free())
            )
    except Exception as error:  # torch.export's errors share no public base class
        raise BuildError(f"cannot export the {part.role} program: {first_line(error)}") from error


def _at_size(part: Exportable, height: int, width: int) -> Exportable:
    """The same part with examples of another size, in pixels."""
    inputs = {
        name: x.new_zeros(*x.shape[:2], height // part.strides[name], width // part.strides[name])
        if name in part.strides
        else x
        for name, x in part.inputs.items()
    }
    return replace(part, inputs=inputs)


def _spec(part: Exportable, free: Free, name: str, dtype: Any, shape: Any) -> TensorSpec:
    """A tensor of a part, its free sizes by name: `batch`, `tokens`, `height/8`."""
    stride = part.strides.get(name)
    names = {0: "batch"} | {axis: size for axis, (size, _, _) in free.axes(name, stride).items()}
    sizes: list[Any] = [names.get(axis, size) for axis, size in enumerate(shape)]
    if stride is not None and stride > 1:
        sizes = [f"{size}/{stride}" if size in ("height", "width") else size for size in sizes]
    if not all(isinstance(size, int | str) for size in sizes):
        raise BuildError(f"expected {name} of the {part.role} graph to have the example's sizes, got {list(shape)}")
    return TensorSpec(name, str(dtype).removeprefix("torch."), tuple(sizes))


def _onnx_spec(part: Exportable, free: Free, value: ir.Value) -> TensorSpec:
    dtype, shape = value.dtype, value.shape
    if dtype is None or shape is None:
        raise BuildError(f"expected the graph's {value.name!r} to have a type and a shape, got neither")
    return _spec(part, free, value.name or "", dtype.numpy().name, shape)


def export(
    part: Exportable, translations: graph_passes.Translations | None = None, free: Free = Free()
) -> tuple[ir.Model, Specs]:
    """Export one module to ONNX with a free batch size, and others as `free` says; the rest are the example's.

    `translations` replace the exporter's own for the operators they name.

    Raises: `BuildError` with the exporter's reason.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                part.module,
                kwargs={"inputs": part.inputs},
                input_names=list(part.inputs),
                opset_version=OPSET,
                dynamic_shapes=_dynamic_shapes(part, free),
                custom_translation_table=dict(translations or {}),
                dynamo=True,
                optimize=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise BuildError(f"cannot export the {part.role} graph: {first_line(error.__cause__ or error)}") from error
    if program is None:
        raise BuildError(f"cannot export the {part.role} graph: the exporter returned nothing")
    graph = program.model.graph
    simplify(program.model)
    for value, name in zip(graph.outputs, part.outputs, strict=False):  # not before: two names may be one value's
        value.name = name
    fold_shapes(program.model)
    names = [value.name for value in graph.inputs], [value.name for value in graph.outputs]
    if names != (list(part.inputs), list(part.outputs)):
        raise BuildError(
            f"expected the {part.role} graph to have {list(part.inputs)} -> {list(part.outputs)}, got {names}"
        )
    inputs, outputs = (
        tuple(_onnx_spec(part, free, value) for value in values) for values in (graph.inputs, graph.outputs)
    )
    return program.model, (inputs, outputs)


def export_parts(
    parts: Sequence[Exportable],
    whole: Exportable,
    conditions: Mapping[str, Sequence[str]],
    translations: graph_passes.Translations | None = None,
    free: Free = Free(),
) -> list[tuple[ir.Model, Specs]]:
    """Export parts of a whole, which gives all that they take of each other: one export, then cut in parts.

    `conditions` are the blocks that parts hold in an `If`, by their residuals, and what each takes.

    Raises: as `export`.
    """
    model, specs = export(whole, translations, free)
    source = _sources(model.graph)
    taken = {residual: [source.get(name, name) for name in takes] for residual, takes in conditions.items()}
    found = list[tuple[ir.Model, Specs]]()
    for part in parts:
        if part is whole:
            found.append((model, specs))
            continue
        there = [name for name in part.inputs if name != RUNS and kept_name(name) is None]
        names = {source.get(name, name): name for name in there}  # of two for one tensor the last
        graph = ir.convenience.extract(model.graph, [*names], [*part.outputs])
        # It comes with the initializers of a set, in another order each time; a build gives the same bytes.
        kept = {name: graph.initializers[name] for name in model.graph.initializers if name in graph.initializers}
        graph.initializers.clear()
        graph.initializers.update(kept)
        piece = ir.Model(graph, ir_version=model.ir_version)
        if RUNS in part.inputs:
            add_conditions(piece, taken)
        for value in graph.inputs:
            value.name = names.get(value.name or "", value.name)
        inputs, outputs = (tuple(_onnx_spec(part, free, one) for one in own) for own in (graph.inputs, graph.outputs))
        found.append((piece, (inputs, outputs)))
    return found


def _sources(graph: ir.Graph) -> dict[str, str]:
    """Outputs that are another value of the graph under a second name, and that value's: what follows takes it."""
    found = dict[str, str]()
    for value in graph.outputs:
        node = value.producer()
        while node is not None and node.op_type == "Identity" and (same := node.inputs[0]) is not None:
            found[value.name or ""], node = same.name or "", same.producer()
    return found


def save_graphs(models: Sequence[tuple[str, ir.Model]], folder: Path, weights_name: str) -> int:
    """Write graphs beside one file of weights; equal tensors are stored once. Returns the bytes this saved."""
    places: dict[tuple[bytes, ir.DataType], tuple[int, int]] = {}
    saved = 0
    with (folder / weights_name).open("wb") as stream:
        for _, model in models:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < 1024:
                    continue
                content = tensor.tobytes()
                # Equal bytes of another type are not equal tensors: TensorRT refuses one place with two counts.
                key = hashlib.sha256(content).digest(), tensor.dtype
                if key in places:
                    saved += len(content)
                else:
                    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT_BYTES))
                    places[key] = (stream.tell(), len(content))
                    stream.write(content)
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    weights_name,
                    offset,
                    length,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=folder,
                )
    for name, model in models:
        for node in model.graph.all_nodes():
            node.metadata_props.clear()  # the exporter's stack traces: a third of the file, and paths of this machine
        ir.save(model, folder / name)
    return saved


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep the exporter's own prints, logs and deprecation warnings out of a user's terminal."""
    logger, registry = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")
    levels = logger.level, registry.level
    try:
        logger.setLevel(logging.ERROR)
        registry.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(levels[0])
        registry.setLevel(levels[1])
