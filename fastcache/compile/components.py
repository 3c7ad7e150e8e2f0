"""The modules around a U-Net -> what is exported of them: text encoders, and the two halves of a VAE.

They run once a picture. Each has its arithmetic inside, scales and norms included, so that whoever runs it need know
nothing of the model's configuration.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastcache.bundle.manifest import Family, Role
from fastcache.compile.export import Exportable, Inputs
from fastcache.compile.lora import Part
from fastcache.compile.models import VAE
from fastcache_engines import DType, torch_dtype


class _TextEncoder(nn.Module):
    """Token ids -> (N, depth, tokens, width): what the U-Net is given with `clip_skip` 0, 1, ..., and pooled text.

    Stable Diffusion takes the last hidden state and the final norm of it, SDXL the one before, as it is; `clip_skip`
    counts on from there. Source: `encode_prompt` of diffusers' pipelines.
    """

    def __init__(self, encoder: CLIPTextModel | CLIPTextModelWithProjection, family: Family) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooled = isinstance(encoder, CLIPTextModelWithProjection)
        body: Any = getattr(encoder, "text_model", encoder)
        self.norm: Any = body.final_layer_norm if family == "sd" else None

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        found = self.encoder(inputs["input_ids"], output_hidden_states=True)
        states = torch.stack(found.hidden_states[::-1], dim=1)
        states = states[:, 1:] if self.norm is None else self.norm(states)
        return (states, found.text_embeds) if self.pooled else (states,)


class VAEDecoder(nn.Module):
    """Latents as the sampler leaves them -> images in [0, 1]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, getattr(vae, "post_quant_conv", None)
        scale, shift = _scale_and_shift(vae)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, inputs: Inputs) -> Tensor:
        latents = (inputs["latents"] / self.scale.float() + self.shift.float()).to(
            next(self.decoder.parameters()).dtype
        )
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return (self.decoder(latents).float() / 2 + 0.5).clamp(0, 1)


class _VAEEncoder(nn.Module):
    """Images in [-1, 1] -> the mean and the deviation of their latents, as the sampler takes them.

    An AutoencoderTiny's latents have no deviation.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, vae: VAE, scaled: bool) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, getattr(vae, "quant_conv", None)
        self.draws = draws(vae)
        scale, shift = _scale_and_shift(vae) if scaled else (torch.ones(1), torch.zeros(1))
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        moments = self.encoder(inputs["image"].to(next(self.encoder.parameters()).dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        scale = self.scale.float()
        if not self.draws:
            mean = (moments.float() - self.shift.float()) * scale
            return mean, torch.zeros_like(mean)
        mean, log_variance = moments.float().chunk(2, dim=1)
        deviation = torch.exp(log_variance.clamp(-30.0, 20.0) / 2)  # as DiagonalGaussianDistribution of diffusers
        return (mean - self.shift.float()) * scale, deviation * scale


def draws(vae: VAE) -> bool:
    """Whether the latents of a picture are drawn from a distribution: an AutoencoderTiny's are not."""
    return isinstance(vae, AutoencoderKL)


def _scale_and_shift(vae: VAE) -> tuple[Tensor, Tensor]:
    """The sampler's latents are (the VAE's - shift) * scale. Shapes: each (1, C or 1, 1, 1)."""
    config: Any = vae.config
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        mean, deviation = [config.shift_factor or 0.0], [1.0]
    scale = config.scaling_factor / torch.tensor(deviation)
    return scale.view(1, -1, 1, 1), torch.tensor(mean).view(1, -1, 1, 1)


def exportable_text_encoder(
    encoder: CLIPTextModel | CLIPTextModelWithProjection, tokens: int, role: Part, family: Family
) -> Exportable:
    module = _TextEncoder(encoder, family)
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    names = ("hidden_states", "text_embeds") if module.pooled else ("hidden_states",)
    return Exportable(role, module, {"input_ids": ids}, names)


def exportable_vae_decoder(
    vae: VAE, height: int, width: int, scale: int, tile: int | None = None, role: Role = "vae_decoder"
) -> Exportable:
    """Shapes: the latents' `height` and `width`; `scale` is how many pixels each is.

    With a `tile`, in pixels, it decodes squares of that size and nothing else.
    """
    config: Any = vae.config
    sides = (height, width) if tile is None else (tile // scale, tile // scale)
    latents = torch.randn(2, config.latent_channels, *sides, generator=torch.Generator().manual_seed(0))
    strides = {"latents": scale, "image": 1} if tile is None else {}
    return Exportable(role, VAEDecoder(vae), {"latents": latents}, ("image",), strides)


def example_pictures(height: int, width: int) -> Tensor:
    """Two pictures, rings on a gradient and their negative. Shapes: returns (2, 3, height, width), in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    rings = (torch.cos(6 * torch.pi * torch.hypot(x, y)) > 0.5).float()
    picture = torch.stack([0.8 * x * rings, 0.8 * y, rings - 0.5])
    return torch.stack([picture, -picture])


def example_latents(vae: VAE, height: int, width: int) -> Tensor:
    """Latents of `example_pictures`, as the sampler leaves them. Shapes: returns (2, C, h, w)."""
    with torch.no_grad():
        return _VAEEncoder(vae, scaled=True)({"image": example_pictures(height, width)})[0]


def decoded_in(decoder: nn.Module, latents: Tensor, *dtypes: DType) -> list[Tensor]:
    """What a decoder makes of latents in several dtypes; it stays as it is."""
    with torch.no_grad():
        return [deepcopy(decoder).to(torch_dtype(dtype))({"latents": latents}) for dtype in dtypes]


def exportable_vae_encoder(vae: VAE, height: int, width: int, scale: int, *, scaled: bool = True) -> Exportable:
    """Shapes: as `exportable_vae_decoder`. Not `scaled` are the latents that InstructPix2Pix is shown."""
    image = torch.rand(2, 3, height * scale, width * scale, generator=torch.Generator().manual_seed(0)) * 2 - 1
    names = ("latent_mean", "latent_deviation")
    return Exportable(
        "vae_encoder",
        _VAEEncoder(vae, scaled),
        {"image": image},
        names,
        strides={"image": 1} | dict.fromkeys(names, scale),
    )
