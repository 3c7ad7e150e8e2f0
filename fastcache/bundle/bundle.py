"""The folder where building and running meet: files, and a manifest that says what each byte must be.

A bundle is written whole (`seal`, then `publish`) and opened only if every file is the one that was built
(`open_bundle`). Whoever reads its files later does so under `Bundle.reading`, for another bundle may have taken its
place meanwhile. Knows files and hashes; knows nothing about what the engines compute.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import stat
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fastcache.bundle.contents import check_contents
from fastcache.bundle.manifest import FileEntry, Manifest, Role, digest_of
from fastcache.bundle.signing import SIGNATURE, Sign, is_signature, require_signature
from fastcache.errors import BundleError
from fastcache.expect import first_problem, path_text
from fastcache.files import sha256_of, sync, write_whole

if TYPE_CHECKING:
    from fastcache.sampler.stored import Samplers

MANIFEST = "manifest.json"
REFERENCE = "reference.safetensors"
_MANIFEST_LIMIT_BYTES = 16 * 2**20
_REPLACING_S = 1.0  # two renames take microseconds; a builder that was killed between them takes for ever
_SWAPS = 8  # that may happen during one opening

Stamp = tuple[int, ...]  # what tells a file from another, or from itself before a change, without reading it


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file has been checked; `stamps` are the files that were, none where nobody looked.

    `trusted` is the file of the public key that its signature was checked with, where it was.
    """

    path: Path
    manifest: Manifest
    stamps: Mapping[str, Stamp] | None = field(default=None, compare=False, repr=False)
    trusted: Path | None = field(default=None, compare=False, repr=False)

    @contextmanager
    def reading(self) -> Generator[None]:
        """Around whatever reads its files: that they are those that were checked is seen before and after.

        Raises: `BundleError` if any of them was replaced, changed, added or removed since.
        """
        self._require_unchanged()
        yield
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        if self.stamps is None:
            return
        try:
            found = {name: _stamp(path.lstat()) for name, path in _entries(self.path)}
        except FileNotFoundError:
            found = dict[str, Stamp]()
        if found != self.stamps:
            name = min(name for name in {*found, *self.stamps} if found.get(name) != self.stamps.get(name))
            raise BundleError(
                f"expected the files of {self.path} as they were when it was opened, got another {name}; "
                "the bundle was replaced meanwhile: load it again"
            )

    @cached_property
    def samplers(self) -> Samplers:
        """The model's samplers, with the tables that were made of them when it was built."""
        from fastcache.sampler.stored import TABLES, Samplers  # torch: who looks at a bundle needs none

        has_tables = any(entry.name == TABLES for entry in self.manifest.files)
        return Samplers(self.manifest.model.scheduler, self.file(TABLES) if has_tables else None, self.reading)

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


def read_manifest(path: Path, trusted: Path | None = None) -> Manifest:
    """The manifest of a bundle, checked against its own hash but not against the files.

    With `trusted`, the file of a public key, that key's signature is checked before anything of it is read.

    Raises: `BundleError` for a folder that is no bundle, or a manifest that was changed, or not signed by that key.
    """
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise BundleError(
            f"expected a bundle (a folder with {MANIFEST}), got {str(path)!r}; build one with `fastcache build-engines`"
        )
    try:
        size = file.stat().st_size
        if size > _MANIFEST_LIMIT_BYTES:
            raise BundleError(f"expected a {MANIFEST} under {_MANIFEST_LIMIT_BYTES} bytes in {path}, got {size}")
        content = file.read_bytes()
        if trusted is not None:
            require_signature(path, content, trusted)
        manifest = Manifest.model_validate_json(content)
    except OSError as error:
        raise BundleError(f"expected to read {file}, got: {error.strerror}; look at the folder's permissions") from None
    except ValidationError as error:
        problem = first_problem(error, "the file")
        raise BundleError(f"{file} is damaged or of another version ({problem}); build the bundle again") from None
    if manifest.bundle_sha256 != _digest(content):
        raise BundleError(f"{file} was changed after the build; build the bundle again")
    try:
        check_contents(manifest)
    except ValueError as error:
        raise BundleError(f"{file} is no build's: {error}; build the bundle again") from None
    return manifest


def _digest(content: bytes) -> str:
    """The hash that goes with a manifest's content; none of one with numbers that no build writes."""
    try:
        return digest_of(json.loads(content))
    except ValueError:
        return ""


@dataclass(frozen=True)
class FileCheck:
    """Whether one file of a bundle is the one that was built; if not, what is wrong with it."""

    name: str
    problem: str | None
    stamp: Stamp = field(default=(), compare=False, repr=False)


