"""What a bundle's manifest says: the model, how it was built, its engines, and what each of its bytes must be.

Values only; knows nothing about files on a disk.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastcache.bundle.patterns import Passes
from fastcache.bundle.recipe import Component, ControlKind, Profile, Recipe, Size
from fastcache.cut.names import CutKind
from fastcache_engines import Device, DType, TensorSpec

SCHEMA = "fastcache.bundle/5"

Family = Literal["sd", "sdxl"]  # whose pipeline: how prompts become inputs of the U-Net
# An engine's part in the bundle. One that a pass runs bears the pass's name: `full`, `shallow-0`. In a bundle of blocks
# patterns of them run the full one, which has a condition for each, or a chain in turn: the `stem`, trunks and blocks.
# `controlnet_embedding`, `t2i_adapter` and `ip_adapter` make what the passes take of a picture that steers them.
Role = Annotated[
    str,
    Field(
        pattern=r"^(full|shallow-\d+|stem|trunk-\d+|block-\d+|text_encoder(_2)?|vae_(en|de)coder|preview_decoder"
        r"|controlnet_embedding(_\d+)?|t2i_adapter|ip_adapter|image_encoder)$"
    ),
]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Value):
    """One file of a bundle, by its path inside it (forward slashes)."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class EngineEntry(_Value):
    """An engine: the file a backend loads, the arithmetic it runs in, and what it takes and gives."""

    file: str
    dtype: DType
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class PassEntry(_Value):
    """What one U-Net call runs: its engines, in turn, and which of the cached features it takes and stores, by name.

    `runs` says of each block whether engines with conditions run it; it is empty where they have none.
    `multiply_adds` are those of one row of the batch, attention included; 0 where nobody counted them.
    """

    engines: tuple[Role, ...]
    takes: tuple[str, ...]
    stores: tuple[str, ...]
    runs: tuple[bool, ...] = ()
    multiply_adds: int = Field(0, ge=0)


class BlockEntry(_Value):
    """A block of the U-Net that a pass may leave out: where it stands, and the residual that is reused then.

    `channels` are the residual's; `multiply_adds` as in `PassEntry`.
    """

    place: str
    residual: str
    channels: int = Field(ge=1)
    multiply_adds: int = Field(0, ge=0)


class LoraEntry(_Value):
    """A LoRA that was merged into the weights: its file's name and hash, and how much of it."""

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    weight: float


class ControlEntry(_Value):
    """A network beside the U-Net, by the name of its folder or file, and the hash of what it was made from."""

    kind: ControlKind
    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Defaults(_Value):
    """How the model's own pipeline draws where nobody says; with which sampler, `ModelInfo.scheduler` does."""

    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(7.5, ge=0)
    image_guidance_scale: float = Field(1.5, ge=0)


class ModelInfo(_Value):
    """What the loop around the engines must know of the model.

    `time_ids` is how many sizes and scores a U-Net of SDXL's kind is told (6; 5 the refiner), and `zero_negative`
    whether it takes zeros for a negative prompt that is not given, as `force_zeros_for_empty_prompt` in diffusers.
    `vae_draws` is off where the VAE makes of a picture its latents themselves, and not a distribution of them.
    `tokens` is 0 for a U-Net that reads no text; one that takes nothing but the sample and the timestep is
    `unconditional`.
    """

    name: str
    family: Family
    random_weights: bool
    in_channels: int
    latent_channels: int
    vae_scale_factor: int
    tokens: int | None
    time_ids: int | None
    zero_negative: bool
    scheduler: dict[str, Any]
    loras: tuple[LoraEntry, ...]
    unconditional: bool = False
    vae_draws: bool = True
    controls: tuple[ControlEntry, ...] = ()
    defaults: Defaults = Field(default_factory=Defaults.model_validate({}).model_copy)

    @property
    def public_name(self) -> str:
        """The name but for a path, which is nobody's business: of a folder its own name, or a hub id."""
        return PurePath(self.name).name if PurePath(self.name).is_absolute() or self.name[0] == "." else self.name

    @property
    def edits(self) -> bool:
        """Whether the U-Net takes an image to edit beside the latents, as InstructPix2Pix has it."""
        return self.in_channels == 2 * self.latent_channels

    @property
    def guided_rows(self) -> int:
        """How many rows of the U-Net an image takes under guidance: with and without text, and without the image.

        One of a model that has nothing to guide by.
        """
        if self.unconditional:
            return 1
        return 3 if self.edits else 2


