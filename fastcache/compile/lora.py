"""LoRA files -> the weights of a U-Net or text encoder with them merged in, as diffusers' `fuse_lora` merges them.

Only safetensors are read, and every tensor of theirs must have found its layer. Needs peft, which diffusers loads LoRAs
with. Knows nothing about what is built of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file
from torch import Tensor, nn

from fastcache.bundle.manifest import Family, LoraEntry
from fastcache.bundle.recipe import Lora
from fastcache.compile.checkpoint import require_finite, require_keys
from fastcache.errors import BackendUnavailable
from fastcache.expect import first_line
from fastcache.files import sha256_of
from fastcache_engines.extras import install

Part = Literal["unet", "text_encoder", "text_encoder_2"]
Model = TypeVar("Model", bound=nn.Module)

_PARTS: Final[Mapping[Family, tuple[Part, ...]]] = {
    "sd": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
}
# How peft may fill layers before the file's tensors come; its others change the model's own weights, too.
_HARMLESS_INITS: Final = (True, False, None, "gaussian", "orthogonal")


def entry_of(lora: Lora) -> LoraEntry:
    """What identifies a LoRA.

    Raises: `ValueError` for a file that is not there or no safetensors; `BackendUnavailable` without peft.
    """
    file = Path(lora.path)
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(f"expected a LoRA as PATH[:WEIGHT], PATH a .safetensors file, got {lora.path!r}")
    if importlib.util.find_spec("peft") is None:
        raise BackendUnavailable(f"merging a LoRA needs peft, which is not installed; run: {install('lora')}")
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
            raise ValueError(f"cannot merge {lora.path} into the {part}: {first_line(error)}") from error
    return model.eval().requires_grad_(False)


def _merge_one(model: Any, part: Part, family: Family, unet_config: Mapping[str, Any], lora: Lora, name: str) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.lora_base import fuse_text_encoder_lora
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    loader: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    file = Path(lora.path)
    _check_tensors(load_file(file))
    weights, alphas, metadata = loader.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
        unet_config=FrozenDict(unet_config) if family == "sdxl" else None,
    )
    parts = _PARTS[family]
    known = tuple(f"{each}." for each in parts)
    if not weights or not all("lora" in key and key.startswith(known) for key in weights):
        strange = next((key for key in weights if "lora" not in key or not key.startswith(known)), "nothing")
        raise ValueError(f"expected LoRA weights of {' or '.join(parts)}, got {strange}")
    own = _by_peft_names(weights, part, model)
    if not own:
        return
    _check_metadata(metadata or {}, own)
    if part == "unet":
        loader.load_lora_into_unet(weights, alphas, model, adapter_name=name, metadata=metadata)
        _require_all_used(model, own, name)
        model.fuse_lora(lora.weight, adapter_names=[name])
        model.unload_lora()
    else:
        loader.load_lora_into_text_encoder(weights, alphas, model, prefix=part, adapter_name=name, metadata=metadata)
        _require_all_used(model, own, name)
        fuse_text_encoder_lora(model, lora_scale=lora.weight, adapter_names=[name])
        recurse_remove_peft_layers(model)
        del model.peft_config
    require_finite(model.state_dict(), "the merged model")


def _check_tensors(stored: Mapping[str, Tensor]) -> None:
    """Refuse NaN, and what diffusers leaves out with a warning."""
    require_finite(stored, "the file")
    scale = next((key for key in stored if "dora_scale" in key), None)
    if scale is not None:
        raise ValueError(f"expected a LoRA without DoRA's scales, which diffusers does not merge, got {scale}")


def _by_peft_names(weights: Mapping[str, Tensor], part: Part, model: Any) -> dict[str, Tensor]:
    """A part's tensors by the names that peft has for them, which is what diffusers' loaders turn them into."""
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    own: dict[str, Any] = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
    if not own:
        return {}
    if part == "unet":
        return own if "lora_A" in next(iter(own)) else convert_unet_state_dict_to_peft(own)
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    return own if hasattr(model, "text_model") else {k.removeprefix("text_model."): v for k, v in own.items()}


def _check_metadata(metadata: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """The file's metadata is peft's configuration: layers of another rank than the tensors' would be made for it."""
    ranks = {tensor.shape[0] for name, tensor in own.items() if "lora_A" in name}
    for name, value in metadata.items():
        field = name.rpartition(".")[2]
        claimed = value.values() if field == "rank_pattern" else [value] if field == "r" else []
        for rank in claimed:
            if rank not in ranks:
                raise ValueError(f"expected metadata of the tensors' rank {sorted(ranks)}, got {name} of {rank}")
        if field == "init_lora_weights" and value not in _HARMLESS_INITS:
            raise ValueError(f"expected a LoRA that leaves the model's own weights alone, got {name} {value!r}")


def _require_all_used(model: Any, own: Mapping[str, Tensor], adapter: str) -> None:
    """Both halves of each layer came from the file, and each of its tensors found a layer."""
    from peft import get_peft_model_state_dict

    made: dict[str, Any] = get_peft_model_state_dict(model, adapter_name=adapter)
    require_keys(made.keys() - own.keys(), own.keys() - made.keys(), "the file")
