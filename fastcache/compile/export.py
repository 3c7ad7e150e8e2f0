"""Torch modules -> ONNX graphs with stable names, a free batch size, and one shared file of weights.

Graphs are exported by torch's dynamo exporter; weights that several graphs use are written once (`save_graphs`).
Knows what a U-Net, a text encoder and a VAE decoder take and give; knows nothing about backends or bundles.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from fastcache.bundle import Role
from fastcache.compile import graph_passes
from fastcache.cut.partition import Cut
from fastcache.cut.unet import take_apart
from fastcache.errors import BuildError
from fastcache_engines import TensorSpec

OPSET = 20
_ALIGNMENT_BYTES = 4096  # lets a backend map the weights file page by page

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Exportable:
    """A module called with one dict of named tensors, an example of it, and the names of what comes out."""

    role: Role
    module: nn.Module
    inputs: Inputs
    outputs: tuple[str, ...]


def call_unet(unet: nn.Module, inputs: Inputs) -> Any:
    """Call a U-Net, or a pass of a cut, with tensors by their ONNX names."""
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    plain = {name: tensor for name, tensor in inputs.items() if name not in added}
    return unet(**plain, **({"added_cond_kwargs": added} if added else {}))


class _UNet(nn.Module):
    """A full or shallow pass whose added conditioning comes as plain named tensors, as in the graph.

    Whatever dtype its layers have, it takes and gives float32, all but the cached feature, which no one else reads.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, inputs: Inputs) -> Any:
        result = call_unet(self.unet, inputs)
        if isinstance(result, tuple):
            return result[0].float(), *result[1:]
        return result.float()


class _TextEncoder(nn.Module):
    """Token ids -> the last hidden state, final norm included."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: Inputs) -> Tensor:
        return self.encoder(inputs["input_ids"]).last_hidden_state


class _VAEDecoder(nn.Module):
    """Latents as the sampler leaves them -> images in [0, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        config: Any = vae.config
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0

    def forward(self, inputs: Inputs) -> Tensor:
        latents = (inputs["latents"] / self.scale + self.shift).to(next(self.decoder.parameters()).dtype)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return (self.decoder(latents).float() / 2 + 0.5).clamp(0, 1)


def unet_inputs(unet: UNet2DConditionModel, batch: int, height: int, width: int, tokens: int) -> Inputs:
    """Seeded example inputs of a U-Net for latents of `height` x `width`, by their ONNX names.

    Raises: `BuildError` for conditioning that engines do not take yet.
    """
    config: Any = unet.config
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    inputs = {
        "sample": randn(config.in_channels, height, width),
        "timestep": torch.linspace(981.0, 441.0, batch),
        "encoder_hidden_states": randn(tokens, config.encoder_hid_dim or config.cross_attention_dim),
    }
    if config.class_embed_type not in (None, "timestep") or config.encoder_hid_dim_type not in (None, "text_proj"):
        raise BuildError(
            f"expected a U-Net conditioned on text, class labels or SDXL's sizes, got class_embed_type="
            f"{config.class_embed_type!r}, encoder_hid_dim_type={config.encoder_hid_dim_type!r}"
        )
    if config.num_class_embeds or config.class_embed_type:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.int64)
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = randn(config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        inputs["text_embeds"] = randn(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        inputs["time_ids"] = torch.tensor([[8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width]]).repeat(
            batch, 1
        )
    elif config.addition_embed_type is not None:
        raise BuildError(f"expected addition_embed_type None or 'text_time', got {config.addition_embed_type!r}")
    return inputs


def reference(unet: nn.Module, cut: Cut, inputs: Inputs) -> dict[str, Tensor]:
    """What the U-Net itself computes: `noise_pred`, and what is cached of the feature that passes the cut."""
    found: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0][:, : cut.feature_channels].clone())  # what was joined comes after it

    consumer: Any = take_apart(unet).up[cut.num_branches - 1 - cut.branch_id]
    hook = consumer.resnet.register_forward_pre_hook(take)
    try:
        with torch.no_grad():
            noise_pred = call_unet(unet, inputs).sample
            cached = cut.full.cached_of(found[0])
    finally:
        hook.remove()
    return {"noise_pred": noise_pred, **dict(zip(cut.cached, cached, strict=True))}


