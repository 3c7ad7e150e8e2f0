"""The files of a model -> its configuration and its modules. Weights come from safetensors only: nothing is executed.

Knows files; knows nothing about what the modules are for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: `ValueError` naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON file {file}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors in a folder. Raises: `ValueError` where there are none, or pickles in their place."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"pickled weights ({', '.join(pickled)}), which can run code when loaded" if pickled else "none"
        raise ValueError(f"expected safetensors weights in {folder}, got {found}; convert them with safetensors")
    return files


def load(kind: Any, folder: Path) -> Any:
    """A module of diffusers or transformers in float32, from a folder of its own.

    Raises: `ValueError` for files that cannot be read, or are another module's.
    """
    try:
        model = kind.from_pretrained(
            folder, use_safetensors=True, variant=_variant(folder), torch_dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # a damaged file surfaces as any of a dozen classes
        raise ValueError(f"cannot load the {folder.name} of {folder.parent}: {first_line(error)}") from error
    return model.eval().requires_grad_(False)


def _variant(folder: Path) -> str | None:
    """The `fp16` of `model.fp16.safetensors`, where only that variant is there."""
    stems = {file.name.split("-00")[0].removesuffix(".safetensors").split(".")[-1] for file in weight_files(folder)}
    return "fp16" if stems == {"fp16"} else None


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
