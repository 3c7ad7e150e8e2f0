"""A module's folder of weights -> the module, whose every tensor the folder gave, and gave as a number.

What a checkpoint must hold is said here for every component: safetensors and nothing else, each tensor that the module
has, no other, and no NaN. Knows files and tensors; knows nothing about what the modules are for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache.expect import first_line
from fastcache.files import read_json

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def weight_files(folder: Path) -> list[Path]:
    """What decides a folder's weights: its safetensors, and the indexes that say which of them holds which tensor.

    Raises: `ValueError` where there are none, or pickles in their place, also where an index names them.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLED)
        found = f"pickled weights ({', '.join(pickled)}), which can run code when loaded" if pickled else "none"
        raise ValueError(f"expected safetensors weights in {folder}, got {found}; convert them with safetensors")
    if (folder / "adapter_config.json").exists():
        # transformers would load the adapter with the model, and even another model in its place.
        raise ValueError(f"expected a model without a PEFT adapter in {folder}, got adapter_config.json; use --lora")
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    for index in indexes:
        _check_index(index, {file.name for file in files})
    return files + indexes


def _check_index(index: Path, files: Collection[str]) -> None:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"expected a weight_map in {index}, got none; save the model again with diffusers")
    for tensor, file in places.items():
        if file not in files:
            raise ValueError(
                f"expected {index} to name safetensors files beside it, got {file!r} for {tensor}; "
                "save the model again with diffusers"
            )


def load(kind: Any, folder: Path) -> Any:
    """A module of diffusers or transformers in float32, from a folder of its own.

    Raises: `ValueError` for files that cannot be read, or do not hold the module's tensors, naming the first.
    """
    try:
        model, found = kind.from_pretrained(
            folder,
            use_safetensors=True,
            variant=_variant(folder),
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged file surfaces as any of a dozen classes
        raise ValueError(f"cannot load the {folder.name} of {folder.parent}: {first_line(error)}") from error
    require_keys(found["missing_keys"], found["unexpected_keys"], str(folder))
    require_finite(model.state_dict(), str(folder))
    return model.eval().requires_grad_(False)


def require_keys(missing: Collection[str], unexpected: Collection[str], where: str) -> None:
    """Refuse weights that lack a tensor, which would stay random, or hold one that belongs to another model.

    Raises: `ValueError` naming the first.
    """
    if missing:
        raise ValueError(
            f"expected every tensor of the model in {where}, got none for {_named(missing)}; save the model again"
        )
    if unexpected:
        raise ValueError(
            f"expected the model's tensors alone in {where}, got also {_named(unexpected)}; "
            "they belong to another model, or its configuration is not this one"
        )


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights with NaN or infinity in them. Raises: `ValueError` naming the first tensor."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            # The two ends in one reading and without a copy; NaN is passed on.
            low, high = torch.aminmax(tensor.detach())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise ValueError(f"expected finite weights in {where}, got NaN or infinity in {name}; get them again")


def _named(keys: Collection[str]) -> str:
    first, *others = sorted(keys)
    return f"{first} and {len(others)} more" if others else first


def _variant(folder: Path) -> str | None:
    """The `fp16` of `model.fp16.safetensors`, where only that variant is there."""
    names = (file.name for file in weight_files(folder) if file.suffix == ".safetensors")
    stems = {name.split("-00")[0].removesuffix(".safetensors").split(".")[-1] for name in names}
    return "fp16" if stems == {"fp16"} else None
