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
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import save

import fastcache_engines
from fastcache import bundle as bundles
from fastcache.bundle import Role
from fastcache.compile import components, describe, export, graph_passes, lower
from fastcache.compile.builder import Job, Progress, resolve
from fastcache.compile.models import TOKENIZERS, state_bytes
from fastcache.cut.partition import partition_branches
from fastcache.errors import BackendUnavailable, BuildError
from fastcache.parity import measure_parity, module_parity
from fastcache.recipe import Device, DType, Recipe
from fastcache_engines import BuildOptions, LoadOptions

_SPARE_BYTES = 2**26  # graphs, tokenizer, reference and the file system's own needs
_LARGEST_FP16 = 65504.0


def build(job: Job, folder: Path, say: Progress) -> None:
    """Build every engine of a job into `folder` and seal it.

    Raises: `ValueError` for a size that does not fit; `PartitionError`; `BuildError` for a disk that is too small, or
    engines that do not compute what the model does.
    """
    start = time.monotonic()
    recipe, model, wanted = job.recipe, job.model, job.recipe.components or ()
    say(f"loading {model.name}")
    unet = model.load_unet()
    info = describe.describe(model, unet)
    shapes = describe.shapes(unet, recipe, info)
    _require_space(folder, state_bytes(unet))
    workshop = _Workshop(job, folder, say, info, shapes)
    num_branches = workshop.make_unet(unet)
    del unet
    if "text" in wanted:
        workshop.make_text_encoders()
    if "vae" in wanted:
        workshop.make_vae()
    say("sealing the bundle")
    fields = _manifest_fields(job, num_branches, workshop)
    bundles.seal(folder, fields | {"build_seconds": round(time.monotonic() - start, 2)})


