"""A U-Net, text encoders and a VAE, one after the other -> engines in a folder, and what the manifest says of them.

The U-Net's passes are checked against the PyTorch model as soon as their engines are there. Knows models, graphs and
backends; what a job is and how a bundle is sealed is `worker.py`'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save

import fastcache_engines
from fastcache.bundle.bundle import REFERENCE
from fastcache.bundle.manifest import BlockEntry, EngineEntry, ModelInfo, Parity, PassEntry, Role, WorkEntry
from fastcache.bundle.parity import measure_parity, trials
from fastcache.bundle.patterns import chain_pass
from fastcache.compile import chain, components, describe, export, graph_passes, lower, passes
from fastcache.compile.builder import Job, Progress
from fastcache.compile.controls import load_controls
from fastcache.compile.models import TOKENIZERS, state_bytes
from fastcache.cut.names import FULL, CutKind, branch_of, shallow_pass
from fastcache.cut.partition import partition_branches
from fastcache.cut.pieces import feature, partition_blocks
from fastcache.errors import BuildError
from fastcache.files import write_whole
from fastcache_engines import BuildOptions, Device, DType, LoadOptions

_LARGEST_FP16 = 65504.0


@dataclass
class Workshop:
    """Makes one engine after the other, and keeps what the manifest says of them."""

    job: Job
    folder: Path
    say: Progress
    info: ModelInfo
    shapes: describe.Shapes
    engines: dict[Role, EngineEntry] = field(default_factory=dict)
    cut: CutKind = "plain"
    weights_bytes: int = 0
    duplicated_bytes: int = 0
    work: tuple[WorkEntry, ...] = ()
    chain: tuple[Role, ...] = ()
    blocks: tuple[BlockEntry, ...] = ()
    features: tuple[str, ...] = ()  # of a chain, whose engines give more than that

    def __post_init__(self) -> None:
        self.recipe = self.job.recipe
        self.device: Device = self.recipe.device or "cpu"
        self.dtype: DType = self.recipe.dtype
        self.backend = fastcache_engines.backend(self.recipe.backend)
        self.can = self.backend.CAPABILITIES
        self.runs_here = self.backend.support(self.device).can_run and not self.recipe.onnx_only
        if not self.runs_here and self.dtype != "bf16":
            fastcache_engines.backend(fastcache_engines.REFERENCE).version()  # checks the graphs, so has to be there
        self.parity: Parity | None = None

    def make_unet(self, unet: UNet2DConditionModel | UNet2DModel) -> int:
        """The full and the shallow engine, checked against the model. Returns the number of branches."""
        shapes = self.shapes
        tokens = shapes.tokens.opt if shapes.tokens is not None else 0
        inputs = passes.unet_inputs(unet, 2, *shapes.latent, tokens, self.info.time_ids or 6)
        self.work = describe.work(unet, inputs)
        if self.recipe.blocks:
            return self._make_chain(unet, inputs)
        controls = load_controls(self.job.model.controls, unet, inputs["sample"], shapes.scale)
        inputs |= controls.inputs
        cuts = partition_branches(unet, self.recipe.branches, self.recipe.cut)
        expected = passes.reference(unet, cuts, controls.given(inputs))
        write_whole(self.folder / REFERENCE, save(inputs | expected))
        cut = cuts.at[self.recipe.branch_id]
        lower.prepare(cuts.at.values(), self.dtype if self.can.typed else None, self.recipe.kernels)
        if self.can.typed:
            controls.lower(self.dtype)
        named = ", ".join(map(str, self.recipe.branches))
        self.say(f"exporting full and shallow U-Nets, branch {named} of {cut.num_branches}")
        self.cut, num_branches = cut.kind, cut.num_branches
        parts = controls.steer(passes.exportable_unet(cuts, inputs, shapes.scale), self.recipe.branches)
        images = self.recipe.batch
        del unet, cut, cuts
        self._make_passes(parts)
        for part in controls.parts:  # once a picture, in float32 as the text encoders
            self.say(f"exporting the {part.role.replace('_', ' ')}")
            self._make([part], part.role, "fp32", (1, images.opt, images.max), {})
        return num_branches

    def _make_chain(self, unet: UNet2DConditionModel | UNet2DModel, inputs: export.Inputs) -> int:
        """The stem, trunks and blocks of a chain. Returns the number of branches."""
        made = partition_blocks(unet, self.recipe.blocks, self.recipe.branches)
        if not made.blocks:
            kinds, others = " or ".join(self.recipe.blocks), "leave --blocks out, or name resnet"
            raise BuildError(f"expected a U-Net with {kinds} blocks that can be left out, got none; {others}")
        self.blocks = describe.blocks(unet, made, inputs)
        write_whole(self.folder / REFERENCE, save(inputs | chain.chain_reference(unet, made, inputs)))
        lower.split_gates(made)
        if self.can.typed:
            lower.narrow(made, self.dtype)
        self.say(f"exporting a U-Net with {len(made.blocks)} blocks that can be left out")
        parts = chain.exportable_chain(made, inputs, self.shapes.scale)
        self.chain, self.features = tuple(part.role for part in parts), made.known
        del unet, made
        self._make_passes(parts)
        return len(self.work) - 1

    def _make_passes(self, parts: Sequence[export.Exportable]) -> None:
        images, each = self.recipe.batch, self.info.guided_rows
        rows = (images.min, each * images.opt, each * images.max)
        self._make(parts, "unet", self.dtype, rows, graph_passes.translations(self.can, self.dtype), checked=True)

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
            if self.can.typed:
                part.module.to(fastcache_engines.torch_dtype(dtype))
            images = self.recipe.batch
            # An image to image run may give one image for several pictures.
            rows = (1, images.opt, images.max) if part.role == "vae_encoder" else (images.min, images.opt, images.max)
            self._make([part], part.role, dtype, rows, graph_passes.translations(self.can, dtype))

    @property
    def passes(self) -> dict[str, PassEntry]:
        """What each pass of the bundle runs, takes and stores, read off its engine."""
        counted = {entry.branch_id: entry.layers + entry.attention for entry in self.work}
        cached = self.features or {spec.name for spec in self.engines[FULL].outputs} - {"noise_pred"}
        found = dict[str, PassEntry]()
        for name in (FULL, *map(shallow_pass, self.recipe.branches)):
            engines = self._engines_of(name)
            taken = [spec.name for role in engines for spec in self.engines[role].inputs]
            given = [spec.name for role in engines for spec in self.engines[role].outputs]
            found[name] = PassEntry(
                engines=engines,
                takes=tuple(one for one in dict.fromkeys(taken) if one in cached and one not in given),
                stores=tuple(one for one in given if one in cached),
                multiply_adds=counted[branch_of(name)],
            )
        return found

    def _engines_of(self, name: str) -> tuple[Role, ...]:
        """The engines of a full or shallow pass: one of its name or, in a chain, all that it needs."""
        if not self.chain:
            return (name,)
        branch = branch_of(name)
        given = [] if branch is None else [feature(branch, self.recipe.branch_id)]
        return chain_pass(self.engines, self.chain, given)

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
        graphs, total, shared = self._export(parts, stem, dtype, translations)
        if checked:
            self.weights_bytes, self.duplicated_bytes = total, shared
        if checked and not self.runs_here:
            self._check_graphs(parts)
        if self.can.source == "onnx":
            _release(parts)
        if not self.recipe.onnx_only:
            named = " and ".join(graphs) if len(graphs) < 4 else f"{len(graphs)} engines"
            self.say(f"building {named} with {self.recipe.backend}")
            shapes = {name: shape for part in parts for name, shape in self._input_shapes(part).items()}
            options = BuildOptions(self.device, dtype, rows, shapes, self.recipe.compute_capability, self.say)
            for role, name in self.backend.build(graphs, self.folder, options).items():
                self.engines[role] = self.engines[role].model_copy(update={"file": name})
        if checked and self.runs_here:
            self.say(f"checking the {self.recipe.backend} engines against the model")
            self._measure(self.backend, LoadOptions(self.device, dtype))

    def _export(
        self, parts: Sequence[export.Exportable], stem: str, dtype: DType, translations: graph_passes.Translations
    ) -> tuple[dict[str, Any], int, int]:
        """What the backend builds from, by role, the bytes of its weights, and how many several parts share.

        The exporter's graphs end with this: they hold weights of their own making, a third as many as the model.
        """
        graphs: dict[str, Any] = {}
        models: list[tuple[str, Any]] = []
        exported = list[Any]()
        if parts[0].role in self.chain and self.can.source == "onnx":
            exported = export.export_chain(parts, chain.whole(parts), translations, self.shapes.free)
        for part in parts:
            if self.can.source == "program":
                others = [(size.height, size.width) for size in self.shapes.sizes[1:]]
                graph, specs = export.export_program(part, self.shapes.free, others)
                graphs[part.role] = graph
            else:
                model, specs = exported.pop(0) if exported else export.export(part, translations, self.shapes.free)
                models.append((f"{part.role}.onnx", model))
                graphs[part.role] = self.folder / models[-1][0]
            file = f"{part.role}.onnx"
            self.engines[part.role] = EngineEntry(file=file, dtype=dtype, inputs=specs[0], outputs=specs[1])
        shared = min(state_bytes(part.module) for part in parts)
        total = max(state_bytes(part.module) for part in parts)
        if models:
            shared = export.save_graphs(models, self.folder, f"{stem}.weights")
            total = (self.folder / f"{stem}.weights").stat().st_size
        return graphs, total, shared

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
        if self.dtype == "bf16" and self.chain:
            raise BuildError("expected blocks in fp32 or fp16 where the engines do not run here, got bf16")
        if self.dtype == "bf16":
            self.say("checking the bf16 modules against the model, for these engines do not run here")
            self._keep(passes.module_parity(parts, load_file(self.folder / REFERENCE), self.dtype))
        else:
            self.say("checking the graphs on ONNX Runtime against the model, for these engines do not run here")
            _release(parts)
            self._measure(fastcache_engines.backend(fastcache_engines.REFERENCE), LoadOptions("cpu", self.dtype))

    def _measure(self, backend: fastcache_engines.Backend, options: LoadOptions) -> None:
        tried = trials(self.engines, self.passes, self.chain, self.blocks)
        self._keep(measure_parity(backend, self.folder, tried, options))

    def _keep(self, parity: Parity) -> None:
        if not max(parity.full_vs_model, parity.shallow_vs_full) <= parity.tolerance:
            raise BuildError(f"expected engines within {parity.tolerance:g} of the model, got {parity}")
        self.parity = parity


def _release(parts: Sequence[export.Exportable]) -> None:
    """Let go of weights that are in the graphs' file by now: what reads that file needs the memory, for SDXL 5 GB."""
    for part in parts:
        part.module.to("meta")
    gc.collect()
    with contextlib.suppress(AttributeError, TypeError):  # glibc's alone, which keeps what is freed in its heap
        ctypes.CDLL(None).malloc_trim(0)
