"""A ControlNet, T2I-Adapter or IP-Adapter on disk -> the engines that make of a picture what the passes take of it.

What depends on the picture alone is computed once a run: a ControlNet's embedding of it, a T2I-Adapter's residuals,
IP-Adapter's tokens. What depends on the step, a ControlNet's layers and the attention to tokens, joins the passes
(`steering.py`). Knows modules and their files; knows nothing about backends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, MultiControlNetModel, T2IAdapter
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from fastcache.bundle.manifest import ControlEntry
from fastcache.bundle.recipe import ControlKind
from fastcache.compile.checkpoint import load, require_finite, require_keys, weight_files
from fastcache.compile.export import Exportable, Inputs
from fastcache.compile.lower import split_gates
from fastcache.compile.steering import CONDITIONING_SCALE, EMBEDDING, IP_ADAPTER_INPUTS, RESIDUAL, Controls
from fastcache.cut.unet import take_apart
from fastcache.expect import first_line
from fastcache.files import read_json, sha256_of

_CLASSES: dict[ControlKind, str] = {"controlnet": "ControlNetModel", "t2i_adapter": "T2IAdapter"}
# What a ControlNet must have as its U-Net has it, for its residuals to fit.
_MIRRORED = (
    "block_out_channels",
    "cross_attention_dim",
    "layers_per_block",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
_PROJECTIONS = (ImageProjection, IPAdapterPlusImageProjection, IPAdapterFullImageProjection)


@dataclass(frozen=True)
class Control:
    """A network found but not loaded: a folder, or IP-Adapter's file, and what identifies its weights."""

    path: Path
    entry: ControlEntry


