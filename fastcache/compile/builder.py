"""A recipe -> a bundle in its final place, whole or not at all.

The work is done in a child process (`worker.py`), in a temporary folder on the same file system, under a lock; this
side finds the model, decides what `auto` means, watches the child and moves the finished folder into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import select
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import diffusers
import torch
from filelock import FileLock

import fastcache
import fastcache_engines
from fastcache.bundle.bundle import MANIFEST, Bundle, add_signature, open_bundle, publish, read_manifest
from fastcache.bundle.manifest import SCHEMA
from fastcache.bundle.recipe import Component, Recipe, recipe_from
from fastcache.bundle.signing import signer
from fastcache.compile.fields import RecipeFields
from fastcache.compile.hired import hire
from fastcache.compile.models import SourceModel, find_model
from fastcache.compile.quantize import require_nncf
from fastcache.errors import BackendUnavailable, BuildError, BundleError, PartitionError
from fastcache.expect import expected, flag, path_text
from fastcache_engines import Capabilities, Device, DType

Progress = Callable[[str], None]
_ERRORS = {kind.__name__: kind for kind in (ValueError, PartitionError, BackendUnavailable, BuildError)}


@dataclass(frozen=True)
class Job:
    """A recipe with nothing left to choose, for a model that was found.

    `dtype` is what the U-Net's engines are built in. Where the recipe leaves it open and they do not pass their check
    in it, they are built in fp32.
    """

    recipe: Recipe
    dtype: DType
    model: SourceModel
    versions: dict[str, str]
    device: str
    reason: str = field(compare=False)  # why this backend and this dtype, where the recipe leaves them open

    @property
    def key(self) -> str:
        """The hash of everything that decides what the bundle contains."""
        recipe = self.recipe.model_dump(mode="json") | {"dtype": self.dtype}
        content = [SCHEMA, recipe, self.model.weights_sha256, self.versions, self.device]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resolve(recipe: Recipe) -> Job:
    """Find the model and settle every `auto`.

    Raises: `ValueError` for a model or component that is not there, a model that no engines can draw, or GPUs that the
    backend does not build for; `BackendUnavailable` for what cannot be built here.
    """
    model = find_model(
        recipe.model,
        random_weights=recipe.random_weights,
        revision=recipe.revision,
        loras=recipe.lora,
        controls=recipe.controls,
        vae=recipe.vae,
        preview_vae=recipe.preview_vae,
    )
    model.require_engines()
    components: tuple[Component, ...] = recipe.components or model.components
    missing = [c for c in components if c not in model.components]
    if missing:
        raise ValueError(
            f"expected components of {recipe.model} ({', '.join(model.components)}), got {', '.join(missing)}"
        )
    name, device, dtype, reason = _settle_backend(recipe)
    backend = fastcache_engines.backend(name)
    if recipe.compute_capability:
        backend.check_targets(recipe.compute_capability)
    if recipe.max_tokens and not backend.CAPABILITIES.free_tokens:
        raise BackendUnavailable(
            f"expected a backend whose engines serve several prompt lengths, got {name}; leave max_tokens out"
        )
    if recipe.kernels and not backend.CAPABILITIES.kernels:
        holding = fastcache_engines.backends_with("kernels")
        raise BackendUnavailable(f"expected a backend whose graphs can hold kernels ({holding}), got {name}")
    if recipe.quantize:
        _require_quantized(backend.CAPABILITIES, device)
    settled = recipe.model_copy(update={"backend": name, "device": device, "components": components})
    versions = {
        "fastcache": fastcache.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if not recipe.onnx_only:  # graphs need no library, and are for whatever version builds engines from them
        versions[name] = backend.version()
    if recipe.quantize:
        versions["nncf"] = importlib.metadata.version("nncf")
    return Job(settled, dtype, model, versions, _target(settled, device), reason)


def _require_quantized(backend: Capabilities, device: Device) -> None:
    """Raise `BackendUnavailable` where 8-bit layers would not be computed as such, or not be made."""
    if not backend.quantized or device != "cpu":
        having = fastcache_engines.backends_with("quantized")
        raise BackendUnavailable(
            f"expected a backend with 8-bit layers on a CPU ({having}), got {backend.name} on {device}; "
            "leave --quantize out"
        )
    require_nncf()


def _settle_backend(recipe: Recipe) -> tuple[str, Device, DType, str]:
    """The backend, the device, the dtype and why, with every wish that cannot be met refused.

    Raises: `BackendUnavailable`.
    """
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.backend == "auto":
        device = recipe.device or here
        if recipe.dtype == "auto":
            name, dtype, reason = fastcache_engines.choose_with_dtype(device)
            return name, device, dtype, reason
        name, reason = fastcache_engines.choose(device, recipe.dtype)
        return name, device, recipe.dtype, f"backend {name}: {reason}"
    backend = fastcache_engines.backend(recipe.backend)
    can = backend.CAPABILITIES
    devices = tuple(can.dtypes)
    device = recipe.device or (here if here in devices else devices[0])
    dtypes = can.dtypes.get(device)
    if dtypes is None:
        raise BackendUnavailable(f"expected device {' or '.join(devices)}, which {can.name} runs on, got {device}")
    fastest, why = fastcache_engines.fastest_dtype(device)
    if fastest not in dtypes:
        fastest, why = dtypes[0], f"{can.name} computes no {fastest} on a {device.upper()}"
    dtype = fastest if recipe.dtype == "auto" else recipe.dtype
    if dtype not in dtypes:
        raise BackendUnavailable(
            f"expected dtype {' or '.join(dtypes)}, which {can.name} has on a {device.upper()}, got {dtype}"
        )
    found = backend.support(device)
    if not (found.can_build or recipe.onnx_only):
        raise BackendUnavailable(f"the backend {recipe.backend} cannot build here: {found.reason}")
    if recipe.onnx_only and can.source != "onnx":
        raise BackendUnavailable(f"expected a backend that builds from ONNX for --onnx-only, got {can.name}")
    return recipe.backend, device, dtype, f"dtype {dtype}: {why}" if recipe.dtype == "auto" else ""


def _target(recipe: Recipe, device: Device) -> str:
    """The machine that the bundle is for: the one at hand, or GPUs by their compute capability."""
    if device == "cuda" and recipe.compute_capability:
        return "cuda-" + "+".join(f"sm{capability.replace('.', '')}" for capability in recipe.compute_capability)
    if device == "cuda" and not torch.cuda.is_available():
        return "cuda-any"  # graphs, or TensorRT-RTX's engines for every GPU of compute capability 8.0 or later
    return fastcache_engines.device_here(device)


def build_engines(
    model: str | os.PathLike[str] | Recipe = "demo",
    output: str | os.PathLike[str] = "engines",
    *,
    force: bool = False,
    sign: str | os.PathLike[str] | None = None,
    progress: Progress = lambda message: None,
    **fields: Unpack[RecipeFields],
) -> Bundle:
    """Build a bundle of engines for a model, or return the one that is there if nothing about it would change.

    `fields` are `RecipeFields` (backend, branch_id, height, width, batch, ...). Sizes are in pixels. `sign` is a
    private key's file (PEM, Ed25519), which signs the bundle, also one that is there.

    Raises: `ValueError` for bad fields or a bad model; `PartitionError`; `BackendUnavailable`; `BuildError` when the
    build itself fails (nothing is left behind). Another bundle at `output` is a `ValueError` without `force`, a
    folder of other files always.
    """
    given: dict[str, Any] = model.model_dump() if isinstance(model, Recipe) else {"model": path_text("model", model)}
    place, force = Path(path_text("output", output)).resolve(), flag("force", force)
    if not callable(progress):
        raise expected("progress to be a function of a text", progress, "leave it out")
    signs = None if sign is None else signer(Path(path_text("sign", sign)))
    job, folder = resolve(recipe_from({**given, **fields})), _free_or_bundle(place)
    with _alone(folder):
        _clear_remains(folder)
        bundle = None if force else _same_bundle(folder, job)
        if bundle is not None:
            progress(f"{folder} is up to date")
            if signs is not None:
                with _aside(folder) as temporary:
                    add_signature(folder, signs, by_way_of=temporary)
            return bundle
        with _aside(folder) as temporary:
            for reason in job.reason.splitlines():
                progress(reason)
            _run_worker(job, temporary, progress)
            if signs is not None:
                add_signature(temporary, signs, by_way_of=temporary)
            publish(temporary, folder)
    return open_bundle(folder)


@contextlib.contextmanager
def _aside(folder: Path) -> Generator[Path]:
    """A temporary folder beside a bundle's, by a name that `_clear_remains` knows."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Generator[None]:
    """The only build of a folder, its parents made. Of what this makes beside a bundle nothing stays.

    Raises: `ValueError` for parents that cannot be made.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"expected a folder to build in, got {folder}: {error.strerror}; name another output"
        ) from None
    lock = folder.parent / f".{folder.name}.lock"
    try:
        with FileLock(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # whoever waits for it sees that its file is gone, and makes another
    finally:
        with contextlib.suppress(OSError):  # the first that holds something, and all above it
            for parent in made:
                parent.rmdir()


def _free_or_bundle(folder: Path) -> Path:
    """The folder. Nothing but a bundle is ever replaced, also where the build is forced.

    Raises: `ValueError` for a file, or a folder of other files.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"expected {folder} to be free or a bundle, got a folder of other files; name another output")
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"expected a folder to build in, got {folder}, but {place} is a file; name another output")
    return folder


