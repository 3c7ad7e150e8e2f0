"""Presets that take what the published ones take, small enough to build in seconds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcache.compile.presets import PRESETS

_SMALL: dict[str, Any] = {"sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8}
_TEXT: dict[str, Any] = _SMALL | {
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_CHANGES: dict[str, dict[str, Any]] = {
    "ldm4g": _TEXT,
    "sdxl-refiner": _TEXT | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 5 * 8 + 20},
    "instruct-pix2pix": _TEXT,
    "ddpm256": _SMALL
    | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
}
SMALL_PRESETS = {
    f"small-{name}": replace(PRESETS[name], unet=PRESETS[name].unet | changes) for name, changes in _CHANGES.items()
}


def python_path(folder: Path) -> str:
    """A search path under which every Python that is started knows the small presets: a build is one, an arm is one."""
    lines = "from fastcache.compile.presets import PRESETS\nfrom small_presets import SMALL_PRESETS\n"
    (folder / "sitecustomize.py").write_text(f"{lines}\nPRESETS.update(SMALL_PRESETS)\n")
    return os.pathsep.join([str(folder), str(Path(__file__).parent)])
