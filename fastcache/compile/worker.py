"""The build itself: one recipe, one empty folder -> a sealed bundle in it.

Runs as `python -m fastcache.compile.worker` (`hired.py`) under `builder.py`, which gives it its order and reads its
progress and errors, one JSON line each. Every bundle is checked here against the PyTorch model before it is sealed.
"""

from __future__ import annotations

import datetime
import errno
import gc
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastcache_engines
from fastcache.bundle.bundle import seal
from fastcache.bundle.manifest import SCHEMA
from fastcache.bundle.recipe import Recipe
from fastcache.compile import describe
from fastcache.compile.builder import Job, Progress, resolve
from fastcache.compile.models import state_bytes
from fastcache.compile.workshop import OutOfTolerance, Workshop
from fastcache.errors import BackendUnavailable, BuildError, BundleError
from fastcache.expect import first_line
from fastcache.files import write_whole
from fastcache.sampler.stored import TABLES, tables_file

_SPARE_BYTES = 2**26  # graphs, tokenizer, reference and the file system's own needs


def build(job: Job, folder: Path, say: Progress) -> None:
    """Build every engine of a job into `folder` and seal it.

    Where the recipe leaves the dtype open, engines that do not pass their check in it are built again in fp32.

    Raises: `ValueError` for a size that does not fit; `PartitionError`; `BuildError` for a disk that is too small, or
    engines that do not compute what the model does.
    """
    try:
        _build(job, job.key, folder, say)
    except (OutOfTolerance, BundleError) as error:  # a BundleError: what they compute is no number
        if job.recipe.dtype != "auto" or job.dtype == "fp32":
            raise
        say(f"{job.dtype} does not pass its check, so fp32 it is: {first_line(error)}")
        for part in folder.iterdir():
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        _build(replace(job, dtype="fp32"), job.key, folder, say)


def _build(job: Job, key: str, folder: Path, say: Progress) -> None:
    start = time.monotonic()
    recipe, model, wanted = job.recipe, job.model, job.recipe.components or ()
    say(f"loading {model.name}")
    typed = fastcache_engines.backend(recipe.backend).CAPABILITIES.typed
    unet = model.load_unet(fastcache_engines.torch_dtype(job.dtype if typed else "fp32"))
    info = describe.describe(model, unet)
    shapes = describe.shapes(unet, recipe, info)
    shapes.check_tile(recipe.vae_tile)
    _require_space(folder, state_bytes(unet))
    workshop = Workshop(job, folder, say, info, shapes)
    num_branches = workshop.make_unet(unet)
    del unet
    if "text" in wanted:
        workshop.make_text_encoders()
    if "vae" in wanted:
        workshop.make_vae()
    if (preview := model.load_preview_vae()) is not None:
        workshop.make_preview_decoder(preview)
    say("making the samplers' tables")
    write_whole(folder / TABLES, tables_file(info.scheduler, info.defaults.num_inference_steps))
    say("sealing the bundle")
    fields = _manifest_fields(job, num_branches, workshop)
    seal(folder, fields | {"key": key, "build_seconds": round(time.monotonic() - start, 2)})


def _manifest_fields(job: Job, num_branches: int, made: Workshop) -> dict[str, Any]:
    """Everything that the manifest says but its key, the files, their hashes and the time it took."""
    recipe = job.recipe
    return {
        "schema": SCHEMA,
        "model": made.info,
        "weights_sha256": job.model.weights_sha256,
        "branch_id": recipe.branch_id,
        "branches": recipe.branches,
        "num_branches": num_branches,
        "cut": made.cut,
        "backend": recipe.backend,
        "dtype": job.dtype,
        "quantized": made.quantized,
        "height": made.shapes.sizes[0].height,
        "width": made.shapes.sizes[0].width,
        "vae_tile": recipe.vae_tile,
        "sizes": made.shapes.sizes,
        "components": recipe.components,
        "profiles": {"batch": recipe.batch, **made.shapes.profiles},
        "versions": job.versions,
        "device": job.device,
        "engines": made.engines,
        "passes": made.passes,
        "chain": made.chain,
        "blocks": made.blocks,
        "parity": made.parity,
        "recipe": recipe,
        "weights_bytes": made.weights_bytes,
        "duplicated_bytes": made.duplicated_bytes,
        "work": made.work,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _require_space(folder: Path, weights_bytes: int) -> None:
    needed, free = int(1.1 * weights_bytes) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"expected {needed / 2**30:.1f} GiB free in {folder.parent}, got {free / 2**30:.1f} GiB; make room there"
        )


def main() -> int:
    """Build what the first line of standard input orders, if any; errors go out as JSON. Returns the exit code."""
    order = sys.stdin.readline()
    if not order:
        return 0
    # The exporter makes and drops small objects without end, and collects garbage itself behind each graph: looking
    # again and again at all that is imported took a tenth of a build.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed, also by libraries in C++, is no event

    def tell(event: dict[str, str]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    values, key, folder = json.loads(order)
    try:
        job = resolve(Recipe.model_validate(values))
        if job.key != key:
            raise BuildError(f"{job.model.name} changed while it was being built; build again")
        build(job, Path(folder), lambda message: tell({"progress": message}))
    except Exception as error:
        kind, message = _explain(error, Path(folder).parent)
        tell({"error": kind, "message": message})
        if kind != type(error).__name__:
            raise  # the traceback, to standard error
        return 1
    return 0


def _explain(error: Exception, place: Path) -> tuple[str, str]:
    """The class and the line to report for an error: what a caller acts on keeps its class."""
    if isinstance(error, ValueError | BackendUnavailable | BuildError):
        return type(error).__name__, str(error)
    if isinstance(error, BundleError):  # of the bundle that is being built
        return "BuildError", str(error)
    if isinstance(error, MemoryError):
        return "BuildError", "the machine ran out of memory; build on one with more, or a smaller size"
    if (number := _system_error(error)) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        written = _written(error, place)
        return "BuildError", f"expected to write {written}, got: {os.strerror(number)}; make room there"
    said = first_line(error) if str(error).strip() else "no message"
    return "BuildError", f"the build failed: {type(error).__name__}: {said}"


def _written(error: Exception, place: Path) -> str:
    """The file that an error names, if it does; in the temporary folder, which goes away, by its name and the place."""
    file = Path(getattr(error, "filename", None) or "the bundle")
    return str(file) if file.is_absolute() and place not in file.parents else f"{file.name} in {place}"


def _system_error(error: Exception) -> int | None:
    """The number of a system error; safetensors and tokenizers, which are Rust, say it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _end_with_parent() -> None:
    """Wait until the builder is gone, which closes this end of the pipe, however it ended."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main())
