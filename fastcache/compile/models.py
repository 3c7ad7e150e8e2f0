"""What a user calls a model (`demo`, a folder, a hub id, a preset) -> its modules and the hash of its weights.

Weights come from safetensors only, and classes from an allow-list: nothing in a model folder is ever executed.
Knows nothing about cuts or engines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fastcache.bundle import sha256_of
from fastcache.compile.presets import PRESETS
from fastcache.demo import MODEL_DIRECTORY
from fastcache.recipe import Component

_PIPELINES = {
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
}
_FOLDERS: dict[Component, tuple[str, ...]] = {
    "unet": ("unet",),
    "vae": ("vae",),
    "text": ("text_encoder", "tokenizer"),
}
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


@dataclass(frozen=True)
class SourceModel:
    """A model found but not loaded: where it is, and what identifies its weights."""

    name: str
    folder: Path | None
    weights_sha256: str
    scheduler: dict[str, Any]
    components: tuple[Component, ...]

    @property
    def random_weights(self) -> bool:
        return self.folder is None

    def load_unet(self) -> UNet2DConditionModel:
        if self.folder is None:
            return _random_unet(self.name)
        return _load(UNet2DConditionModel, self.folder, "unet")

    def load_vae(self) -> AutoencoderKL:
        return _load(AutoencoderKL, self._folder("vae"), "vae")

    def load_text_encoder(self) -> CLIPTextModel:
        return _load(CLIPTextModel, self._folder("text"), "text_encoder")

    def load_tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self._folder("text") / "tokenizer", local_files_only=True)

    def _folder(self, component: Component) -> Path:
        if self.folder is None or component not in self.components:
            raise ValueError(f"model {self.name} has no {component}; it has {', '.join(self.components)}")
        return self.folder


def find_model(name: str, *, random_weights: bool = False, revision: str | None = None) -> SourceModel:
    """Find a model and hash its weights, without loading them.

    Raises: `ValueError` for a name that is nothing known, a folder that is no model, pickled weights, or a class
    that is not on the allow-list.
    """
    if random_weights:
        if name not in PRESETS:
            raise ValueError(f"expected a preset with random weights ({', '.join(PRESETS)}), got {name!r}")
        key = json.dumps([name, PRESETS[name].unet, torch.__version__], sort_keys=True)
        weights = hashlib.sha256(key.encode()).hexdigest()
        return SourceModel(name, None, weights, PRESETS[name].scheduler, ("unet",))
    folder = MODEL_DIRECTORY if name == "demo" else Path(name)
    if not folder.is_dir():
        if name in PRESETS:
            raise ValueError(
                f"{name} is an architecture without weights: add --random-weights, or name a folder or hub id"
            )
        folder = _download(name, revision)
    return _read_folder(name, folder)


def _read_folder(name: str, folder: Path) -> SourceModel:
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ValueError(f"expected a model folder in diffusers' layout (with model_index.json), got {folder}")
    index = _read_json(index_file)
    if str(index.get("_class_name")) not in _PIPELINES:
        raise ValueError(
            f"expected a pipeline of {', '.join(sorted(_PIPELINES))} in {folder}, got {index.get('_class_name')}"
        )
    for part, wanted in _CLASSES.items():
        if index.get(part, wanted) not in (wanted, [None, None], ["diffusers", wanted], ["transformers", wanted]):
            raise ValueError(f"expected {part} of {folder} to be a {wanted}, got {index[part]}")
    components: tuple[Component, ...] = tuple(
        c for c, parts in _FOLDERS.items() if all((folder / p).is_dir() for p in parts)
    )
    if index["_class_name"] == "StableDiffusionXLPipeline":
        components = tuple(c for c in components if c != "text")
    if "unet" not in components:
        raise ValueError(f"expected a unet folder in {folder}, got {', '.join(p.name for p in folder.iterdir())}")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    # diffusers writes lambda_min_clipped = -Infinity, which is its default and no JSON.
    scheduler = {key: value for key, value in scheduler.items() if not _is_infinite(value)}
    if index["_class_name"] != "StableDiffusionXLPipeline":
        scheduler |= {"steps_offset": 1, "clip_sample": False}  # diffusers' pipelines set these, whatever the file says
    return SourceModel(name, folder, _hash_sources(folder, components), scheduler, components)


def _hash_sources(folder: Path, components: tuple[Component, ...]) -> str:
    """The hash of every file that a bundle of these components is made from."""
    files = [folder / "scheduler" / "scheduler_config.json"]
    for part in (folder / name for component in components for name in _FOLDERS[component]):
        if part.name == "tokenizer":
            files += [file for file in part.iterdir() if file.is_file()]
        elif not (part / "config.json").is_file():
            raise ValueError(f"expected a config.json in {part}, got none; save the model again with diffusers")
        else:
            files += [part / "config.json", *_weight_files(part)]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.parent.name}/{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON file {file}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"pickled weights ({', '.join(pickled)}), which can run code when loaded" if pickled else "none"
        raise ValueError(f"expected safetensors weights in {folder}, got {found}; convert them with safetensors")
    return files


def _variant(folder: Path) -> str | None:
    """The `fp16` of `model.fp16.safetensors`, where only that variant is there."""
    stems = {file.name.split("-00")[0].removesuffix(".safetensors").split(".")[-1] for file in _weight_files(folder)}
    return "fp16" if stems == {"fp16"} else None


def _load(kind: Any, folder: Path, part: str) -> Any:
    try:
        model = kind.from_pretrained(
            folder / part,
            use_safetensors=True,
            variant=_variant(folder / part),
            torch_dtype=torch.float32,
            local_files_only=True,
        )
    except Exception as error:  # a damaged file surfaces as any of a dozen classes
        raise ValueError(f"cannot load the {part} of {folder}: {_first_line(error)}") from error
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _random_unet(preset: str) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**PRESETS[preset].unet).eval().requires_grad_(False)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"expected a model folder, a hub id that can be reached, or demo, got {name!r} ({_first_line(error)})"
        ) from None


def state_bytes(module: torch.nn.Module) -> int:
    """The size of a module's parameters and buffers, shared ones once."""
    return sum(t.untyped_storage().nbytes() for t in _distinct(module))


def _distinct(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    return iter({t.untyped_storage().data_ptr(): t for t in module.state_dict().values()}.values())
