"""What a user calls a model (`demo`, a folder, a hub id, a preset) -> its modules and the hash of its weights.

Weights come from safetensors only, and classes from an allow-list: nothing in a model folder is ever executed.
Knows nothing about cuts or engines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    UNet2DConditionModel,
    UNet2DModel,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastcache.bundle.manifest import Family, LoraEntry
from fastcache.bundle.recipe import Component, ControlKind, Lora
from fastcache.compile import lora
from fastcache.compile.checkpoint import load, weight_files
from fastcache.compile.controls import Control, find_control
from fastcache.compile.presets import PRESETS
from fastcache.demo import MODEL_DIRECTORY
from fastcache.expect import first_line
from fastcache.files import read_json, sha256_of

_PIPELINES: dict[str, Family] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionInstructPix2PixPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
}
VAE = AutoencoderKL | AutoencoderTiny
_VAES: dict[str, type[VAE]] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
DEFAULTS = "fastcache.json"  # in a model's folder, what it draws best with: {"guidance_scale": 4.0}
# Each part of a pipeline that is read: its component, and the classes of which it must be one.
_PARTS: dict[str, tuple[Component, tuple[str, ...]]] = {
    "unet": ("unet", ("UNet2DConditionModel",)),
    "vae": ("vae", tuple(_VAES)),
    "text_encoder": ("text", ("CLIPTextModel",)),
    "text_encoder_2": ("text", ("CLIPTextModelWithProjection",)),
    "tokenizer": ("text", ("CLIPTokenizer",)),
    "tokenizer_2": ("text", ("CLIPTokenizer",)),
}
_TEXT_CLASSES: dict[lora.Part, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
TOKENIZERS: dict[lora.Part, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class SourceModel:
    """A model found but not loaded: where it is, and what identifies its weights.

    `parts` are the subfolders it is read from, `pipeline` is its class in diffusers, `settings` what that is configured
    with, and `defaults` what its folder says of how it draws best. LoRAs are merged into whatever is loaded; `controls`
    lie beside it, and so may a VAE that takes the place of its own.
    """

    name: str
    folder: Path | None
    weights_sha256: str
    scheduler: dict[str, Any]
    components: tuple[Component, ...]
    family: Family = "sd"
    parts: tuple[str, ...] = ("unet",)
    settings: dict[str, Any] = field(default_factory=dict)
    loras: tuple[tuple[Lora, LoraEntry], ...] = ()
    controls: tuple[Control, ...] = ()
    pipeline: str = "StableDiffusionPipeline"
    defaults: dict[str, Any] = field(default_factory=dict)
    vae: Path | None = None
    preview_vae: Path | None = None

    @property
    def random_weights(self) -> bool:
        return self.folder is None

    @property
    def text_encoders(self) -> tuple[lora.Part, ...]:
        """The names of its text encoders, in the order in which what they make of a prompt is joined."""
        return tuple(name for name in _TEXT_CLASSES if name in self.parts)

    def require_engines(self) -> None:
        """Refuse what a bundle's pipeline would draw wrongly, or not at all. Raises: `ValueError`."""
        self.require_pictures()
        if self.folder is None:
            return
        width = read_json(self.folder / "unet" / "config.json").get("time_cond_proj_dim")
        if width is not None:
            raise ValueError(
                f"expected a U-Net without time_cond_proj_dim, which a distilled LCM is told its guidance by, got "
                f"{width} in {self.folder}; use the helper, or an LCM LoRA with the model that it was made for"
            )
        # Of diffusers' pipelines, Stable Diffusion's look at this and SDXL's do not.
        for name in self.text_encoders if self.family == "sd" else ():
            if read_json(self.folder / name / "config.json").get("use_attention_mask"):
                raise ValueError(
                    f"expected a text encoder without use_attention_mask, got one with it in {self.folder / name}; "
                    "use the helper"
                )

    def require_pictures(self) -> None:
        """Raises: `ValueError` for a model of videos, which have no loop here."""
        if self.folder is None and PRESETS[self.name].unet_class is UNetSpatioTemporalConditionModel:
            raise ValueError(
                f"expected a model of pictures, got {self.name}, a model of videos: inspect counts its work and "
                "fastcache.partition_unet cuts it, but no engines are built of it yet"
            )

    def load_unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel | UNet2DModel:
        """The U-Net in float32; one of random weights in `dtype`, which for SDXL is 5 GB in place of 10."""
        if self.folder is None:
            # UNet2DModel rounds its timesteps to its own dtype, and a LoRA is added to weights as they were trained.
            narrows = PRESETS[self.name].unet_class is UNet2DConditionModel and not self.loras
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                unet = PRESETS[self.name].make(dtype if narrows else torch.float32)
        else:
            unet = load(UNet2DConditionModel, self.folder / "unet")
        return self._merged(unet, "unet")

    @property
    def vae_folder(self) -> Path | None:
        """Where its VAE is, if it has one."""
        if self.vae is not None or self.folder is None or "vae" not in self.components:
            return self.vae
        return self.folder / "vae"

    def load_vae(self) -> VAE:
        folder = self.vae_folder or self._folder("vae")
        return load(_vae_class(folder), folder)

    def load_preview_vae(self) -> VAE | None:
        """The one for pictures on their way, if there is one."""
        return None if self.preview_vae is None else load(_vae_class(self.preview_vae), self.preview_vae)

    def load_text_encoder(self, name: lora.Part = "text_encoder") -> CLIPTextModel | CLIPTextModelWithProjection:
        return self._merged(load(_TEXT_CLASSES[name], self._folder("text") / name), name)

    def load_tokenizer(self, name: lora.Part = "text_encoder") -> CLIPTokenizer:
        folder = self._folder("text") / TOKENIZERS[name]
        try:
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # tokenizers' own, and whatever a damaged file gives
            raise ValueError(f"cannot load the {folder.name} of {folder.parent}: {first_line(error)}") from error

    def _merged(self, model: lora.Model, part: lora.Part) -> lora.Model:
        if not self.loras:
            return model
        config = PRESETS[self.name].unet if self.folder is None else read_json(self.folder / "unet" / "config.json")
        return lora.merge(model, part, self.family, config, [chosen for chosen, _ in self.loras])

    def _folder(self, component: Component) -> Path:
        if self.folder is None or component not in self.components:
            raise ValueError(f"model {self.name} has no {component}; it has {', '.join(self.components)}")
        return self.folder


