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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from diffusers import UNet2DConditionModel
from safetensors.torch import save

import fastcache_engines
from fastcache import bundle as bundles
from fastcache.bundle import Role
from fastcache.compile import export, graph_passes, lower
from fastcache.compile.builder import Job, Progress, resolve
from fastcache.compile.models import SourceModel, state_bytes
from fastcache.cut.partition import partition_unet
from fastcache.errors import BackendUnavailable, BuildError
from fastcache.parity import measure_parity, module_parity
from fastcache.recipe import Device, DType, Recipe
from fastcache_engines import BuildOptions, LoadOptions

_CLIP_TOKENS = 77
_SPARE_BYTES = 2**26  # graphs, tokenizer, reference and the file system's own needs
_LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class _Size:
    """The size of an image and of its latents."""

    height: int
    width: int
    latent_height: int
    latent_width: int


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
    workshop = _Workshop(job, folder, say)
    num_branches = workshop.make_unet(unet, size, info.tokens or _CLIP_TOKENS)
    del unet
    if "text" in components:
        workshop.make_text_encoder()
    if "vae" in components:
        workshop.make_vae_decoder(size)
    say("sealing the bundle")
    fields = _manifest_fields(job, info, size, num_branches, workshop)
    bundles.seal(folder, fields | {"build_seconds": round(time.monotonic() - start, 2)})


