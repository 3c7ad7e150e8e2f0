"""A model, a recipe and engines -> what the loop around these must know: sizes, tokens, conditioning, passes.

Knows configurations; nothing is loaded or exported here but the tokenizer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import UNet2DConditionModel, UNet2DModel
from pydantic import ValidationError
from torch import nn

from fastcache.bundle.manifest import BlockEntry, Defaults, EngineEntry, ModelInfo, PassEntry, Role, WorkEntry
from fastcache.bundle.patterns import chain_pass
from fastcache.bundle.recipe import Profile, Recipe, Size
from fastcache.compile.export import Free, Inputs
from fastcache.compile.models import DEFAULTS, SourceModel
from fastcache.compile.passes import call_unet
from fastcache.compile.presets import PRESETS
from fastcache.cut.chain import residual
from fastcache.cut.names import FULL, BlockKind, branch_of, shallow_pass
from fastcache.cut.pieces import BlockUNet, feature, partition_blocks
from fastcache.cut.work import count_blocks, count_work, empty_unet
from fastcache.expect import first_problem
from fastcache.files import read_json

CLIP_TOKENS = 77


@dataclass(frozen=True)
class Shapes:
    """The sizes that a bundle serves, in pixels, the usual one first, and the lengths of its prompts, if it reads any.

    `scale` is how many pixels a latent is, `step` what sizes are a multiple of where there are several.
    """

    sizes: tuple[Size, ...]
    scale: int
    step: int
    tokens: Profile | None

    @property
    def latent(self) -> tuple[int, int]:
        """The usual size's rows and columns of latents."""
        return self.sizes[0].height // self.scale, self.sizes[0].width // self.scale

    def check_tile(self, tile: int | None) -> None:
        """Refuse tiles of the decoder that do not fit the sizes. Raises: `ValueError`."""
        least = min(min(size.height, size.width) for size in self.sizes)
        if tile is not None and (tile % self.scale or tile > least):
            raise ValueError(
                f"expected a vae_tile of {least} pixels or fewer, in steps of {self.scale}, got {tile}; leave it out"
            )

    @property
    def profiles(self) -> dict[str, Profile]:
        """The least, usual and largest of each size that may vary."""
        sizes = {
            "height": _profile([size.height for size in self.sizes]),
            "width": _profile([size.width for size in self.sizes]),
        }
        return sizes if self.tokens is None else sizes | {"tokens": self.tokens}

    @property
    def free(self) -> Free:
        """What of it graphs must leave free."""
        varies = {name: profile.min < profile.max for name, profile in self.profiles.items()}
        most = self.tokens.max if self.tokens is not None and varies["tokens"] else None
        return Free(varies["height"], varies["width"], self.step, most)


def _profile(values: list[int]) -> Profile:
    return Profile(min=min(values), opt=values[0], max=max(values))


def _vae_facts(folder: Path, channels: int) -> tuple[bool, int]:
    """Whether a VAE draws latents from a distribution, and how many pixels one is.

    Raises: `ValueError` for latents of other channels than the U-Net's.
    """
    vae = read_json(folder / "config.json")
    draws = vae["_class_name"] == "AutoencoderKL"
    if vae["latent_channels"] != channels:
        raise ValueError(
            f"expected a VAE of {channels} latent channels, as the U-Net has, got {vae['latent_channels']} in "
            f"{folder}; give the model's own, or one for its latents"
        )
    return draws, 2 ** (len(vae["block_out_channels"] if draws else vae["decoder_block_out_channels"]) - 1)


def describe(model: SourceModel, unet: UNet2DConditionModel | UNet2DModel) -> ModelInfo:
    """What the manifest says of the model; of its U-Net the configuration counts."""
    config: Any = unet.config
    preset = PRESETS[model.name] if model.folder is None else None
    scale, tokens = (preset.scale, preset.tokens) if preset is not None else (8, None)
    vae_draws = True
    if model.vae_folder is not None:
        vae_draws, own = _vae_facts(model.vae_folder, config.out_channels)
        if preset is not None and own != scale:
            raise ValueError(f"expected a VAE whose latents are {scale} pixels, got {own}; give another")
        scale = own
    if model.preview_vae is not None and (own := _vae_facts(model.preview_vae, config.out_channels)[1]) != scale:
        raise ValueError(f"expected a preview_vae whose latents are {scale} pixels, got {own}; give another")
    if "text" in model.components:
        tokens = int(model.load_tokenizer(model.text_encoders[0]).model_max_length)
    told = config.get("addition_embed_type") == "text_time"
    classes = config.get("num_class_embeds") or config.get("class_embed_type")
    return ModelInfo(
        name=model.name,
        family=model.family,
        random_weights=model.random_weights,
        in_channels=config.in_channels,
        latent_channels=config.out_channels,
        vae_scale_factor=scale,
        vae_draws=vae_draws,
        tokens=tokens,
        time_ids=(5 if model.settings.get("requires_aesthetics_score") else 6) if told else None,
        zero_negative=model.family == "sdxl" and bool(model.settings.get("force_zeros_for_empty_prompt", True)),
        scheduler=model.scheduler,
        loras=tuple(entry for _, entry in model.loras),
        unconditional=tokens == 0 and not classes,
        controls=tuple(control.entry for control in model.controls),
        defaults=defaults_of(model),
    )


