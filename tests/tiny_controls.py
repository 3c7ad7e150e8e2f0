"""A ControlNet, a T2I-Adapter and an IP-Adapter of random weights, for the tiny model's U-Net, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tiny_model import vary

_EMBEDS = 12
_IMAGE_SIZE = 32


def save_controlnet(folder: Path, model: Path, **changes: Any) -> Path:
    """A ControlNet of the model's U-Net; `changes` are those of its configuration."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    # As many halvings as the tiny VAE's, whose latents are a quarter of the picture.
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16))
    if changes:
        net = ControlNetModel.from_config(dict(net.config) | changes)
    vary(net, 0.1).save_pretrained(folder)
    return folder


def save_t2i_adapter(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(3)
    config: dict[str, Any] = {"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 4} | changes
    vary(T2IAdapter(**config), 0.05).save_pretrained(folder)
    return folder


def save_ip_adapter(folder: Path, model: Path, *, plus: bool = False, encoder: bool = True) -> Path:
    """The adapter's file, in the published files' layout, and beside it its image encoder."""
    torch.manual_seed(4)
    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet")
    width: int = unet.config.cross_attention_dim
    weights = _resampler(width) if plus else _projection(width)
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(crossing):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for which in ("to_k_ip", "to_v_ip"):
            shape = attention.to_k.out_features, width
            weights[f"ip_adapter.{2 * index + 1}.{which}.weight"] = torch.randn(*shape) * 0.3
    folder.mkdir(parents=True, exist_ok=True)
    if encoder:
        config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=_EMBEDS,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=_IMAGE_SIZE,
            patch_size=16,
        )
        vary(CLIPVisionModelWithProjection(config), 0.05).save_pretrained(folder / "image_encoder")
    file = folder / "ip-adapter.safetensors"
    save_file(weights, file)
    return file


def _projection(width: int) -> dict[str, Tensor]:
    return {
        "image_proj.proj.weight": torch.randn(4 * width, _EMBEDS),
        "image_proj.proj.bias": torch.randn(4 * width),
        "image_proj.norm.weight": torch.randn(width),
        "image_proj.norm.bias": torch.randn(width),
    }


def _resampler(width: int) -> dict[str, Tensor]:
    """IP-Adapter Plus: two queries, and the class's own four layers, of the encoder's width of 16."""
    inner, heads = 16, 64  # the class reads its heads from 64 channels each
    norm: dict[str, tuple[int, ...]] = {"weight": (inner,), "bias": (inner,)}
    layer: dict[str, tuple[int, ...]] = {
        **{f"0.{name}.{part}": shape for name in ("norm1", "norm2") for part, shape in norm.items()},
        "0.to_q.weight": (heads, inner),
        "0.to_kv.weight": (2 * heads, inner),
        "0.to_out.weight": (inner, heads),
        **{f"1.0.{part}": shape for part, shape in norm.items()},
        "1.1.weight": (4 * inner, inner),
        "1.3.weight": (inner, 4 * inner),
    }
    sizes: dict[str, tuple[int, ...]] = {
        "latents": (1, 2, inner),
        "proj_in.weight": (inner, 16),
        "proj_in.bias": (inner,),
        "proj_out.weight": (width, inner),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
        **{f"layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()},
    }
    return {f"image_proj.{name}": torch.randn(*shape) * 0.3 for name, shape in sizes.items()}