class WorkEntry(_Value):
    """The multiply-adds of one U-Net call for one image: of the shallow pass at `branch_id`, or of the full pass.

    `layers` are those of convolutions and linear layers, `attention` those of attention's own two products.
    """

    branch_id: int | None
    layers: int
    attention: int


class KeptLayers(_Value):
    """Layers of a quantised engine that stay in its dtype, for in 8 bits they alone move the noise prediction so far.

    `snr_db` is the signal-to-noise ratio of the noise prediction with nothing else in 8 bits.
    """

    place: str
    kind: Literal["conv", "linear", "attention"]
    layers: int = Field(ge=1)
    snr_db: float


class QuantizedEngine(_Value):
    """How an engine was quantised: its 8-bit layers, those that are not, and the noise prediction's error in dB.

    `calls` is on how many calls of the model's own runs ranges were chosen.
    """

    layers: int = Field(ge=0)
    kept: tuple[KeptLayers, ...]
    snr_db: float
    calls: int = Field(ge=1)


class Quantization(_Value):
    """Which engines of a bundle compute in 8 bits. With weights of 8 bits, x86 needs VNNI for it."""

    scheme: Literal["int8"]
    weight_bits: Literal[7, 8]
    engines: dict[Role, QuantizedEngine]


class Parity(_Value):
    """Largest errors relative to the largest reference value, as measured when the bundle was built.

    `measured_on` is what computed: the engines themselves (the backend's name), or their ONNX graphs on another
    backend where the engines cannot run on the machine that built them.
    """

    measured_on: str
    full_vs_model: float
    shallow_vs_full: float
    tolerance: float


class Manifest(_Value):
    """What a bundle is and what each of its bytes must be."""

    schema_: Literal["fastcache.bundle/5"] = Field(SCHEMA, alias="schema")
    key: str
    model: ModelInfo
    weights_sha256: str
    branch_id: int
    branches: tuple[int, ...]
    num_branches: int
    cut: CutKind
    backend: str
    dtype: DType
    quantized: Quantization | None = None
    height: int
    width: int
    vae_tile: int | None = None
    sizes: tuple[Size, ...]
    components: tuple[Component, ...]
    profiles: dict[str, Profile]
    versions: dict[str, str]
    device: str
    engines: dict[Role, EngineEntry]
    named_passes: dict[str, PassEntry] = Field(alias="passes")
    chain: tuple[Role, ...] = ()
    blocks: tuple[BlockEntry, ...] = ()
    parity: Parity
    recipe: Recipe
    weights_bytes: int
    duplicated_bytes: int
    work: tuple[WorkEntry, ...] = ()
    created: str
    build_seconds: float
    files: tuple[FileEntry, ...]
    bundle_sha256: str = ""

    @property
    def device_type(self) -> Device:
        """The kind of device of `device`, which names the machine: `cpu-x86_64`, `cuda-sm90`."""
        return "cuda" if self.device.startswith("cuda") else "cpu"

    @cached_property
    def passes(self) -> Passes:
        """Every pass that the bundle can run."""
        return Passes(self.named_passes, self.engines, self.chain, self.blocks)

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the cached features: what the full pass stores."""
        return self.named_passes["full"].stores

    def identity_of(self, role: Role) -> str:
        """A name for an engine that no other content has."""
        return f"{self.bundle_sha256}/{role}"

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def digest(self) -> str:
        """The hash over everything in the manifest but itself: the bundle's identity."""
        return digest_of(self.to_json())


def digest_of(document: dict[str, Any]) -> str:
    """The same of a manifest as a file has it, which need not have every field that there is by now."""
    content = document | {"bundle_sha256": ""}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