def check_files(folder: Path, manifest: Manifest) -> list[FileCheck]:
    """Compare every file in a folder with the manifest: nothing missing, changed, added or linked."""
    expected = {entry.name: entry for entry in manifest.files}
    found = dict(_entries(folder))
    names = sorted(expected.keys() | found.keys())
    return [_check(name, expected.get(name), found.get(name)) for name in names]


def _check(name: str, entry: FileEntry | None, file: Path | None) -> FileCheck:
    if file is None:
        return FileCheck(name, "is missing")
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            return FileCheck(name, "is a link or special file, not a plain one")
        if entry is None:
            return FileCheck(name, "is not named in the manifest")
        if status.st_size != entry.bytes:
            return FileCheck(name, f"has {status.st_size} bytes instead of {entry.bytes}")
        if sha256_of(file) != entry.sha256 or _stamp(file.lstat()) != _stamp(status):
            return FileCheck(name, "is not the file that was built (its SHA-256 differs)")
    except FileNotFoundError:
        return FileCheck(name, "is missing")
    return FileCheck(name, None, _stamp(status))


def plain_file(folder: Path, entry: FileEntry) -> Path:
    """A file of a bundle that was not checked, to look at. Raises: `ValueError` for a link, a device, another size."""
    file = folder / entry.name
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.bytes:
        raise ValueError(f"expected {entry.name} to be a plain file of {entry.bytes} bytes, got another; verify it")
    return file


def _stamp(status: os.stat_result) -> Stamp:
    """Inodes are used again at once, and times can be set back, but the time of the last change of these cannot."""
    return status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_bundle(path: str | os.PathLike[str], trusted: str | os.PathLike[str] | None = None) -> Bundle:
    """Open a bundle after every file has been checked against its manifest.

    `trusted` is a public key's file (PEM, Ed25519): the manifest must then be signed by that key.

    Raises: `BundleError` naming the first file that is wrong; `ValueError` for a file without such a key.
    """
    folder = Path(path)
    key = None if trusted is None else Path(path_text("trusted", trusted))
    for _ in range(_SWAPS):
        before = _identity(folder)
        try:
            return _open(folder, key)
        except BundleError:
            # Of two bundles that a builder swaps, the one's manifest may have been read and the other's files.
            if _identity(folder) == before:
                raise
    return _open(folder, key)


def _open(folder: Path, trusted: Path | None) -> Bundle:
    manifest = read_manifest(folder, trusted)
    try:
        checks = check_files(folder, manifest)
    except FileNotFoundError as error:  # from beneath the search for files
        raise BundleError(f"{error.filename} went away while {folder} was opened; open it again") from None
    for check in checks:
        if check.problem is not None:
            raise BundleError(f"{check.name} in {folder} {check.problem}; build the bundle again")
    return Bundle(folder, manifest, {check.name: check.stamp for check in checks}, trusted)


def _identity(folder: Path) -> Stamp | None:
    """Which folder lies there, once whoever replaces it (`publish`) has done so; None for none."""
    give_up = time.monotonic() + _REPLACING_S
    while True:
        try:
            return _stamp(folder.stat())
        except OSError:
            aside = any(folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp.old"))
            if not aside or time.monotonic() > give_up:
                return None
            time.sleep(0.001)


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a folder but folders and what speaks of the rest: the manifest, and its signature.

    Links are not followed, so nothing outside can be reached.
    """
    for path in sorted(folder.rglob("*")):
        if path == folder / MANIFEST or (path == folder / SIGNATURE and is_signature(path)):
            continue
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix(), path


def seal(folder: Path, fields: dict[str, Any]) -> Manifest:
    """Hash the files of a finished build, write the manifest last, and bring all of it to the disk."""
    entries = [
        FileEntry(name=name, bytes=path.stat().st_size, sha256=sha256_of(path)) for name, path in _entries(folder)
    ]
    draft = Manifest.model_validate(fields | {"files": entries})
    check_contents(draft)
    manifest = draft.model_copy(update={"bundle_sha256": draft.digest()})
    write_whole(folder / MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())
    for path in [
        folder / MANIFEST,
        *(path for _, path in _entries(folder)),
        *(p for p in folder.rglob("*") if p.is_dir()),
        folder,
    ]:
        sync(path)
    return manifest


def add_signature(folder: Path, sign: Sign, by_way_of: Path) -> None:
    """Put a signature of the manifest beside it, whole or not at all: it is written into another folder and moved."""
    write_whole(by_way_of / SIGNATURE, sign((folder / MANIFEST).read_bytes()))
    os.replace(by_way_of / SIGNATURE, folder / SIGNATURE)
    sync(folder)


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
