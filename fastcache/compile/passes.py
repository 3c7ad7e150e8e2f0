"""A U-Net and its cut -> the passes that are exported, with example inputs, and what the U-Net itself makes of these.

Knows what a U-Net takes and gives, by the names in the graph; what goes around it is in `components.py`, what steers it
in `steering.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from fastcache.bundle.manifest import Parity
from fastcache.bundle.parity import parity_of
from fastcache.compile.export import Exportable, Inputs
from fastcache.compile.lower import widened
from fastcache.cut.names import FULL, shallow_pass
from fastcache.cut.partition import Cut, Cuts
from fastcache.cut.unet import take_apart
from fastcache.errors import BuildError
from fastcache_engines import DType


def call_unet(unet: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a U-Net, or a pass of a cut, with tensors by their ONNX names."""
    added = {name: inputs[name] for name in ("text_embeds", "time_ids", "image_embeds") if name in inputs}
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
    """What the U-Net computes in float32: `noise_pred`, and what is cached of the features that pass the cuts."""
    found: dict[str, Tensor] = {}

    def hook(own: Cut) -> Any:
        def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            feature = arguments[0][:, : own.feature_channels].clone()  # what was joined comes after it
            found.update(zip(own.cached, own.full.cached_of(feature, own.branch_id), strict=True))

        consumer: Any = take_apart(unet).up[own.num_branches - 1 - own.branch_id]
        return consumer.resnet.register_forward_pre_hook(take)

    hooks = [hook(own) for own in _each(cut)]
    try:
        with torch.no_grad(), widened(unet, *(own.full for own in _each(cut))):
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
    full = Exportable(FULL, _UNet(cuts[0].full), inputs, ("noise_pred", *every), strides)
    shallow = [
        Exportable(
            shallow_pass(own.branch_id),
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


def module_parity(parts: Sequence[Exportable], expected: Inputs, dtype: DType) -> Parity:
    """How far the modules of the full pass and the shallow ones are from the model, and from each other."""

    def run(part: Exportable, tensors: Inputs) -> Inputs:
        with torch.no_grad():
            results = part.module({name: tensors[name] for name in part.inputs})
        return dict(zip(part.outputs, results if isinstance(results, tuple) else (results,), strict=True))

    full, *shallow = parts
    of_full = run(full, expected)
    pairs = ((run(part, expected | of_full), of_full) for part in shallow)
    return parity_of("torch", dtype, (of_full, expected), pairs)
