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
from typing import Any

from pydantic import ValidationError

from fastcache.bundle.manifest import SCHEMA, FileEntry, Manifest, Role
from fastcache.bundle.recipe import Recipe
from fastcache.errors import BundleError
from fastcache.files import sha256_of, sync, write_whole

MANIFEST = "manifest.json"
REFERENCE = "reference.safetensors"
_MANIFEST_LIMIT_BYTES = 16 * 2**20


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


def bundle_key(recipe: Recipe, weights_sha256: str, versions: dict[str, str], device: str) -> str:
    """The hash of everything that decides what a bundle contains."""
    content = [SCHEMA, recipe.model_dump(mode="json"), weights_sha256, versions, device]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle, checked against its own hash but not against the files.

    Raises: `BundleError` for a folder that is no bundle, or a manifest that was changed.
    """
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise BundleError(
            f"expected a bundle (a folder with {MANIFEST}), got {str(path)!r}; build one with `fastcache build-engines`"
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
        sync(path)
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
    sync(output.parent)