def defaults_of(model: SourceModel) -> Defaults:
    """What the model's own pipeline of diffusers draws with where nobody says, or else what its folder says.

    Raises: `ValueError` for a `fastcache.json` of something else.
    """
    usual = inspect.signature(getattr(diffusers, model.pipeline).__call__).parameters
    own = {name: usual[name].default for name in Defaults.model_fields if name in usual}
    try:
        return Defaults(**{**own, **model.defaults})
    except ValidationError as error:
        named, problem = ", ".join(Defaults.model_fields), first_problem(error, "the file")
        raise ValueError(f"expected {DEFAULTS} to say {named}, got {problem}") from None


def work(unet: nn.Module, inputs: Inputs) -> tuple[WorkEntry, ...]:
    """The multiply-adds of the U-Net's passes at every branch, for one of the rows that it is called with."""
    model: Any = unet
    row = {name: tensor[:1].to("meta") for name, tensor in inputs.items()}
    found = count_work(empty_unet(type(model), model.config), lambda full: call_unet(full, row))
    passes = [(None, found.full), *enumerate(found.shallow)]
    return tuple(WorkEntry(branch_id=b, layers=one.layers, attention=one.attention) for b, one in passes)


def blocks(unet: nn.Module, chain: BlockUNet, inputs: Inputs) -> tuple[BlockEntry, ...]:
    """What the manifest says of a chain's blocks, with their multiply-adds for one row of a call."""
    model: Any = unet
    row = {name: tensor[:1].to("meta") for name, tensor in inputs.items()}
    kinds: set[BlockKind] = {block.kind for block in chain.blocks}
    empty = partition_blocks(empty_unet(type(model), model.config), kinds)
    counted = count_blocks(empty, lambda one: call_unet(one, row))
    return tuple(
        BlockEntry(place=b.place, residual=residual(b.index), channels=b.branch.channels, multiply_adds=work)
        for b, work in zip(chain.blocks, counted, strict=True)
    )


def shapes(unet: UNet2DConditionModel | UNet2DModel, recipe: Recipe, info: ModelInfo) -> Shapes:
    """The recipe's sizes, or the one that the model was trained for.

    Raises: `ValueError` for a size that the VAE or the U-Net cannot halve as often as it does, or a `max_tokens` that
    does not fit.
    """
    config: Any = unet.config
    own, scale = config.sample_size, info.vae_scale_factor
    own_height, own_width = own if isinstance(own, list | tuple) else (own, own)
    usual = Size(width=recipe.width or own_width * scale, height=recipe.height or own_height * scale)
    sizes = recipe.sizes or (usual,)
    # Where sizes are free, the U-Net's upsamplers must double back to what its downsamplers halved.
    step = scale * 2 ** (len(config.down_block_types) - 1)
    for size in sizes:
        for name, pixels in (("height", size.height), ("width", size.width)):
            needed = scale if len(sizes) == 1 else step
            if pixels % needed:
                raise ValueError(f"expected a {name} divisible by {needed} for {info.name}, got {pixels}")
    step = math.gcd(step, *(size.height for size in sizes), *(size.width for size in sizes))
    return Shapes(sizes, scale, step, _tokens(recipe, info))


def _tokens(recipe: Recipe, info: ModelInfo) -> Profile | None:
    usual = CLIP_TOKENS if info.tokens is None else info.tokens
    if usual == 0:
        if recipe.max_tokens is not None:
            raise ValueError(f"expected no max_tokens for {info.name}, which reads no text, got {recipe.max_tokens}")
        return None
    most = recipe.max_tokens or usual
    if most < usual:
        raise ValueError(f"expected max_tokens of {usual} or more for {info.name}, got {most}")
    return Profile(min=usual, opt=usual, max=most)


def passes(
    recipe: Recipe,
    engines: Mapping[Role, EngineEntry],
    chain: Sequence[Role],
    features: Sequence[str],
    blocks: int,
    counted: Sequence[WorkEntry],
) -> dict[str, PassEntry]:
    """What each pass of a bundle runs, takes and stores, read off its engines.

    A pass runs one engine of its name or, in a chain, all that it needs. `features` are those of a U-Net with blocks,
    whose engines give more than that.
    """
    multiply_adds = {entry.branch_id: entry.layers + entry.attention for entry in counted}
    cached = features or {spec.name for spec in engines[FULL].outputs} - {"noise_pred"}
    found = dict[str, PassEntry]()
    for name in (FULL, *map(shallow_pass, recipe.branches)):
        branch = branch_of(name)
        given = [] if branch is None else [feature(branch, recipe.branch_id)]
        own = chain_pass(engines, chain, given) if chain else (name,)
        takes = [spec.name for role in own for spec in engines[role].inputs]
        gives = [spec.name for role in own for spec in engines[role].outputs]
        found[name] = PassEntry(
            engines=own,
            takes=tuple(one for one in dict.fromkeys(takes) if one in cached and one not in gives),
            stores=tuple(one for one in gives if one in cached),
            runs=(True,) * blocks if name == FULL and not chain else (),
            multiply_adds=multiply_adds[branch],
        )
    return found