@dataclass
class _Workshop:
    """Makes one engine after the other, and keeps what the manifest says of them."""

    job: Job
    folder: Path
    say: Progress
    info: bundles.ModelInfo
    shapes: describe.Shapes
    engines: dict[Role, bundles.EngineEntry] = field(default_factory=dict)
    cut: str = "plain"
    weights_bytes: int = 0
    duplicated_bytes: int = 0
    work: tuple[bundles.WorkEntry, ...] = ()

    def __post_init__(self) -> None:
        self.recipe = self.job.recipe
        self.device: Device = self.recipe.device or "cpu"
        self.dtype: DType = self.recipe.dtype
        self.backend = fastcache_engines.backend(self.recipe.backend)
        self.runs_here = self.backend.support(self.device).can_run and not self.recipe.onnx_only
        self.parity: bundles.Parity | None = None

    def make_unet(self, unet: UNet2DConditionModel | UNet2DModel) -> int:
        """The full and the shallow engine, checked against the model. Returns the number of branches."""
        shapes = self.shapes
        tokens = shapes.tokens.opt if shapes.tokens is not None else 0
        inputs = export.unet_inputs(unet, 2, *shapes.latent, tokens, self.info.time_ids or 6)
        cuts = partition_branches(unet, self.recipe.branches, self.recipe.cut)
        bundles.write_whole(self.folder / bundles.REFERENCE, save(inputs | export.reference(unet, cuts, inputs)))
        cut = cuts.at[self.recipe.branch_id]
        lower.prepare(cuts.at.values(), self.dtype if self.backend.TYPED else None, self.recipe.kernels)
        named = ", ".join(map(str, self.recipe.branches))
        self.say(f"exporting full and shallow U-Nets, branch {named} of {cut.num_branches}")
        self.cut, self.work = cut.kind, describe.work(unet, inputs)
        num_branches, parts = cut.num_branches, export.exportable_unet(cuts, inputs, shapes.scale)
        images = self.recipe.batch
        each = self.info.guided_rows
        rows = (images.min, each * images.opt, each * images.max)
        del unet, cut, cuts
        self._make(parts, "unet", self.dtype, rows, self._translations(self.dtype), checked=True)
        return num_branches

    def make_text_encoders(self) -> None:
        """They run once a picture, in float32 whatever the U-Net's dtype."""
        model, images = self.job.model, self.recipe.batch
        for name in model.text_encoders:
            self.say(f"exporting the {name.replace('_', ' ')}")
            tokenizer = model.load_tokenizer(name)
            tokenizer.save_pretrained(self.folder / TOKENIZERS[name])
            encoder, tokens = model.load_text_encoder(name), int(tokenizer.model_max_length)
            part = components.exportable_text_encoder(encoder, tokens, name, model.family)
            # Causal attention, which is not fused.
            self._make([part], part.role, "fp32", (1, images.opt, images.max), {})

    def make_vae(self) -> None:
        """Decoder and encoder, each in the recipe's dtype where that is exact enough, else in float32."""
        vae = self.job.model.load_vae()
        sizes = *self.shapes.latent, self.shapes.scale
        for part in (
            components.exportable_vae_decoder(vae, *sizes),
            components.exportable_vae_encoder(vae, *sizes, scaled=not self.info.edits),
        ):
            name = f"VAE {part.role.removeprefix('vae_')}"
            self.say(f"exporting the {name}")
            dtype = self._vae_dtype(part, name)
            if self.backend.TYPED:
                part.module.to(lower.TORCH_DTYPES[dtype])
            images = self.recipe.batch
            # An image to image run may give one image for several pictures.
            rows = (1, images.opt, images.max) if part.role == "vae_encoder" else (images.min, images.opt, images.max)
            self._make([part], part.role, dtype, rows, self._translations(dtype))

    def _translations(self, dtype: DType) -> graph_passes.Translations:
        return graph_passes.translations(self.recipe.backend, dtype if self.backend.TYPED else "fp32")

    def _vae_dtype(self, part: export.Exportable, name: str) -> DType:
        """float16 where the largest activation leaves it room. bfloat16 bands a picture: never here."""
        if self.dtype != "fp16":
            return "fp32"
        largest = lower.largest_activation(part.module, part.inputs)
        if largest < _LARGEST_FP16 / 4:
            return "fp16"
        self.say(f"the {name} stays in fp32: its activations reach {largest:.0f}, fp16 ends at {_LARGEST_FP16:.0f}")
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
                graph, specs = export.export_program(part, self.shapes.free)
                graphs[part.role] = graph
            else:
                model, specs = export.export(part, translations, self.shapes.free)
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
            shapes = {name: shape for part in parts for name, shape in self._input_shapes(part).items()}
            options = BuildOptions(self.device, dtype, rows, shapes, self.recipe.compute_capability, self.say)
            for role, name in self.backend.build(graphs, self.folder, options).items():
                self.engines[role] = self.engines[role].model_copy(update={"file": name})
        if checked and self.runs_here:
            self.say(f"checking the {self.recipe.backend} engines against the model")
            self._measure(self.backend, LoadOptions(self.device, dtype))

    def _input_shapes(self, part: export.Exportable) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The least, usual and largest of inputs of which more than the batch is free, without the batch."""
        profiles, free = self.shapes.profiles, self.shapes.free
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name, example in part.inputs.items():
            stride = part.strides.get(name)
            axes = {axis: profiles[size] for axis, (size, _, _) in free.axes(name, stride).items()}
            if axes:
                found[name] = tuple(
                    tuple(
                        getattr(axes[axis], end) // (stride or 1) if axis in axes else size
                        for axis, size in enumerate(example.shape)
                    )[1:]
                    for end in ("min", "opt", "max")
                )
        return found

    def _check_graphs(self, parts: Sequence[export.Exportable]) -> None:
        """Engines that cannot run here are checked by what they are built from.

        ONNX Runtime computes float16 graphs on a CPU; of bfloat16 ones only the PyTorch modules can be run.
        """
        if self.dtype == "bf16":
            self.say("checking the bf16 modules against the model, for these engines do not run here")
            self._keep(module_parity(parts, self.folder / bundles.REFERENCE, self.dtype))
        else:
            self.say("checking the graphs on ONNX Runtime against the model, for these engines do not run here")
            self._measure(fastcache_engines.backend("onnxruntime"), LoadOptions("cpu", self.dtype))

    def _measure(self, backend: fastcache_engines.Backend, options: LoadOptions) -> None:
        full, *shallow = (
            self.folder / self.engines[role].file
            for role in ("full", *(bundles.shallow_role(b, self.recipe.branch_id) for b in self.recipe.branches))
        )
        self._keep(measure_parity(backend, full, shallow, self.folder / bundles.REFERENCE, options))

    def _keep(self, parity: bundles.Parity) -> None:
        if not max(parity.full_vs_model, parity.shallow_vs_full) <= parity.tolerance:
            raise BuildError(f"expected engines within {parity.tolerance:g} of the model, got {parity}")
        self.parity = parity


def _manifest_fields(
    job: Job,
    num_branches: int,
    made: _Workshop,
) -> dict[str, Any]:
    """Everything that the manifest says but the files, their hashes and the time it took."""
    recipe = job.recipe
    return {
        "schema": bundles.SCHEMA,
        "key": job.key,
        "model": made.info,
        "weights_sha256": job.model.weights_sha256,
        "branch_id": recipe.branch_id,
        "branches": recipe.branches,
        "num_branches": num_branches,
        "cut": made.cut,
        "backend": recipe.backend,
        "dtype": recipe.dtype,
        "height": made.shapes.height,
        "width": made.shapes.width,
        "sizes": made.shapes.sizes,
        "components": recipe.components,
        "profiles": {"batch": recipe.batch, **made.shapes.profiles},
        "versions": job.versions,
        "device": job.device,
        "engines": made.engines,
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
