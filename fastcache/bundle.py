"""The folder where building and running meet: files, and a manifest that says what each byte must be.

A bundle is written whole (`seal`, then `publish`) and opened only if every file is the one that was built
(`open_bundle`). Knows files and hashes; knows nothing about what the engines compute.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastcache.errors import BundleError
from fastcache.recipe import Component, ControlKind, Device, DType, Profile, Recipe, Size
from fastcache_engines import TensorSpec

SCHEMA = "fastcache.bundle/3"
MANIFEST = "manifest.json"
REFERENCE = "reference.safetensors"
_MANIFEST_LIMIT_BYTES = 16 * 2**20

Family = Literal["sd", "sdxl"]  # whose pipeline: how prompts become inputs of the U-Net
# An engine's part in the bundle. `shallow` is the primary branch's; one at another branch b is `shallow_b`.
# `controlnet_embedding`, `t2i_adapter` and `ip_adapter` make what the passes take of a picture that steers them.
Role = Annotated[
    str,
    Field(
        pattern=r"^(full|shallow(_\d+)?|text_encoder(_2)?|vae_(en|de)coder"
        r"|controlnet_embedding|t2i_adapter|ip_adapter|image_encoder)$"
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


class ModelInfo(_Value):
    """What the loop around the engines must know of the model.

    `time_ids` is how many sizes and scores a U-Net of SDXL's kind is told (6; 5 the refiner), and `zero_negative`
    whether it takes zeros for a negative prompt that is not given, as `force_zeros_for_empty_prompt` in diffusers.
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
    controls: tuple[ControlEntry, ...] = ()

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

    schema_: Literal["fastcache.bundle/3"] = Field(SCHEMA, alias="schema")
    key: str
    model: ModelInfo
    weights_sha256: str
    branch_id: int
    branches: tuple[int, ...]
    num_branches: int
    cut: Literal["plain", "projected"]
    backend: str
    dtype: DType
    height: int
    width: int
    sizes: tuple[Size, ...]
    components: tuple[Component, ...]
    profiles: dict[str, Profile]
    versions: dict[str, str]
    device: str
    engines: dict[Role, EngineEntry]
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
    def shallow_roles(self) -> dict[int, Role]:
        """The role of each branch's shallow engine, the primary one first."""
        return {branch: shallow_role(branch, self.branch_id) for branch in self.branches}

    @property
    def device_type(self) -> Device:
        """The kind of device of `device`, which names the machine: `cpu-x86_64`, `cuda-sm90`."""
        return "cuda" if self.device.startswith("cuda") else "cpu"

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def digest(self) -> str:
        """The hash over everything in the manifest but itself: the bundle's identity."""
        content = self.to_json() | {"bundle_sha256": ""}
        return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file has been checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name

    def engine_path(self, role: Role) -> Path:
        """The file of an engine.

        Raises: `BundleError` if the bundle was built without it.
        """
        if role not in self.manifest.engines:
            built = ", ".join(self.manifest.components)
            raise BundleError(
                f"expected a {role} engine in {self.path}, got a bundle of {built}; build it with that component"
            )
        return self.path / self.manifest.engines[role].file


def shallow_role(branch_id: int, primary: int) -> Role:
    """The role of a branch's shallow engine in a bundle with this primary branch."""
    return "shallow" if branch_id == primary else f"shallow_{branch_id}"


def bundle_key(recipe: Recipe, weights_sha256: str, versions: dict[str, str], device: str) -> str:
    """The hash of everything that decides what a bundle contains."""
    content = [SCHEMA, recipe.model_dump(mode="json"), weights_sha256, versions, device]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle, checked against its own hash but not against the files.

    Raises: `BundleError` for a folder that is no bundle, or a manifest that was changed.
    """
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise BundleError(
            f"expected a bundle (a folder with {MANIFEST}), got {path}; build one with `fastcache build-engines`"
        )
    if file.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise BundleError(
            f"expected a {MANIFEST} under {_MANIFEST_LIMIT_BYTES} bytes in {path}, got {file.stat().st_size}"
        )
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(
            f"{file} is damaged or of another version ({where}: {first['msg']}); build the bundle again"
        ) from None
    if manifest.bundle_sha256 != manifest.digest():
        raise BundleError(f"{file} was changed after the build; build the bundle again")
    return manifest


@dataclass(frozen=True)
class FileCheck:
    """Whether one file of a bundle is the one that was built; if not, what is wrong with it."""

    name: str
    problem: str | None


def check_files(folder: Path, manifest: Manifest) -> list[FileCheck]:
    """Compare every file in a folder with the manifest: nothing missing, changed, added or linked."""
    expected = {entry.name: entry for entry in manifest.files}
    found = dict(_entries(folder))
    found.pop(MANIFEST, None)
    names = sorted(expected.keys() | found.keys())
    return [FileCheck(name, _problem(expected.get(name), found.get(name))) for name in names]


def _problem(entry: FileEntry | None, file: Path | None) -> str | None:
    if file is None:
        return "is missing"
    if not stat.S_ISREG(file.lstat().st_mode):
        return "is a link or special file, not a plain one"
    if entry is None:
        return "is not named in the manifest"
    if file.stat().st_size != entry.bytes:
        return f"has {file.stat().st_size} bytes instead of {entry.bytes}"
    return None if sha256_of(file) == entry.sha256 else "is not the file that was built (its SHA-256 differs)"


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle after every file has been checked against its manifest.

    Raises: `BundleError` naming the first file that is wrong.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for check in check_files(folder, manifest):
        if check.problem is not None:
            raise BundleError(f"{check.name} in {folder} {check.problem}; build the bundle again")
    names = {entry.name for entry in manifest.files}
    for role, engine in manifest.engines.items():
        if engine.file not in names:
            raise BundleError(f"the {role} engine's file {engine.file!r} is not in {folder}; build the bundle again")
    return Bundle(folder, manifest)


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a folder but folders; links are not followed, so nothing outside can be reached."""
    for path in sorted(folder.rglob("*")):
        if not stat.S_ISDIR(path.lstat().st_mode):
            yield path.relative_to(folder).as_posix(), path


def seal(folder: Path, fields: dict[str, Any]) -> Manifest:
    """Hash the files of a finished build, write the manifest last, and bring all of it to the disk."""
    entries = [
        FileEntry(name=name, bytes=path.stat().st_size, sha256=sha256_of(path)) for name, path in _entries(folder)
    ]
    draft = Manifest.model_validate(fields | {"files": entries})
    manifest = draft.model_copy(update={"bundle_sha256": draft.digest()})
    write_whole(folder / MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())
    for path in [*(path for _, path in _entries(folder)), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(path)
    return manifest


def publish(folder: Path, output: Path) -> None:
    """Move a sealed folder into place; what stood there before is there until the new one is."""
    if output.exists():
        old = folder.with_name(folder.name + ".old")
        os.replace(output, old)
        os.replace(folder, output)
        shutil.rmtree(old)
    else:
        os.replace(folder, output)
    _sync(output.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
