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

EMBEDS = 12
_IMAGE_SIZE = 32


def save_controlnet(folder: Path, model: Path, seed: int = 2, **changes: Any) -> Path:
    """A ControlNet of the model's U-Net; `changes` are those of its configuration."""
    torch.manual_seed(seed)
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
    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet")
    weights = ip_adapter_weights(unet, plus=plus)
    folder.mkdir(parents=True, exist_ok=True)
    if encoder:
        config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=EMBEDS,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=_IMAGE_SIZE,
            patch_size=16,
        )
        vary(CLIPVisionModelWithProjection(config), 0.05).save_pretrained(folder / "image_encoder")
    file = folder / "ip-adapter.safetensors"
    save_file({f"{part}.{name}": value for part, own in weights.items() for name, value in own.items()}, file)
    return file


def load_ip_adapter(unet: Any) -> None:
    """Give a live U-Net an IP-Adapter; its image embeddings are `EMBEDS` wide."""
    unet._load_ip_adapter_weights([ip_adapter_weights(unet)])


def ip_adapter_weights(unet: Any, *, plus: bool = False) -> dict[str, dict[str, Tensor]]:
    """An image projection, and keys and values for each cross-attention, named as in the published files."""
    torch.manual_seed(4)
    width: int = unet.config.cross_attention_dim
    projection, keys = _resampler(width) if plus else _projection(width), dict[str, Tensor]()
    crossing = [name for name in unet.attn_processors if "attn2" in name and "motion" not in name]
    for index, name in enumerate(crossing):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for which in ("to_k_ip", "to_v_ip"):
            keys[f"{2 * index + 1}.{which}.weight"] = torch.randn(attention.to_k.out_features, width) * 0.3
    return {"image_proj": projection, "ip_adapter": keys}


def _projection(width: int) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(4 * width, EMBEDS),
        "proj.bias": torch.randn(4 * width),
        "norm.weight": torch.randn(width),
        "norm.bias": torch.randn(width),
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
    return {name: torch.randn(*shape) * 0.3 for name, shape in sizes.items()}
