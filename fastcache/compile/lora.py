"""LoRA files -> the weights of a U-Net or text encoder with them merged in, as diffusers' `fuse_lora` merges them.

Only safetensors are read. Needs peft, which diffusers loads LoRAs with. Knows nothing about what is built of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffusers.configuration_utils import FrozenDict
from torch import nn

from fastcache.bundle.manifest import Family, LoraEntry
from fastcache.bundle.recipe import Lora
from fastcache.errors import BackendUnavailable
from fastcache.files import sha256_of

Part = Literal["unet", "text_encoder", "text_encoder_2"]
Model = TypeVar("Model", bound=nn.Module)


def entry_of(lora: Lora) -> LoraEntry:
    """What identifies a LoRA.

    Raises: `ValueError` for a file that is not there or no safetensors; `BackendUnavailable` without peft.
    """
    file = Path(lora.path)
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(f"expected a LoRA as PATH[:WEIGHT], PATH a .safetensors file, got {lora.path!r}")
    if importlib.util.find_spec("peft") is None:
        raise BackendUnavailable(
            "merging a LoRA needs peft, which is not installed; run: pip install 'fastcache[lora]'"
        )
    return LoraEntry(name=file.name, sha256=sha256_of(file), weight=lora.weight)


def merge(model: Model, part: Part, family: Family, unet_config: Mapping[str, Any], loras: Sequence[Lora]) -> Model:
    """Merge into a model, in place, what LoRAs hold for it; the layers are its own again afterwards.

    `unet_config` names the blocks for files that number them, as those for SDXL often do.

    Raises: `ValueError` for a file that cannot be read, or is made for another model.
    """
    for i, lora in enumerate(loras):
        try:
            _merge_one(model, part, family, unet_config, lora, f"lora_{i}")
        except Exception as error:  # safetensors', peft's and torch's own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot merge {lora.path} into the {part}: {reason}") from error
    return model.eval().requires_grad_(False)


def _merge_one(model: Any, part: Part, family: Family, unet_config: Mapping[str, Any], lora: Lora, name: str) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.lora_base import fuse_text_encoder_lora
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    loader: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    file = Path(lora.path)
    weights, alphas, metadata = loader.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
        unet_config=FrozenDict(unet_config) if family == "sdxl" else None,
    )
    known = ("unet.", "text_encoder.", "text_encoder_2.")
    if not weights or not all("lora" in key and key.startswith(known) for key in weights):
        strange = next((key for key in weights if "lora" not in key or not key.startswith(known)), "nothing")
        raise ValueError(f"expected LoRA weights of a unet or text encoder, got {strange}")
    if not any(key.startswith(f"{part}.") for key in weights):
        return
    if part == "unet":
        loader.load_lora_into_unet(weights, alphas, model, adapter_name=name, metadata=metadata)
        model.fuse_lora(lora.weight, adapter_names=[name])
        model.unload_lora()
    else:
        loader.load_lora_into_text_encoder(weights, alphas, model, prefix=part, adapter_name=name, metadata=metadata)
        fuse_text_encoder_lora(model, lora_scale=lora.weight, adapter_names=[name])
        recurse_remove_peft_layers(model)
        del model.peft_config
