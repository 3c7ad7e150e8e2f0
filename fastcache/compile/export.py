"""Torch modules -> ONNX graphs with stable names, a free batch size, and one shared file of weights.

Graphs are exported by torch's dynamo exporter; weights that several graphs use are written once (`save_graphs`).
Knows what a U-Net takes and gives; what goes around it is in `components.py`. Knows nothing about backends or bundles.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from fastcache.bundle import Role, shallow_role
from fastcache.compile import graph_passes
from fastcache.cut.partition import Cut, Cuts
from fastcache.cut.unet import take_apart
from fastcache.errors import BuildError
from fastcache_engines import TensorSpec

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


def call_unet(unet: nn.Module, inputs: Inputs) -> Any:
    """Call a U-Net, or a pass of a cut, with tensors by their ONNX names."""
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    plain = {name: tensor for name, tensor in inputs.items() if name not in (*added, "sample", "timestep")}
    # Those two by position, as diffusers' pipelines do: DeepCacheSDHelper looks for the timestep there.
    return unet(inputs["sample"], inputs["timestep"], **plain, **({"added_cond_kwargs": added} if added else {}))


class _UNet(nn.Module):
    """A full or shallow pass whose added conditioning comes as plain named tensors, as in the graph.

    Whatever dtype its layers have, it takes and gives float32, all but the cached feature, which no one else reads.
    `names` are the pass's own for the tensors that the graph calls otherwise.
    """

    def __init__(self, unet: nn.Module, names: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.unet, self._names = unet, dict(names or {})

    def forward(self, inputs: Inputs) -> Any:
        result = call_unet(self.unet, {self._names.get(name, name): tensor for name, tensor in inputs.items()})
        if isinstance(result, tuple):
            return result[0].float(), *result[1:]
        return result.float()


def unet_inputs(
    unet: UNet2DConditionModel | UNet2DModel, batch: int, height: int, width: int, tokens: int, time_ids: int = 6
) -> Inputs:
    """Seeded example inputs of a U-Net for latents of `height` x `width`, by their ONNX names.

    `tokens` counts where the U-Net reads text or a class's embedding, `time_ids` is how many sizes and scores SDXL's
    are told.

    Raises: `BuildError` for conditioning that engines do not take yet.
    """
    config: Any = unet.config
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    inputs = {
        "sample": randn(config.in_channels, height, width),
        "timestep": torch.linspace(981.0, 441.0, batch),
    }
    if isinstance(unet, UNet2DConditionModel):
        inputs["encoder_hidden_states"] = randn(tokens, config.encoder_hid_dim or config.cross_attention_dim)
    hidden_type = config.get("encoder_hid_dim_type")
    if config.class_embed_type not in (None, "timestep") or hidden_type not in (None, "text_proj"):
        raise BuildError(
            f"expected a U-Net conditioned on text, class labels or SDXL's sizes, got class_embed_type="
            f"{config.class_embed_type!r}, encoder_hid_dim_type={hidden_type!r}"
        )
    if config.num_class_embeds or config.class_embed_type:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.int64)
    if config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = randn(config.time_cond_proj_dim)
    added = config.get("addition_embed_type")
    if added == "text_time":
        text_width = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
        inputs["text_embeds"] = randn(text_width)
        told = torch.tensor([[8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width]])
        inputs["time_ids"] = told[:, :time_ids].repeat(batch, 1)
    elif added is not None:
        raise BuildError(f"expected addition_embed_type None or 'text_time', got {added!r}")
    return inputs


def reference(unet: nn.Module, cut: Cut | Cuts, inputs: Inputs) -> dict[str, Tensor]:
    """What the U-Net itself computes: `noise_pred`, and what is cached of the features that pass the cuts."""
    found: dict[str, Tensor] = {}

    def hook(own: Cut) -> Any:
        def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            feature = arguments[0][:, : own.feature_channels].clone()  # what was joined comes after it
            found.update(zip(own.cached, own.full.cached_of(feature, own.branch_id), strict=True))

        consumer: Any = take_apart(unet).up[own.num_branches - 1 - own.branch_id]
        return consumer.resnet.register_forward_pre_hook(take)

    hooks = [hook(own) for own in _each(cut)]
    try:
        with torch.no_grad():
            noise_pred = call_unet(unet, inputs).sample
    finally:
        for placed in hooks:
            placed.remove()
    return {"noise_pred": noise_pred, **found}


def _each(cut: Cut | Cuts) -> list[Cut]:
    return list(cut.at.values()) if isinstance(cut, Cuts) else [cut]


def exportable_unet(cut: Cut | Cuts, inputs: Inputs, scale: int = 8) -> tuple[Exportable, ...]:
    """The full pass and each shallow one, whose example features are of the shapes that the full one gives.

    `scale` is how many pixels a latent is.
    """
    cuts = _each(cut)
    dtype = next(cuts[0].full.conv_in.parameters()).dtype
    cached = {own.branch_id: _empty_features(own, inputs["sample"], dtype) for own in cuts}
    strides = {"sample": scale, "noise_pred": scale}
    strides |= {name: scale * own.feature_stride for own in cuts for name in own.cached}
    every = tuple(name for own in cuts for name in own.cached)
    full = Exportable("full", _UNet(cuts[0].full), inputs, ("noise_pred", *every), strides)
    shallow = [
        Exportable(
            shallow_role(own.branch_id, cuts[0].branch_id),
            _UNet(own.shallow, dict(zip(own.cached, cuts[0].cached, strict=False))),
            inputs | cached[own.branch_id],
            ("noise_pred", *own.refreshes),
            strides,
        )
        for own in cuts
    ]
    return full, *shallow


def _empty_features(cut: Cut, sample: Tensor, dtype: torch.dtype) -> Inputs:
    """Zeros in place of what is cached.

    Raises: `BuildError` for a size that the cut cannot divide.
    """
    n, _, height, width = sample.shape
    stride = cut.feature_stride
    if height % stride or width % stride:
        raise BuildError(f"expected latent sizes divisible by {stride} at branch {cut.branch_id}, got {height}x{width}")
    return {
        name: torch.zeros(n, channels, height // stride, width // stride, dtype=dtype)
        for name, channels in cut.cached.items()
    }


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


def export_program(part: Exportable, free: Free = Free()) -> tuple[Any, Specs]:
    """A module as a program of `torch.export`, with a free batch size, and what it takes and gives.

    Raises: `BuildError` with the exporter's reason.
    """
    from fastcache_engines.inductor import Program

    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                part.module, (), {"inputs": part.inputs}, dynamic_shapes=_dynamic_shapes(part, free)
            )
    except Exception as error:  # torch.export's errors share no public base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BuildError(f"cannot export the {part.role} program: {reason}") from error
    results: Any = program.graph.output_node().args[0]
    values = [node.meta["val"] for node in results]
    outputs = tuple(
        _spec(part, free, name, value.dtype, value.shape) for name, value in zip(part.outputs, values, strict=True)
    )
    inputs = tuple(_spec(part, free, name, value.dtype, value.shape) for name, value in part.inputs.items())
    return Program(program, tuple(part.inputs), part.outputs), (inputs, outputs)


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
                output_names=list(part.outputs),
                opset_version=OPSET,
                dynamic_shapes=_dynamic_shapes(part, free),
                custom_translation_table=dict(translations or {}),
                dynamo=True,
                optimize=True,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise BuildError(f"cannot export the {part.role} graph: {cause}") from error
    if program is None:
        raise BuildError(f"cannot export the {part.role} graph: the exporter returned nothing")
    graph = program.model.graph
    names = [value.name for value in graph.inputs], [value.name for value in graph.outputs]
    if names != (list(part.inputs), list(part.outputs)):
        raise BuildError(
            f"expected the {part.role} graph to have {list(part.inputs)} -> {list(part.outputs)}, got {names}"
        )
    inputs, outputs = (
        tuple(_onnx_spec(part, free, value) for value in values) for values in (graph.inputs, graph.outputs)
    )
    return program.model, (inputs, outputs)


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