def exportable_unet(cut: Cut, inputs: Inputs) -> tuple[Exportable, Exportable]:
    """The full and the shallow pass, the shallow one's example feature being what the full one gives."""
    n, _, height, width = inputs["sample"].shape
    stride = cut.feature_stride
    if height % stride or width % stride:
        raise BuildError(f"expected latent sizes divisible by {stride} at branch {cut.branch_id}, got {height}x{width}")
    dtype = next(cut.full.conv_in.parameters()).dtype
    cached = {
        name: torch.zeros(n, channels, height // stride, width // stride, dtype=dtype)
        for name, channels in cut.cached.items()
    }
    full = Exportable("full", _UNet(cut.full), inputs, ("noise_pred", *cached))
    return full, Exportable("shallow", _UNet(cut.shallow), inputs | cached, ("noise_pred",))


def exportable_text_encoder(encoder: CLIPTextModel, tokens: int) -> Exportable:
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    return Exportable("text_encoder", _TextEncoder(encoder), {"input_ids": ids}, ("encoder_hidden_states",))


def exportable_vae_decoder(vae: AutoencoderKL, height: int, width: int) -> Exportable:
    config: Any = vae.config
    latents = torch.randn(2, config.latent_channels, height, width, generator=torch.Generator().manual_seed(0))
    return Exportable("vae_decoder", _VAEDecoder(vae), {"latents": latents}, ("image",))


Specs = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # a graph's inputs and outputs

# diffusers' upsampler copies its input at 64 rows or more, without effect on the result; a range that ends before
# lets torch.export succeed at its first attempt, and the graph's batch is free all the same.
_BATCH = torch.export.Dim("batch", min=1, max=63)


def export_program(part: Exportable) -> tuple[Any, Specs]:
    """A module as a program of `torch.export`, with a free batch size, and what it takes and gives.

    Raises: `BuildError` with the exporter's reason.
    """
    from fastcache_engines.inductor import Program

    shapes = {"inputs": {name: {0: _BATCH} for name in part.inputs}}
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(part.module, (), {"inputs": part.inputs}, dynamic_shapes=shapes)
    except Exception as error:  # torch.export's errors share no public base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BuildError(f"cannot export the {part.role} program: {reason}") from error
    results: Any = program.graph.output_node().args[0]
    values = [node.meta["val"] for node in results]
    outputs = tuple(_spec(name, value) for name, value in zip(part.outputs, values, strict=True))
    inputs = tuple(_spec(name, value, free_rows=True) for name, value in part.inputs.items())
    return Program(program, tuple(part.inputs), part.outputs), (inputs, outputs)


def _spec(name: str, value: Any, free_rows: bool = False) -> TensorSpec:
    sizes = [
        "batch" if not isinstance(size, int) or (free_rows and axis == 0) else size
        for axis, size in enumerate(value.shape)
    ]
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(sizes))


def _onnx_spec(value: ir.Value) -> TensorSpec:
    dtype, shape = value.dtype, value.shape
    if dtype is None or shape is None:
        raise BuildError(f"expected the graph's {value.name!r} to have a type and a shape, got neither")
    return TensorSpec(value.name or "", dtype.numpy().name, tuple(d if isinstance(d, int) else "batch" for d in shape))


def export(part: Exportable, translations: graph_passes.Translations | None = None) -> tuple[ir.Model, Specs]:
    """Export one module to ONNX with a free batch size; every other size is the example's.

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
                dynamic_shapes={"inputs": {name: {0: _BATCH} for name in part.inputs}},
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
    inputs, outputs = (tuple(_onnx_spec(value) for value in values) for values in (graph.inputs, graph.outputs))
    names = [spec.name for spec in inputs], [spec.name for spec in outputs]
    if names != (list(part.inputs), list(part.outputs)):
        raise BuildError(
            f"expected the {part.role} graph to have {list(part.inputs)} -> {list(part.outputs)}, got {names}"
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