def find_model(
    name: str,
    *,
    random_weights: bool = False,
    revision: str | None = None,
    loras: Sequence[Lora] = (),
    controls: Mapping[ControlKind, Sequence[str]] | None = None,
    vae: str | None = None,
    preview_vae: str | None = None,
) -> SourceModel:
    """Find a model and hash its weights, without loading them; LoRAs and networks beside it count among the weights.

    `vae` is the folder of another VAE than its own, `preview_vae` that of one for pictures on their way.

    Raises: `ValueError` for a name that is nothing known, a folder that is no model, pickled weights, or a class
    that is not on the allow-list.
    """
    found = _find(name, random_weights, revision)
    beside = tuple(find_control(kind, path) for kind, paths in (controls or {}).items() for path in paths)
    if not (loras or beside or vae or preview_vae):
        return found
    entries = [lora.entry_of(chosen) for chosen in loras]
    identity: list[Any] = [found.weights_sha256, *([entry.sha256, entry.weight] for entry in entries)]
    identity += [[control.entry.kind, control.entry.sha256] for control in beside]
    own_vae, small_vae = (None if folder is None else Path(folder) for folder in (vae, preview_vae))
    for folder, part in (own_vae, []), (small_vae, ["preview"]):
        if folder is not None:
            _vae_class(folder, "preview_vae" if part else "vae")
            identity.append([*part, *(sha256_of(file) for file in (folder / "config.json", *weight_files(folder)))])
    components = found.components if own_vae is None else tuple(dict.fromkeys((*found.components, "vae")))
    return replace(
        found,
        weights_sha256=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        loras=tuple(zip(loras, entries, strict=True)),
        controls=beside,
        vae=own_vae,
        preview_vae=small_vae,
        components=components,
    )