@dataclass
class _Workshop:
    """Makes one engine after the other, and keeps what the manifest says of them."""

    job: Job
    folder: Path
    say: Progress
    engines: dict[Role, bundles.EngineEntry] = field(default_factory=dict)
    cut: str = "plain"
    weights_bytes: int = 0
    duplicated_bytes: int = 0

    def __post_init__(self) -> None:
        self.recipe = self.job.recipe
        self.device: Device = self.recipe.device or "cpu"
        self.dtype: DType = self.recipe.dtype
        self.backend = fastcache_engines.backend(self.recipe.backend)
        self.runs_here = self.backend.support(self.device).can_run and not self.recipe.onnx_only
        self.parity: bundles.Parity | None = None

    def make_unet(self, unet: UNet2DConditionModel, size: _Size, tokens: int) -> int:
        """The full and the shallow engine, checked against the model. Returns the number of branches."""
        inputs = export.unet_inputs(unet, 2, size.latent_height, size.latent_width, tokens)
        cut = partition_unet(unet, self.recipe.branch_id, self.recipe.cut)
        bundles.write_whole(self.folder / bundles.REFERENCE, save(inputs | export.reference(unet, cut, inputs)))
        lower.split_gates(cut)
        if self.backend.TYPED:
            lower.lower(cut, self.dtype)
        self.say(f"exporting full and shallow U-Nets, branch {cut.branch_id} of {cut.num_branches}")
        self.cut = cut.kind
        num_branches, parts = cut.num_branches, export.exportable_unet(cut, inputs)
        images = self.recipe.batch
        rows = (images.min, 2 * images.opt, 2 * images.max)  # a guided image takes two
        del unet, cut
        self._make(parts, "unet", self.dtype, rows, self._translations(self.dtype), checked=True)
        return num_branches

    def make_text_encoder(self) -> None:
        """It runs once a picture, in float32 whatever the U-Net's dtype."""
        self.say("exporting the text encoder")
        tokenizer = self.job.model.load_tokenizer()
        tokenizer.save_pretrained(self.folder / "tokenizer")
        part = export.exportable_text_encoder(self.job.model.load_text_encoder(), int(tokenizer.model_max_length))
        images = self.recipe.batch
        self._make([part], part.role, "fp32", (1, images.opt, images.max), {})  # causal attention, which is not fused

    def make_vae_decoder(self, size: _Size) -> None:
        """It runs in the recipe's dtype where that is exact enough, else in float32."""
        self.say("exporting the VAE decoder")
        vae = self.job.model.load_vae()
        part = export.exportable_vae_decoder(vae, size.latent_height, size.latent_width)
        dtype = self._vae_dtype(part)
        if self.backend.TYPED:
            part.module.to(lower.TORCH_DTYPES[dtype])
        images = self.recipe.batch
        self._make([part], part.role, dtype, (images.min, images.opt, images.max), self._translations(dtype))

    def _translations(self, dtype: DType) -> graph_passes.Translations:
        return graph_passes.translations(self.recipe.backend, dtype if self.backend.TYPED else "fp32")

    def _vae_dtype(self, part: export.Exportable) -> DType:
        """float16 where the decoder's largest activation leaves it room. bfloat16 bands a picture: never here."""
        if self.dtype != "fp16":
            return "fp32"
        largest = lower.largest_activation(part.module, part.inputs)
        if largest < _LARGEST_FP16 / 4:
            return "fp16"
        self.say(
            f"the VAE decoder stays in fp32: its activations reach {largest:.0f}, fp16 ends at {_LARGEST_FP16:.0f}"
        )
        return "fp32"

    def _make(
        self,
        parts: Sequence[export.Exportable],
        stem: str,
        dtype: DType,
        rows: tuple[int, int, int],
        translations: graph_passes.Translations,
        checked: bool = False,
    ) -> None:
        """Export parts that share weights and build their engines; `checked` ones are compared with the model."""
        graphs: dict[str, Any] = {}
        models: list[tuple[str, Any]] = []
        for part in parts:
            if self.backend.SOURCE == "program":
                graph, specs = export.export_program(part)
                graphs[part.role] = graph
            else:
                model, specs = export.export(part, translations)
                models.append((f"{part.role}.onnx", model))
                graphs[part.role] = self.folder / models[-1][0]
            file = f"{part.role}.onnx"
            self.engines[part.role] = bundles.EngineEntry(file=file, dtype=dtype, inputs=specs[0], outputs=specs[1])
        shared = min(state_bytes(part.module) for part in parts)
        total = max(state_bytes(part.module) for part in parts)
        if models:
            shared = export.save_graphs(models, self.folder, f"{stem}.weights")
            total = (self.folder / f"{stem}.weights").stat().st_size
        if checked:
            self.weights_bytes, self.duplicated_bytes = total, shared
        if checked and not self.runs_here:
            self._check_graphs(parts)
        if not self.recipe.onnx_only:
            self.say(f"building {' and '.join(graphs)} with {self.recipe.backend}")
            options = BuildOptions(self.device, dtype, rows, self.recipe.compute_capability, self.say)
            for role, name in self.backend.build(graphs, self.folder, options).items():
                self.engines[cast(Role, role)] = self.engines[cast(Role, role)].model_copy(update={"file": name})
        if checked and self.runs_here:
            self.say(f"checking the {self.recipe.backend} engines against the model")
            self._measure(self.backend, LoadOptions(self.device, dtype))

    def _check_graphs(self, parts: Sequence[export.Exportable]) -> None:
        """Engines that cannot run here are checked by what they are built from.

        ONNX Runtime computes float16 graphs on a CPU; of bfloat16 ones only the PyTorch modules can be run.
        """
        if self.dtype == "bf16":
            self.say("checking the bf16 modules against the model, for these engines do not run here")
            self._keep(module_parity([part.module for part in parts], self.folder / bundles.REFERENCE, self.dtype))
        else:
            self.say("checking the graphs on ONNX Runtime against the model, for these engines do not run here")
            self._measure(fastcache_engines.backend("onnxruntime"), LoadOptions("cpu", self.dtype))

    def _measure(self, backend: fastcache_engines.Backend, options: LoadOptions) -> None:
        full, shallow = (self.folder / self.engines[role].file for role in ("full", "shallow"))
        self._keep(measure_parity(backend, full, shallow, self.folder / bundles.REFERENCE, options))

    def _keep(self, parity: bundles.Parity) -> None:
        if not max(parity.full_vs_model, parity.shallow_vs_full) <= parity.tolerance:
            raise BuildError(f"expected engines within {parity.tolerance:g} of the model, got {parity}")
        self.parity = parity


def _manifest_fields(
    job: Job,
    info: bundles.ModelInfo,
    size: _Size,
    num_branches: int,
    made: _Workshop,
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
        "cut": made.cut,
        "backend": recipe.backend,
        "dtype": recipe.dtype,
        "height": size.height,
        "width": size.width,
        "components": recipe.components,
        "profiles": {"batch": recipe.batch},
        "versions": job.versions,
        "device": job.device,
        "engines": made.engines,
        "parity": made.parity,
        "recipe": recipe,
        "weights_bytes": made.weights_bytes,
        "duplicated_bytes": made.duplicated_bytes,
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
