"""The arguments of `build_engines` that are a recipe's fields, for editors to complete and type checkers to check."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypedDict

from fastcache.bundle.recipe import Component, Lora, Profile, Size
from fastcache.cut.names import BlockKind, CutWish
from fastcache_engines import Device, DType


class RecipeFields(TypedDict, total=False):
    """`Recipe`'s fields, as they may be written: texts stand for what the command line takes."""

    revision: str | None
    random_weights: bool
    branch_id: int | str | Sequence[int]
    further_branch_ids: Sequence[int]
    cut: CutWish
    blocks: str | Sequence[BlockKind]
    backend: str
    device: Device | None
    dtype: DType | Literal["auto"]
    quantize: Literal["int8"] | None
    vae: str | None
    vae_tile: int | None
    preview_vae: str | None
    height: int | None
    width: int | None
    sizes: Sequence[str | Size]
    batch: int | str | Profile
    max_tokens: int | None
    lora: Sequence[str | Lora]
    controlnet: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
    t2i_adapter: str | None
    ip_adapter: str | None
    components: Sequence[Component] | None
    compute_capability: Sequence[str]
    onnx_only: bool
    kernels: bool