def _clear_remains(folder: Path) -> None:
    """Under the lock, whatever temporary folder is there belongs to a build that was killed."""
    temporary = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.tmp(\.old)?")
    for remains in [path for path in folder.parent.iterdir() if temporary.fullmatch(path.name)]:
        if remains.suffix == ".old" and not folder.exists():
            os.replace(remains, folder)
        else:
            shutil.rmtree(remains, ignore_errors=True)


def _same_bundle(folder: Path, job: Job) -> Bundle | None:
    """The bundle in place if it is whole and its key is the job's; nothing if the place is free or it is damaged."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        raise ValueError(f"{error}; force the build (--force) to replace it") from None
    if manifest.key != job.key or (manifest.dtype != job.dtype and job.recipe.dtype != "auto"):
        raise ValueError(f"{folder} holds a bundle of another model, recipe or version; force (--force) to replace it")
    try:
        return open_bundle(folder)
    except BundleError:
        return None


def _lines(child: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What a child prints, until it ends. A process it was starting when it was killed may hold the pipe for ever."""
    if child.stdout is None:
        return
    rest = b""
    while True:
        if select.select([child.stdout], [], [], 0.2)[0]:
            data = os.read(child.stdout.fileno(), 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
        elif child.poll() is not None:
            return


def _run_worker(job: Job, folder: Path, progress: Progress) -> None:
    """Run the build in a child that ends when this process does (its standard input closes)."""
    order = json.dumps([job.recipe.model_dump(mode="json"), job.key, str(folder)])
    error: dict[str, str] | None = None
    child = (hired := hire()).process
    try:
        with contextlib.suppress(BrokenPipeError):  # of one that ended: why, its log says
            _tell(child, order)
        for line in _lines(child):
            event = json.loads(line)
            if "error" in event:
                error = event
            else:
                progress(event["progress"])
        child.wait()  # before its standard input closes, which would end it
        hired.log.seek(0)
        details = hired.log.read()
    finally:
        hired.end()
    if error is not None:
        failure = _ERRORS.get(error["error"], BuildError)(error["message"])
        failure.add_note(details)  # the child's traceback, where there is one
        raise failure
    if child.returncode != 0:
        reason = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        last = (details.strip().splitlines() or ["no message"])[-1]
        raise BuildError(f"the build process ended with {reason} ({last}); nothing was left in {folder.parent}")


def _tell(child: subprocess.Popen[bytes], line: str) -> None:
    if child.stdin is not None:
        child.stdin.write(f"{line}\n".encode())
        child.stdin.flush()
