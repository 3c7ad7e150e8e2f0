"""The build itself: one recipe, one empty folder -> a sealed bundle in it.

Runs as `python -m fastcache.compile.worker` under `builder.py`, which reads its progress and errors, one JSON line
each, from standard output. Every bundle is checked here against the PyTorch model before it is sealed.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save

import fastcache_engines
from fastcache import bundle as bundles
from fastcache.bundle import Role
from fastcache.compile import export, graph_passes
from fastcache.compile.builder import Job, Progress, resolve
from fastcache.compile.models import SourceModel, state_bytes
from fastcache.cut.partition import Cut, partition_unet
from fastcache.errors import BackendUnavailable, BuildError
from fastcache.parity import TOLERANCE, measure_parity
from fastcache.recipe import Recipe

_CLIP_TOKENS = 77
_SPARE_BYTES = 2**26  # graphs, tokenizer, reference and the file system's own needs


@dataclass(frozen=True)
class _Size:
    """The size of an image and of its latents."""

    height: int
    width: int
    latent_height: int
    latent_width: int


@dataclass(frozen=True)
class _Written:
    """Graphs that share one file of weights: its size, and what it would take more if equal tensors were repeated."""

    roles: list[Role]
    weights_bytes: int
    duplicated_bytes: int


def build(job: Job, folder: Path, say: Progress) -> None:
    """Build every engine of a job into `folder` and seal it.

    Raises: `ValueError` for a size that does not fit; `PartitionError`; `BuildError` for a disk that is too small, or
    engines that do not compute what the model does.
    """
    start = time.monotonic()
    recipe, model, components = job.recipe, job.model, job.recipe.components or ()
    say(f"loading {model.name}")
    unet = model.load_unet()
    info = _describe(model, unet)
    size = _size(unet, recipe, info)
    _require_space(folder, state_bytes(unet))
    cut = partition_unet(unet, recipe.branch_id)
    inputs = export.unet_inputs(unet, 2, size.latent_height, size.latent_width, info.tokens or _CLIP_TOKENS)
    num_branches = cut.num_branches
    say(f"exporting full and shallow U-Nets, branch {recipe.branch_id} of {num_branches}")
    translations = graph_passes.BY_BACKEND.get(recipe.backend)
    graphs = _build_unet(unet, cut, inputs, folder, translations)
    del unet, cut, inputs
    roles = list(graphs.roles)
    if "text" in components:
        say("exporting the text encoder")
        roles += _build_text_encoder(model, folder).roles
    if "vae" in components:
        say("exporting the VAE decoder")
        roles += _build_vae_decoder(model, size, folder, translations).roles
    say(f"checking the {recipe.backend} engines against the model")
    engines, parity = _engine_entries(recipe, roles, folder), _check_parity(recipe, folder)
    say("sealing the bundle")
    fields = _manifest_fields(job, info, size, num_branches, graphs, engines, parity)
    bundles.seal(folder, fields | {"build_seconds": round(time.monotonic() - start, 2)})


def _manifest_fields(
    job: Job,
    info: bundles.ModelInfo,
    size: _Size,
    num_branches: int,
    graphs: _Written,
    engines: dict[Role, bundles.EngineEntry],
    parity: bundles.Parity,
) -> dict[str, Any]:
    """Everything that the manifest says but the files, their hashes and the time it took."""
    recipe = job.recipe
    return {
        "schema": bundles.SCHEMA,
        "key": job.key,
        "model": info,
        "weights_sha256": job.model.weights_sha256,
        "branch_id": recipe.branch_id,
        "num_branches": num_branches,
        "cut": recipe.cut,
        "backend": recipe.backend,
        "dtype": recipe.dtype,
        "height": size.height,
        "width": size.width,
        "components": recipe.components,
        "profiles": {"batch": recipe.batch},
        "versions": job.versions,
        "device": job.device,
        "engines": engines,
        "parity": parity,
        "recipe": recipe,
        "weights_bytes": graphs.weights_bytes,
        "duplicated_bytes": graphs.duplicated_bytes,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _describe(model: SourceModel, unet: UNet2DConditionModel) -> bundles.ModelInfo:
    """What the loop around the engines must know of the model."""
    config: Any = unet.config
    scale, latent_channels, tokens = 8, config.out_channels, None
    if model.folder is not None and "vae" in model.components:
        vae = json.loads((model.folder / "vae" / "config.json").read_text(encoding="utf-8"))
        scale, latent_channels = 2 ** (len(vae["block_out_channels"]) - 1), vae["latent_channels"]
    if "text" in model.components:
        tokens = int(model.load_tokenizer().model_max_length)
    return bundles.ModelInfo(
        name=model.name,
        random_weights=model.random_weights,
        in_channels=config.in_channels,
        latent_channels=latent_channels,
        vae_scale_factor=scale,
        tokens=tokens,
        scheduler=model.scheduler,
    )


def _size(unet: UNet2DConditionModel, recipe: Recipe, info: bundles.ModelInfo) -> _Size:
    """The recipe's size, or the one that the model was trained for."""
    config: Any = unet.config
    own, scale = config.sample_size, info.vae_scale_factor
    own_height, own_width = own if isinstance(own, list | tuple) else (own, own)
    height, width = recipe.height or own_height * scale, recipe.width or own_width * scale
    for name, pixels in (("height", height), ("width", width)):
        if pixels % scale:
            raise ValueError(f"expected a {name} divisible by {scale} for {info.name}, got {pixels}")
    return _Size(height, width, height // scale, width // scale)


def _require_space(folder: Path, weights_bytes: int) -> None:
    needed, free = int(1.1 * weights_bytes) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(f"expected {needed / 2**30:.1f} GiB free in {folder.parent}, got {free / 2**30:.1f} GiB")


def _build_unet(
    unet: UNet2DConditionModel,
    cut: Cut,
    inputs: export.Inputs,
    folder: Path,
    translations: graph_passes.Translations | None,
) -> _Written:
    """Export full and shallow; keep what the model itself computes for one input, for `verify`."""
    full, shallow = export.exportable_unet(cut, inputs)
    with torch.no_grad():
        reference = {"noise_pred": export.call_unet(unet, inputs).sample, "cached_feature": full.module(inputs)[1]}
    bundles.write_whole(folder / bundles.REFERENCE, save(inputs | reference))
    return _write(folder, [full, shallow], "unet.weights", translations)


def _build_text_encoder(model: SourceModel, folder: Path) -> _Written:
    tokenizer = model.load_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = export.exportable_text_encoder(model.load_text_encoder(), int(tokenizer.model_max_length))
    return _write(folder, [encoder], "text_encoder.weights", None)  # causal attention, which is not fused


def _build_vae_decoder(
    model: SourceModel, size: _Size, folder: Path, translations: graph_passes.Translations | None
) -> _Written:
    decoder = export.exportable_vae_decoder(model.load_vae(), size.latent_height, size.latent_width)
    return _write(folder, [decoder], "vae_decoder.weights", translations)


def _write(
    folder: Path, parts: list[export.Exportable], weights_name: str, translations: graph_passes.Translations | None
) -> _Written:
    models = [(f"{part.role}.onnx", export.export(part, translations)) for part in parts]
    saved = export.save_graphs(models, folder, weights_name)
    return _Written([part.role for part in parts], (folder / weights_name).stat().st_size, saved)


def _engine_entries(recipe: Recipe, roles: list[Role], folder: Path) -> dict[Role, bundles.EngineEntry]:
    """Load each engine once, one at a time, and note what it takes and gives."""
    entries: dict[Role, bundles.EngineEntry] = {}
    for role in roles:
        engine = fastcache_engines.backend(recipe.backend).load(folder / f"{role}.onnx")
        entries[role] = bundles.EngineEntry(file=f"{role}.onnx", inputs=engine.inputs, outputs=engine.outputs)
    return entries


def _check_parity(recipe: Recipe, folder: Path) -> bundles.Parity:
    backend = fastcache_engines.backend(recipe.backend)
    parity = measure_parity(backend, folder / "full.onnx", folder / "shallow.onnx", folder / bundles.REFERENCE)
    if not parity.full_vs_model <= TOLERANCE or not parity.shallow_vs_full <= TOLERANCE:
        raise BuildError(f"expected engines within {TOLERANCE:g} of the model, got {parity}")
    return parity


def main() -> int:
    """Build what the one argument orders; errors go to standard output as JSON. Returns the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed, also by libraries in C++, is no event

    def tell(event: dict[str, str]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    values, key, folder = json.loads(sys.argv[1])
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
    if isinstance(error, MemoryError):
        return "BuildError", "the machine ran out of memory; build on one with more, or a smaller size"
    if _system_error(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "BuildError", f"the build could not be written: no space left in {place}"
    lines = str(error).strip().splitlines()
    return "BuildError", f"the build failed: {type(error).__name__}: {lines[0] if lines else 'no message'}"


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