def _vae_class(folder: Path, field: str = "vae") -> type[VAE]:
    """The class of the VAE in a folder that a recipe's field names. Raises: `ValueError` for anything else."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"expected {field} to be a VAE's folder (with config.json), got {str(folder)!r}; give the one that has it"
        )
    name = read_json(folder / "config.json").get("_class_name")
    if name not in _VAES:
        raise ValueError(f"expected {' or '.join(_VAES)} as {field} in {str(folder)!r}, got {name}; give another VAE")
    return _VAES[name]


def _find(name: str, random_weights: bool, revision: str | None) -> SourceModel:
    if random_weights:
        if name not in PRESETS:
            raise ValueError(f"expected a preset with random weights ({', '.join(PRESETS)}), got {name!r}")
        key = json.dumps([name, PRESETS[name].unet, torch.__version__, "by layer"], sort_keys=True)
        weights = hashlib.sha256(key.encode()).hexdigest()
        family: Family = "sdxl" if "addition_embed_type" in PRESETS[name].unet else "sd"
        scheduler, settings = PRESETS[name].scheduler, PRESETS[name].settings
        pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
        return SourceModel(name, None, weights, scheduler, ("unet",), family, settings=settings, pipeline=pipeline)
    folder = MODEL_DIRECTORY if name == "demo" else Path(name)
    if not folder.is_dir():
        if name in PRESETS:
            raise ValueError(
                f"{name} is an architecture without weights: add --random-weights, or name a folder or hub id"
            )
        if folder.is_file():
            convert = f"StableDiffusionPipeline as P; P.from_single_file({name!r}).save_pretrained('MODEL')"
            raise ValueError(
                f"expected a model folder in diffusers' layout, got the file {name}; convert it, online once for its "
                f'configuration: python -c "from diffusers import {convert}" (StableDiffusionXLPipeline for SDXL)'
            )
        if name[:1] in ("/", ".", "~") or name.count("/") > 1:
            raise ValueError(f"expected a model folder, got {name}, which is not there; give its path, or a hub id")
        folder = _download(name, revision)
    return _read_folder(name, folder)


def _read_folder(name: str, folder: Path) -> SourceModel:
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ValueError(f"expected a model folder in diffusers' layout (with model_index.json), got {folder}")
    index = read_json(index_file)
    family = _PIPELINES.get(str(index.get("_class_name")))
    if family is None:
        raise ValueError(
            f"expected a pipeline of {', '.join(sorted(_PIPELINES))} in {folder}, got {index.get('_class_name')}"
        )
    for part, (_, kinds) in _PARTS.items():
        allowed = [[library, kind] for library in ("diffusers", "transformers") for kind in kinds]
        if index.get(part) not in (None, *kinds, [None, None], *allowed):
            raise ValueError(f"expected {part} of {folder} to be of class {' or '.join(kinds)}, got {index[part]}")
    parts = tuple(part for part in _PARTS if (folder / part).is_dir() and index.get(part) != [None, None])
    if any((encoder in parts) != (tokenizer in parts) for encoder, tokenizer in TOKENIZERS.items()):
        parts = tuple(part for part in parts if _PARTS[part][0] != "text")  # text that cannot be encoded
    components: tuple[Component, ...] = tuple(dict.fromkeys(_PARTS[part][0] for part in parts))
    if "unet" not in components:
        raise ValueError(f"expected a unet folder in {folder}, got {', '.join(p.name for p in folder.iterdir())}")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    # diffusers writes lambda_min_clipped = -Infinity, which is its default and no JSON.
    scheduler = {key: value for key, value in scheduler.items() if not isinstance(value, float) or math.isfinite(value)}
    if family == "sd":
        scheduler |= {"steps_offset": 1, "clip_sample": False}  # diffusers' pipelines set these, whatever the file says
    settings = {key: index[key] for key in _SETTINGS if key in index}
    pipeline = str(index["_class_name"])
    defaults = read_json(folder / DEFAULTS) if (folder / DEFAULTS).is_file() else {}
    weights = _hash_sources(folder, parts, {**settings, "pipeline": pipeline, "defaults": defaults})
    return SourceModel(
        name, folder, weights, scheduler, components, family, parts, settings, pipeline=pipeline, defaults=defaults
    )


_SETTINGS = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")


def _hash_sources(folder: Path, parts: tuple[str, ...], settings: dict[str, Any]) -> str:
    """The hash of every file that a bundle of these parts is made from."""
    files = [folder / "scheduler" / "scheduler_config.json"]
    for part in (folder / name for name in parts):
        if part.name in TOKENIZERS.values():
            files += [file for file in part.iterdir() if file.is_file()]
        elif not (part / "config.json").is_file():
            raise ValueError(f"expected a config.json in {part}, got none; save the model again with diffusers")
        else:
            files += [part / "config.json", *weight_files(part)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in sorted(files):
        digest.update(f"{file.parent.name}/{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["model_index.json", DEFAULTS, "*/*.json", "*/*.txt", "*/*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"expected a model folder, a hub id that can be reached, or demo, got {name!r} ({first_line(error)})"
        ) from None


def state_bytes(module: torch.nn.Module) -> int:
    """The size of a module's parameters and buffers, shared ones once."""
    storages = (tensor.untyped_storage() for tensor in module.state_dict().values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
