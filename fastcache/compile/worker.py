"""The build itself: one recipe, one empty folder -> a sealed bundle in it.

Runs as `python -m fastcache.compile.worker` under `builder.py`, which reads its progress and errors, one JSON line each,
from standard output. Every bundle is checked here against the PyTorch model before it is sealed.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import fastcache_engines
from fastcache import bundle as bundles
from fastcache.compile import export
from fastcache.compile.builder import Job, Progress, resolve
from fastcache.compile.models import SourceModel, state_bytes
from fastcache.cut.partition import partition_unet
from fastcache.errors import BackendUnavailable, BuildError
from fastcache.parity import TOLERANCE, measure_parity
from fastcache.recipe import Recipe


def build(job: Job, folder: Path, say: Progress) -> None:
    """Build every engine of a job into `folder` and seal it.

    Raises: `BuildError` for a size that does not fit, a disk that is too small, or engines that do not compute what
    the model does.
    """
    start = time.monotonic()
    recipe, model = job.recipe, job.model
    say(f"loading {model.name}")
    unet = model.load_unet()
    info, height, width = _describe(model, unet, recipe)
    _require_space(folder, state_bytes(unet))
    tokens = info.tokens or 77
    graphs, num_branches, weights_bytes, saved = _build_unet(unet, recipe, folder, tokens, height, width, info, say)
    del unet
    latent = height // info.vae_scale_factor, width // info.vae_scale_factor
    if "text" in (recipe.components or ()):
        say("exporting the text encoder")
        graphs += _write(
            folder, [export.exportable_text_encoder(model.load_text_encoder(), tokens)], "text_encoder.weights"
        )[0]
        model.load_tokenizer().save_pretrained(folder / "tokenizer")
    if "vae" in (recipe.components or ()):
        say("exporting the VAE decoder")
        graphs += _write(folder, [export.exportable_vae_decoder(model.load_vae(), *latent)], "vae_decoder.weights")[0]
    say(f"checking the {recipe.backend} engines against the model")
    backend = fastcache_engines.backend(recipe.backend)
    engines: dict[str, Any] = {}
    for role in graphs:
        engine = backend.load(folder / f"{role}.onnx")
        engines[role] = {"file": f"{role}.onnx", "inputs": engine.inputs, "outputs": engine.outputs}
        del engine
    parity = measure_parity(backend, folder / "full.onnx", folder / "shallow.onnx", folder / bundles.REFERENCE)
    if not parity.full_vs_model <= TOLERANCE or not parity.shallow_vs_full <= TOLERANCE:
        raise BuildError(f"expected engines within {TOLERANCE:g} of the model, got {parity}")
    say("sealing the bundle")
    bundles.seal(
        folder,
        {
            "schema": bundles.SCHEMA,
            "key": job.key,
            "model": info,
            "weights_sha256": model.weights_sha256,
            "branch_id": recipe.branch_id,
            "num_branches": num_branches,
            "cut": recipe.cut,
            "backend": recipe.backend,
            "dtype": recipe.dtype,
            "height": height,
            "width": width,
            "components": recipe.components,
            "profiles": {"batch": recipe.batch},
            "versions": job.versions,
            "device": job.device,
            "engines": engines,
            "parity": parity,
            "recipe": recipe,
            "weights_bytes": weights_bytes,
            "duplicated_bytes": saved,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "build_seconds": round(time.monotonic() - start, 2),
        },
    )


def _describe(model: SourceModel, unet: UNet2DConditionModel, recipe: Recipe) -> tuple[bundles.ModelInfo, int, int]:
    """What the loop must know, and the image size in pixels."""
    scale, latent_channels, tokens = 8, unet.config.out_channels, None
    if "vae" in model.components:
        config = json.loads((model.folder / "vae" / "config.json").read_text())  # type: ignore[operator]
        scale, latent_channels = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    if "text" in model.components:
        tokens = int(model.load_tokenizer().model_max_length)
    size = unet.config.sample_size
    sizes = size if isinstance(size, list | tuple) else (size, size)
    height, width = recipe.height or sizes[0] * scale, recipe.width or sizes[1] * scale
    for name, pixels in (("height", height), ("width", width)):
        if pixels % scale:
            raise ValueError(f"expected a {name} divisible by {scale} for {model.name}, got {pixels}")
    info = bundles.ModelInfo(
        name=model.name,
        random_weights=model.random_weights,
        in_channels=unet.config.in_channels,
        latent_channels=latent_channels,
        vae_scale_factor=scale,
        tokens=tokens,
        scheduler=model.scheduler,
    )
    return info, height, width


def _require_space(folder: Path, weights_bytes: int) -> None:
    needed, free = int(1.1 * weights_bytes) + 2**26, shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(f"expected {needed / 2**30:.1f} GiB free in {folder.parent}, got {free / 2**30:.1f} GiB")


def _build_unet(
    unet: UNet2DConditionModel,
    recipe: Recipe,
    folder: Path,
    tokens: int,
    height: int,
    width: int,
    info: bundles.ModelInfo,
    say: Progress,
) -> tuple[list[str], int, int, int]:
    """Export full and shallow; keep what the model itself computes for one input, for `verify`."""
    cut = partition_unet(unet, recipe.branch_id)
    scale = info.vae_scale_factor
    inputs = export.unet_inputs(unet, 2, height // scale, width // scale, tokens)
    full, shallow = export.exportable_unet(cut, inputs)
    say("running the model once, to compare with")
    with torch.no_grad():
        noise_pred = export.call_unet(unet, inputs).sample
        cached_feature = full.module(inputs)[1]
    save_file(inputs | {"noise_pred": noise_pred, "cached_feature": cached_feature}, folder / bundles.REFERENCE)
    say(f"exporting full and shallow U-Nets, branch {recipe.branch_id} of {cut.num_branches}")
    roles, weights_bytes, saved = _write(folder, [full, shallow], "unet.weights")
    return roles, cut.num_branches, weights_bytes, saved


def _write(folder: Path, parts: list[export.Exportable], weights_name: str) -> tuple[list[str], int, int]:
    models = [(f"{part.role}.onnx", export.export(part)) for part in parts]
    saved = export.save_graphs(models, folder, weights_name)
    return [part.role for part in parts], (folder / weights_name).stat().st_size, saved


def main() -> int:
    """Build what the one argument orders; errors go to standard output as JSON. Returns the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lines = sys.stdout
    sys.stdout = sys.stderr

    def tell(event: dict[str, str]) -> None:
        lines.write(json.dumps(event) + "\n")
        lines.flush()

    values, key, folder = json.loads(sys.argv[1])
    try:
        job = resolve(Recipe.model_validate(values))
        if job.key != key:
            raise BuildError(f"{job.model.name} changed while it was being built; build again")
        build(job, Path(folder), lambda message: tell({"progress": message}))
    except (ValueError, BackendUnavailable, BuildError) as error:
        tell({"error": type(error).__name__, "message": str(error)})
    except MemoryError:
        tell(
            {
                "error": "BuildError",
                "message": "the machine ran out of memory; build on one with more, or a smaller size",
            }
        )
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = f"no space left to write in {Path(folder).parent}" if full else str(error)
        tell({"error": "BuildError", "message": f"the build could not be written: {reason}"})
    else:
        return 0
    return 1


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