def find_control(kind: ControlKind, name: str) -> Control:
    """Find a network and hash its files.

    Raises: `ValueError` for a path that is not there, pickled weights, or another class.
    """
    path = Path(name)
    if kind == "ip_adapter":
        if path.suffix != ".safetensors" or not path.is_file():
            raise ValueError(f"expected ip_adapter to be a .safetensors file, got {name!r}")
        files = [path, *(_files(_encoder_folder(path)) if _encoder_folder(path).is_dir() else ())]
    else:
        if not path.is_dir():
            raise ValueError(f"expected {kind} to be a folder with a {_CLASSES[kind]}, got {name!r}")
        files = _files(path)
        found = read_json(path / "config.json").get("_class_name")
        if found != _CLASSES[kind]:
            raise ValueError(f"expected a {_CLASSES[kind]} in {path}, got {found}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return Control(path, ControlEntry(kind=kind, name=path.resolve().name, sha256=digest.hexdigest()))


def _files(folder: Path) -> list[Path]:
    return [folder / "config.json", *weight_files(folder)]


def _encoder_folder(file: Path) -> Path:
    """Where diffusers' `load_ip_adapter` looks for the image encoder of an IP-Adapter's file."""
    return file.parent / "image_encoder"


class _Embedding(nn.Module):
    """Pictures in [0, 1] -> a ControlNet's embedding of them.

    In each of SD1.5's shallow steps at 512x512 it would be 7.4 of 39.4 G multiply-adds, of which the ControlNet's other
    layers are 0.5 (branch 0).
    """

    def __init__(self, embedding: nn.Module, flips: bool) -> None:
        super().__init__()
        self.embedding, self.flips = embedding, flips

    def forward(self, inputs: Inputs) -> Tensor:
        image = inputs["controlnet_cond"]
        return self.embedding(image.flip(1) if self.flips else image)


class _OfOne(nn.Module):
    """A module that takes one tensor, called as parts are: a T2I-Adapter, or an IP-Adapter's projection to tokens."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, inputs: Inputs) -> Any:
        found = self.module(inputs[self.name])
        return tuple(found) if isinstance(found, list) else found


class _ImageEncoder(nn.Module):
    """Pictures as CLIP takes them -> embeddings (N, width), or the last layer but one's tokens (N, tokens, width)."""

    def __init__(self, encoder: CLIPVisionModelWithProjection, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.pooled = encoder, pooled

    def forward(self, inputs: Inputs) -> Tensor:
        found = self.encoder(inputs["clip_image"], output_hidden_states=not self.pooled)
        return found.image_embeds if self.pooled else found.hidden_states[-2]


class _Scaled(nn.Module):
    """A linear layer of IP-Adapter's attention for tokens whose last channel is the adapter's scale.

    Attention is linear in its values, so values times the scale are diffusers' scale times the attention's result.
    """

    def __init__(self, linear: nn.Module, scales: bool) -> None:
        super().__init__()
        self.linear, self.scales = linear, scales

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.linear(tokens[..., :-1])
        return h * tokens[..., -1:] if self.scales else h


def load_controls(found: Sequence[Control], unet: Any, sample: Tensor, scale: int) -> Controls:
    """Load networks for a U-Net, which IP-Adapter changes: its attention reads tokens, too.

    Shapes: `sample` (N, C, H, W), the example that theirs are to fit; `scale` is how many pixels a latent is.

    Raises: `ValueError` for files that cannot be read, or are made for another model.
    """
    controls = Controls()
    for control in found:
        _ADD[control.entry.kind](controls, control, unet, sample, scale)
    return controls


def _pictures(sample: Tensor, scale: int, channels: int = 3) -> Tensor:
    n, _, height, width = sample.shape
    return torch.rand(n, channels, scale * height, scale * width, generator=torch.Generator().manual_seed(1))


def _scales(sample: Tensor, count: int = 1) -> Tensor:
    """Shapes: returns (N,), or for several networks (N, count)."""
    scales = torch.linspace(0.5, 1.0, sample.shape[0] * count)
    return scales if count == 1 else scales.view(-1, count)


def _example(part: Exportable) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = part.module(part.inputs)
    return found if isinstance(found, tuple) else (found,)


def _add_controlnet(controls: Controls, control: Control, unet: Any, sample: Tensor, scale: int) -> None:
    net = load(ControlNetModel, control.path)
    for name in _MIRRORED:
        wanted, got = (list(value) if isinstance(value := each.config[name], tuple) else value for each in (unet, net))
        if wanted != got:  # a tuple of a preset's is a list in a file
            raise ValueError(f"expected a ControlNet with the U-Net's {name} {wanted}, got {got} in {control.path}")
    if net.config.global_pool_conditions:
        raise ValueError(f"expected a ControlNet without global_pool_conditions, got {control.path}; use the helper")
    embedding = _Embedding(net.controlnet_cond_embedding, net.config.controlnet_conditioning_channel_order == "bgr")
    net.controlnet_cond_embedding = nn.Identity()
    net.register_to_config(controlnet_conditioning_channel_order="rgb")
    split_gates(net)
    nets: list[Any] = [*(controls.controlnet.nets if controls.controlnet else ()), net]
    controls.controlnet = MultiControlNetModel(nets).eval()
    name = EMBEDDING if len(nets) == 1 else f"{EMBEDDING}_{len(nets)}"
    image = _pictures(sample, scale, net.config.conditioning_channels)
    part = Exportable(name, embedding, {"controlnet_cond": image}, (name,), {"controlnet_cond": 1, name: scale})
    controls.inputs |= {name: _example(part)[0], CONDITIONING_SCALE: _scales(sample, len(nets))}
    controls.strides |= {name: scale}
    controls.parts.append(part)


def _add_t2i_adapter(controls: Controls, control: Control, unet: Any, sample: Tensor, scale: int) -> None:
    adapter, parts = load(T2IAdapter, control.path), take_apart(unet)
    channels = adapter.config.in_channels
    image = _pictures(sample, scale, channels)
    module = _OfOne(adapter, "adapter_image")
    examples = _example(Exportable("t2i_adapter", module, {"adapter_image": image}, ()))
    names = tuple(f"{RESIDUAL}{i}" for i in range(len(examples)))
    wanted = [(parts.skip_channels[i + 1], sample.shape[2] // parts.skip_strides[i + 1]) for i in parts.adapted]
    got = [(example.shape[1], example.shape[2]) for example in examples]
    if got[: len(wanted)] != wanted:
        raise ValueError(f"expected a T2I-Adapter of channels and rows {wanted} for this U-Net, got {got}")
    strides = {name: image.shape[2] // example.shape[2] for name, example in zip(names, examples, strict=True)}
    controls.inputs |= dict(zip(names, examples, strict=True))
    controls.strides |= strides
    controls.adapted = parts.adapted
    controls.parts.append(
        Exportable("t2i_adapter", module, {"adapter_image": image}, names, {"adapter_image": 1, **strides})
    )


def _add_ip_adapter(controls: Controls, control: Control, unet: Any, sample: Tensor, scale: int) -> None:
    weights = _ip_adapter_weights(control.path)
    _require_attention(weights["ip_adapter"], unet, control.path)
    try:
        unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    except Exception as error:  # torch's and diffusers' own
        raise ValueError(f"cannot load the IP-Adapter {control.path} into this U-Net: {first_line(error)}") from error
    unet.eval().requires_grad_(False)
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    unet.encoder_hid_proj = nn.Identity()  # the passes are given what it makes
    if not isinstance(projection, _PROJECTIONS):
        raise ValueError(
            f"expected an IP-Adapter of pictures, got {type(projection).__name__} in {control.path}; use the helper"
        )
    for processor in unet.attn_processors.values():
        for name in ("to_k_ip", "to_v_ip"):
            if hasattr(processor, name):
                layers = getattr(processor, name)
                layers[0] = _Scaled(layers[0], scales=name == "to_v_ip")
    embeds = _embeds(controls, control, projection, sample.shape[0])
    part = Exportable("ip_adapter", _OfOne(projection, "image_embeds"), {"image_embeds": embeds}, ("ip_tokens",))
    controls.inputs |= dict(zip(IP_ADAPTER_INPUTS, (_example(part)[0], _scales(sample)), strict=True))
    controls.parts.append(part)


def _ip_adapter_weights(file: Path) -> dict[str, dict[str, Tensor]]:
    """As diffusers reads them. Raises: `ValueError` for a file that is no IP-Adapter's, or one of faces."""
    weights: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    try:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (no dict)
                group, _, name = key.partition(".")
                weights.setdefault(group, {})[name] = stored.get_tensor(key).float()
    except Exception as error:  # safetensors' own
        raise ValueError(f"cannot read the IP-Adapter {file}: {first_line(error)}") from error
    if not all(weights.values()) or len(weights) > 2:
        raise ValueError(f"expected image_proj and ip_adapter weights in {file}, got {', '.join(sorted(weights))}")
    for group in weights.values():
        require_finite(group, str(file))
    if any("lora" in name for name in weights["ip_adapter"]):
        raise ValueError(f"expected an IP-Adapter of pictures, got one of faces with a LoRA in {file}; use the helper")
    return weights


def _require_attention(given: Collection[str], unet: Any, file: Path) -> None:
    """Keys and values for each cross-attention and no more; diffusers counts them by odd numbers."""
    crossing = sum(not name.endswith("attn1.processor") for name in unet.attn_processors)
    wanted = {f"{2 * i + 1}.{part}.weight" for i in range(crossing) for part in ("to_k_ip", "to_v_ip")}
    require_keys(wanted - set(given), set(given) - wanted, str(file))


def _embeds(controls: Controls, control: Control, projection: nn.Module, rows: int) -> Tensor:
    """Example embeddings; where the image encoder lies beside the adapter, its engine is made, too."""
    folder, pooled = _encoder_folder(control.path), isinstance(projection, ImageProjection)
    if folder.is_dir():
        encoder = load(CLIPVisionModelWithProjection, folder)
        size = encoder.config.image_size
        image = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))
        part = Exportable("image_encoder", _ImageEncoder(encoder, pooled), {"clip_image": image}, ("image_embeds",))
        controls.parts.append(part)
        return _example(part)[0]
    if not pooled:
        raise ValueError(f"expected an image encoder in {folder}, which {control.path.name} goes with, got none")
    inner: Any = projection
    width = inner.image_embeds.in_features
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


_ADD = {"controlnet": _add_controlnet, "t2i_adapter": _add_t2i_adapter, "ip_adapter": _add_ip_adapter}
