"""A U-Net, text encoders and a VAE, one after the other -> engines in a folder, and what the manifest says of them.

The U-Net's passes are checked against the PyTorch model as soon as their engines are there. Knows models, graphs and
backends; what a job is and how a bundle is sealed is `worker.py`'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save
from torch import Tensor

import fastcache_engines
from fastcache.bundle.bundle import REFERENCE
from fastcache.bundle.manifest import (
    BlockEntry,
    EngineEntry,
    ModelInfo,
    Parity,
    PassEntry,
    Quantization,
    QuantizedEngine,
    Role,
    WorkEntry,
)
from fastcache.bundle.parity import graph_error, measure_parity, trials
from fastcache.bundle.patterns import Passes
from fastcache.compile import calibrate, chain, components, describe, export, graph_passes, lower, passes, quantize
from fastcache.compile.builder import Job, Progress
from fastcache.compile.controls import load_controls
from fastcache.compile.models import TOKENIZERS, VAE, state_bytes
from fastcache.cut.names import FULL, CutKind
from fastcache.cut.partition import partition_branches
from fastcache.cut.pieces import partition_blocks
from fastcache.errors import BuildError
from fastcache.files import write_whole
from fastcache_engines import (
    INT8_GRAPH_TOLERANCE,
    INT8_TOLERANCE,
    BuildOptions,
    Device,
    DType,
    LoadOptions,
    int8_weight_bits,
)

_LARGEST_FP16 = 65504.0
# Of what is computed in bfloat16 to the same in float32: of a VAE's pictures, as a PSNR (half a step of 8 bits is
# 58.9 dB on average), and of a text encoder's states, as a signal-to-noise ratio.
LEAST_VAE_PSNR_DB = 50.0
LEAST_TEXT_SNR_DB = 40.0


class OutOfTolerance(BuildError):
    """Engines that were built, and do not compute what the model does."""


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
    quantized: Quantization | None = None
    features: tuple[str, ...] = ()  # of a chain, whose engines give more than that

    def __post_init__(self) -> None:
        self.recipe = self.job.recipe
        self.device: Device = self.recipe.device or "cpu"
        self.dtype: DType = self.job.dtype
        self.backend = fastcache_engines.backend(self.recipe.backend)
        self.can = self.backend.CAPABILITIES
        self.runs_here = self.backend.support(self.device).can_run and not self.recipe.onnx_only
        if not self.runs_here and self.dtype != "bf16":
            fastcache_engines.backend(fastcache_engines.REFERENCE).version()  # checks the graphs, so has to be there
        self.parity: Parity | None = None
        self._pieces: tuple[export.Exportable, ...] = ()  # of a U-Net whose blocks may be left out

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
        pieces = chain.exportable_chain(made, inputs, self.shapes.scale)
        self.features = made.known
        if self.can.conditions and self.device == "cpu":
            parts = chain.merged(pieces, made, self.recipe.branches)
        else:
            parts, self.chain = pieces, tuple(part.role for part in pieces)
        self._pieces = pieces
        del unet, made
        self._make_passes(parts)
        return len(self.work) - 1

    def _make_passes(self, parts: Sequence[export.Exportable]) -> None:
        images, each = self.recipe.batch, self.info.guided_rows
        rows = (images.min, each * images.opt, each * images.max)
        self._make(parts, "unet", self.dtype, rows, graph_passes.translations(self.can, self.dtype), checked=True)

    def make_text_encoders(self) -> None:
        """They run once a picture: in float32, or in bfloat16 where that says nearly the same of prompts."""
        model, images = self.job.model, self.recipe.batch
        for name in model.text_encoders:
            named = name.replace("_", " ")
            self.say(f"exporting the {named}")
            tokenizer = model.load_tokenizer(name)
            tokenizer.save_pretrained(self.folder / TOKENIZERS[name])
            encoder, tokens = model.load_text_encoder(name), int(tokenizer.model_max_length)
            part = components.exportable_text_encoder(encoder, tokens, name, model.family)
            # Causal attention, which is not fused.
            self._make([part], part.role, "fp32", (1, images.opt, images.max), {})
            if self.dtype == "bf16" and not self.can.typed:
                ids = {"input_ids": calibrate.token_ids(tokenizer, ["", *calibrate.prompts(model, 7)])}
                self._lower(part.role, named, ids, "hidden_states", _snr_db, LEAST_TEXT_SNR_DB)

    def make_vae(self) -> None:
        """Decoder and encoder, each in the recipe's dtype where that is exact enough, else in float32."""
        vae = self.job.model.load_vae()
        sizes, tile = (*self.shapes.latent, self.shapes.scale), self.recipe.vae_tile
        usual = self.shapes.sizes[0]
        sides = (tile, tile) if tile else (usual.height, usual.width)
        # Before anything of the VAE is lowered, and only where a decoder in bf16 is weighed.
        latents = components.example_latents(vae, *sides) if self.dtype == "bf16" else None
        for part in (
            components.exportable_vae_decoder(vae, *sizes, tile),
            components.exportable_vae_encoder(vae, *sizes, scaled=not self.info.edits),
        ):
            name = f"VAE {part.role.removeprefix('vae_')}"
            self.say(f"exporting the {name}")
            dtype = self._vae_dtype(part, name, latents)
            if self.can.typed:
                part.module.to(fastcache_engines.torch_dtype(dtype))
            images = self.recipe.batch
            # An image to image run may give one image for several pictures.
            rows = (1, images.opt, images.max) if part.role == "vae_encoder" else (images.min, images.opt, images.max)
            self._make([part], part.role, dtype, rows, graph_passes.translations(self.can, dtype))
            if latents is None or self.can.typed:
                continue
            if part.role == "vae_decoder":
                self._lower(part.role, name, {"latents": latents}, "image", _psnr_db, LEAST_VAE_PSNR_DB)
            elif not tile and not self.info.edits:  # what it gives is what the decoder takes
                given = {"image": components.example_pictures(*sides)}
                self._lower(part.role, name, given, "latent_mean", self._psnr_decoded_db, LEAST_VAE_PSNR_DB)

    def make_preview_decoder(self, vae: VAE) -> None:
        """What shows a picture on its way, in float32."""
        self.say("exporting the preview decoder")
        images, sizes = self.recipe.batch, (*self.shapes.latent, self.shapes.scale)
        part = components.exportable_vae_decoder(vae, *sizes, role="preview_decoder")
        translations = graph_passes.translations(self.can, "fp32")
        self._make([part], part.role, "fp32", (1, images.opt, images.max), translations)

    def _lower(
        self,
        role: Role,
        named: str,
        inputs: export.Inputs,
        output: str,
        nearness: Callable[[Tensor, Tensor], float],
        needed: float,
    ) -> None:
        """Let a backend that lowers graphs itself run an engine in bfloat16 where that stays near float32."""
        entry = self.engines[role]
        if not (self.runs_here and fastcache_engines.fast_bf16()):
            self.say(f"the {named} stays in fp32: this machine cannot tell what bf16 would do to pictures")
            return
        wide, narrow = (
            self.backend.evaluate(self.folder / entry.file, inputs, LoadOptions(self.device, dtype))[output]
            for dtype in ("fp32", "bf16")
        )
        near = self._near_enough(named, nearness(wide, narrow), needed)
        self.engines[role] = entry.model_copy(update={"dtype": near})

    def _psnr_decoded_db(self, wide: Tensor, narrow: Tensor) -> float:
        """How near the pictures of two latents are, decoded in float32."""
        decoder = self.folder / self.engines["vae_decoder"].file
        pictures = (
            self.backend.evaluate(decoder, {"latents": latents}, LoadOptions(self.device))["image"]
            for latents in (wide, narrow)
        )
        return _psnr_db(*pictures)

    def _near_enough(self, named: str, near: float, needed: float) -> DType:
        """bfloat16 where it is as near to float32 as needed, both in dB; else float32."""
        if near >= needed:
            self.say(f"the {named} runs in bf16: {near:.1f} dB from fp32 ({needed:.0f} needed)")
            return "bf16"
        self.say(f"the {named} stays in fp32: bf16 is {near:.1f} dB from it, {needed:.0f} needed")
        return "fp32"

    @property
    def passes(self) -> dict[str, PassEntry]:
        """What each pass of the bundle runs, takes and stores."""
        return describe.passes(self.recipe, self.engines, self.chain, self.features, len(self.blocks), self.work)

    def _vae_dtype(self, part: export.Exportable, name: str, latents: Tensor | None) -> DType:
        """float16 where the largest activation leaves it room, bfloat16 where a picture stays near float32's."""
        if latents is not None and self.can.typed and part.role == "vae_decoder":
            near = _psnr_db(*components.decoded_in(part.module, latents, "fp32", "bf16"))
            return self._near_enough(name, near, LEAST_VAE_PSNR_DB)
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
        if checked and self.recipe.quantize:
            total, shared = self._quantize(graphs, parts[0].inputs, stem)
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
            self._check_own_graphs(LoadOptions(self.device, dtype))

    def _quantize(self, graphs: Mapping[Role, Path], inputs: export.Inputs, stem: str) -> tuple[int, int]:
        """Put 8-bit graphs in the place of those in float32, which are checked first. Returns bytes as `_export`.

        The reference becomes a call of the model's own: 8-bit ranges hold for what it meets, not for random inputs.
        """
        if self.info.in_channels != self.info.latent_channels:
            raise BuildError(f"expected a text-to-image U-Net to quantise, got {self.info.name}; leave --quantize out")
        exact = fastcache_engines.backend(fastcache_engines.REFERENCE)
        self._measure(exact, LoadOptions())
        calls = dict[Role, list[export.Inputs]]()
        for role in graphs:
            if role != FULL:
                self.say(f"running the model for the inputs that full and {role} meet")
                calls |= calibrate.calibration_runs(self.job.model, self.info, self.folder, self.engines, role, inputs)
        middle = calls[FULL][len(calls[FULL]) // 2]
        write_whole(self.folder / REFERENCE, save(middle | exact.evaluate(graphs[FULL], middle)))
        bits, models, entries = int8_weight_bits(), list[tuple[str, Any]](), dict[Role, QuantizedEngine]()
        for role, path in graphs.items():
            self.say(f"quantising {role} on {len(calls[role])} calls")
            made, entries[role] = quantize.quantize(path, calls[role], bits)
            models.append((path.name, made))
            self.say(_quantized_text(role, entries[role]))
        self.quantized = Quantization(scheme="int8", weight_bits=bits, engines=entries)
        (self.folder / f"{stem}.weights").unlink()
        shared = export.save_graphs(models, self.folder, f"{stem}.weights")
        return (self.folder / f"{stem}.weights").stat().st_size, shared

    def _export(
        self, parts: Sequence[export.Exportable], stem: str, dtype: DType, translations: graph_passes.Translations
    ) -> tuple[dict[str, Any], int, int]:
        """What the backend builds from, by role, the bytes of its weights, and how many several parts share.

        The exporter's graphs end with this: they hold weights of their own making, a third as many as the model.
        """
        if self.can.source == "program":
            others = [(size.height, size.width) for size in self.shapes.sizes[1:]]
            exported: list[Any] = [export.export_program(part, self.shapes.free, others) for part in parts]
        else:
            whole, conditions = parts[0], dict[str, list[str]]()  # a shallow pass is a piece of the full one
            if stem == "unet" and self._pieces:
                whole, conditions = chain.whole(self._pieces), chain.conditions(self._pieces)
                self._pieces = ()
            exported = export.export_parts(parts, whole, conditions, translations, self.shapes.free)
        graphs: dict[str, Any] = {}
        for part, (graph, (inputs, outputs)) in zip(parts, exported, strict=True):
            graphs[part.role], file = graph, f"{part.role}.onnx"
            self.engines[part.role] = EngineEntry(file=file, dtype=dtype, inputs=inputs, outputs=outputs)
        if self.can.source == "program":
            sizes = [state_bytes(part.module) for part in parts]
            return graphs, max(sizes), min(sizes)
        shared = export.save_graphs(
            [(f"{role}.onnx", graph) for role, graph in graphs.items()], self.folder, f"{stem}.weights"
        )
        total = (self.folder / f"{stem}.weights").stat().st_size
        return {role: self.folder / f"{role}.onnx" for role in graphs}, total, shared

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
        if self.dtype == "bf16" and self.blocks:
            raise BuildError("expected blocks in fp32 or fp16 where the engines do not run here, got bf16")
        if self.dtype == "bf16":
            self.say("checking the bf16 modules against the model, for these engines do not run here")
            self._keep(passes.module_parity(parts, load_file(self.folder / REFERENCE), self.dtype))
        else:
            self.say("checking the graphs on ONNX Runtime against the model, for these engines do not run here")
            _release(parts)
            self._measure(fastcache_engines.backend(fastcache_engines.REFERENCE), LoadOptions("cpu", self.dtype))

    def _check_own_graphs(self, options: LoadOptions) -> None:
        """Refuse 8-bit engines that are not what their graphs say; the model is too far off to show that."""
        for role in () if self.quantized is None else self.quantized.engines:
            known, graph = load_file(self.folder / REFERENCE), self.folder / self.engines[role].file
            error = graph_error(self.backend, graph, known, options)
            if not error <= INT8_GRAPH_TOLERANCE:
                raise OutOfTolerance(
                    f"expected the {role} engine within {INT8_GRAPH_TOLERANCE:g} of its own graph, got {error:.2g}: "
                    f"{self.recipe.backend} rounds 8 bits otherwise on this processor; leave --quantize out"
                )

    def _measure(self, backend: fastcache_engines.Backend, options: LoadOptions) -> None:
        tried = trials(self.engines, Passes(self.passes, self.engines, self.chain, self.blocks), self.blocks)
        tolerance = None if self.quantized is None else INT8_TOLERANCE
        self._keep(measure_parity(backend, self.folder, tried, options, tolerance))

    def _keep(self, parity: Parity) -> None:
        if not max(parity.full_vs_model, parity.shallow_vs_full) <= parity.tolerance:
            raise OutOfTolerance(f"expected engines within {parity.tolerance:g} of the model, got {parity}")
        self.parity = parity


def _release(parts: Sequence[export.Exportable]) -> None:
    """Let go of weights that are in the graphs' file by now: what reads that file needs the memory, for SDXL 5 GB."""
    for part in parts:
        part.module.to("meta")
    gc.collect()
    with contextlib.suppress(AttributeError, TypeError):  # glibc's alone, which keeps what is freed in its heap
        ctypes.CDLL(None).malloc_trim(0)


def _psnr_db(wide: Tensor, narrow: Tensor) -> float:
    """How near two batches of images in [0, 1] are."""
    return -10 * math.log10(max(float((wide - narrow).square().mean()), 1e-12))


def _snr_db(wide: Tensor, narrow: Tensor) -> float:
    """How near a tensor is to another, by the size of that one."""
    return -10 * math.log10(max(float((wide - narrow).square().sum() / wide.square().sum()), 1e-12))


def _quantized_text(role: Role, entry: QuantizedEngine) -> str:
    """What a build says of an engine in 8 bits."""
    kept = ", ".join(f"{one.place} {one.kind} ({one.snr_db:.0f} dB alone)" for one in entry.kept)
    return f"{role}: {entry.layers} layers in 8 bits, {entry.snr_db:.1f} dB; not in 8 bits: {kept or 'none'}"
