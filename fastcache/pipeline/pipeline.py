"""A bundle -> text to images, image to image and inpainting, with diffusers' argument names and the plan as one more.

Everything a picture needs (tokenizers, text encoders, U-Net, VAE, noise schedule) comes from the bundle. Brings
together prompts (`prompts.py`), pictures (`images.py`) and calls (`schedule.py`); how a step runs is `denoise.py`'s
business.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from fastcache.bundle.bundle import Bundle, open_bundle
from fastcache.bundle.recipe import Size
from fastcache.loop.drivers import Guidance
from fastcache.loop.noise import Generators, draw
from fastcache.loop.plan import CachePlan
from fastcache.loop.runtime import Runtime
from fastcache.loop.scheduler import Scheduler, make_scheduler
from fastcache.loop.steps import Run, Scales, Step
from fastcache.pipeline.arguments import check_generators, conditioning, images_of, plan_of, size_of, span_of
from fastcache.pipeline.controls import Controls, refreshed
from fastcache.pipeline.images import Images, OutputType, Pictures, Start, png_bytes
from fastcache.pipeline.prompts import Prompt, Prompts, Texts
from fastcache.pipeline.schedule import WHOLE, Schedule, Span, make_schedule
from fastcache_engines import Engine

__all__ = ["FastCachePipeline", "PipelineOutput", "Run", "load", "png_bytes"]

StepCallback = Callable[["FastCachePipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """The images, in the type asked for, and the plan that drew them."""

    images: Any
    plan: CachePlan


def load(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    cuda_graph: bool = False,
    wrap: Callable[[Engine], Engine] | None = None,
) -> FastCachePipeline:
    """Open a bundle, every byte checked before anything is loaded. `threads` 0 means as many as torch uses.

    With `cuda_graph` a run on a GPU is one launch, or one a step where its steps are asked for. `wrap` is given every
    engine that is loaded, and what it returns is used: a benchmark's clock, say.

    Raises: `BundleError` for a bundle that is damaged or for another machine or version; `BackendUnavailable`.
    """
    return FastCachePipeline(open_bundle(Path(path)), threads=threads, cuda_graph=cuda_graph, wrap=wrap)


class FastCachePipeline:
    """Draws images with the engines of a checked bundle. Not for several threads at once: runs share buffers."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        cuda_graph: bool = False,
        wrap: Callable[[Engine], Engine] | None = None,
    ) -> None:
        self.bundle = bundle
        self.runtime = Runtime(bundle, threads=threads, cuda_graph=cuda_graph, wrap=wrap)
        self.prompts, self.pictures = Prompts(bundle, self.runtime), Pictures(bundle, self.runtime)
        self.controls = Controls(bundle, self.runtime)
        self._schedule = lru_cache(maxsize=16)(self._make_schedule)

    @cached_property
    def tokenizer(self) -> Any:
        """The first text encoder's."""
        return next(iter(self.prompts.tokenizers.values()))

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Texts = None,
        num_images_per_prompt: int = 1,
        *,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        **arguments: Any,
    ) -> PipelineOutput:
        """Draw images. Arguments mean what they mean in diffusers' pipelines; the others are those of `begin`.

        `callback_on_step_end` gets (pipeline, step, timestep, {"latents": ...}) and may return other latents.

        Shapes: returns PIL images, a float array (N, H, W, 3) or tensor (N, 3, H, W) in [0, 1], or latents.

        Raises: `ValueError` for arguments that do not fit the bundle; `BundleError` for a component it lacks.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"expected output_type pil, np, pt or latent, got {output_type!r}")
        if output_type != "latent":
            self.bundle.engine_path("vae_decoder")
        run = self.begin(
            prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            replaces_latents=callback_on_step_end is not None,
            whole=callback_on_step_end is None and arguments.get("mask_image") is None,
            **arguments,
        )
        result = run.latents
        for step in run.steps:
            result = step.latents
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step.index, step.timestep, {"latents": result})
                if changed and changed.get("latents") is not None:
                    result.copy_(changed["latents"])
        return PipelineOutput(self.pictures.decode(result.clone(), output_type), run.plan)

    @torch.no_grad()
    def begin(  # noqa: PLR0913 - takes a request to come
        self,
        prompt: Texts = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Texts = None,
        num_images_per_prompt: int = 1,
        prompt_2: Texts = None,
        negative_prompt_2: Texts = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        strength: float | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        image_guidance_scale: float = 1.5,
        sampler: str | Scheduler = "ddim",
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        replaces_latents: bool = False,
        **arguments: Any,
    ) -> Run:
        """Everything up to the first step, which the run returned then takes.

        `image` alone is image to image, with a `mask_image`, white where to draw, inpainting; both at `strength`.
        InstructPix2Pix edits it, by `guidance_scale` and `image_guidance_scale`. One generator a picture makes a
        picture independent of its neighbours in the batch. `arguments` are SDXL's sizes (`original_size`, ...), what
        `ControlArguments` names for a bundle with a ControlNet, T2I-Adapter or IP-Adapter, and those of `start`:
        `cache_interval` N refreshes the cached feature every Nth step (1: no caching), `plan` says it step by step.
        `replaces_latents` announces that steps' results are changed.

        Shapes: `latents` (N, C, H / 8, W / 8) as drawn from a unit normal; `prompt_embeds` (N, tokens, width).

        Raises: as `__call__`.
        """
        if not math.isfinite(guidance_scale):
            raise ValueError(f"expected a finite guidance_scale, got {guidance_scale}")
        control, arguments = self.controls.take(arguments)
        shown = control.picture if image is None else image
        info, size = self.bundle.manifest.model, size_of(self.bundle.manifest, height, width, shown, mask_image)
        guided = guidance_scale > 1 and (not info.edits or image_guidance_scale >= 1)
        span = span_of(info, image, mask_image, strength, denoising_start, denoising_end, latents)
        embeds = self.prompts.condition(
            Prompt("prompt", prompt, prompt_2, prompt_embeds, pooled_prompt_embeds),
            Prompt(
                "negative_prompt",
                negative_prompt,
                negative_prompt_2,
                negative_prompt_embeds,
                negative_pooled_prompt_embeds,
            ),
            count=num_images_per_prompt,
            guided=guided,
            clip_skip=clip_skip,
        )
        rows = embeds.hidden.shape[0] // (1 + guided)
        arguments = conditioning(info, arguments, embeds, size, guided, from_image=image is not None)
        schedule = self.schedule(
            sampler,
            num_inference_steps,
            eta,
            generator,
            span,
            takes_new_latents=replaces_latents or mask_image is not None,
        )
        start = None
        if image is not None:
            check_generators(generator, rows)
            start = self.pictures.start(
                image, mask_image, schedule, span, rows=rows, size=size, generator=generator, guided=guided
            )
        calls = len(schedule.sampler.timesteps)
        steering = self.controls.steer(control, rows=rows, guided=guided, size=size, num_calls=calls)
        unguided_twice = info.edits and guided  # without the image, and with it
        return self.start(
            torch.cat([embeds.hidden[:rows], embeds.hidden]) if unguided_twice else embeds.hidden,
            guided=guided,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale if unguided_twice else None,
            schedule=schedule,
            sampler=sampler,
            generator=generator,
            latents=latents,
            size=size,
            start=start,
            conditioning_scales=steering.scales,
            **steering.inputs,
            **arguments,
        )

    def provenance(self, plan: CachePlan) -> dict[str, object]:
        """What of a picture's making the pipeline knows, for `png_bytes`."""
        manifest = self.bundle.manifest
        return {
            "Software": f"fastcache {manifest.versions['fastcache']}",
            "model": manifest.model.name,
            "plan": plan.to_json(),
            "bundle_sha256": manifest.bundle_sha256,
        }

    def stream(self, prompt: Texts = None, **arguments: Any) -> Iterator[Step]:
        """The steps of a run as they finish; stop reading to cancel. Arguments as in `begin`.

        `decode(step.latents)` makes a preview, and of the last step the picture.
        """
        return self.begin(prompt, **arguments).steps

    @torch.no_grad()  # a value that wants a gradient would make the buffers want one
    def start(  # noqa: PLR0913 - takes a request to come
        self,
        encoder_hidden_states: Tensor | None = None,
        *,
        guided: bool,
        num_inference_steps: int = 50,
        plan: CachePlan | None = None,
        cache_interval: int = 1,
        sampler: str | Scheduler = "ddim",
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        image_guidance_scale: float | None = None,
        conditioning_scales: Scales | None = None,
        schedule: Schedule | None = None,
        size: Size | None = None,
        start: Start | None = None,
        whole: bool = False,
        **conditioning: Tensor,
    ) -> Run:
        """Settle sampler and plan, fill the buffers, and return the run, its first step not yet taken.

        `schedule` takes the place of `num_inference_steps` and `eta`, `start` that of noise. `whole` allows a run that
        is one CUDA graph to have one step only, the last. `conditioning_scales` are a ControlNet's at each step, where
        they change; the steps at which they do are FULL.

        Shapes: `encoder_hidden_states` (2N, tokens, width) if guided, unconditional half first, else (N, ...), for
        InstructPix2Pix (3N, ...), the first two thirds unconditional;
        `conditioning` the U-Net's further inputs by name, of as many rows. A U-Net without text has none of the first;
        with no conditioning at all there are as many images as latents, or else generators.
        """
        if encoder_hidden_states is not None:
            conditioning = {"encoder_hidden_states": encoder_hidden_states, **conditioning}
        schedule = schedule or self.schedule(sampler, num_inference_steps, eta, generator)
        table = schedule.sampler
        plan = plan_of(self.bundle.manifest, plan, cache_interval, len(table.timesteps), sampler)
        plan = refreshed(plan, conditioning_scales)
        tokens = None if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        images = images_of(self.bundle.manifest.model, conditioning, latents, generator, guided)
        check_generators(generator, images)
        lane = self.runtime.lane(images=images, guided=guided, size=size, tokens=tokens)
        lane.set_inputs(conditioning)
        run = self.runtime.run(
            lane,
            table,
            plan,
            Guidance(guidance_scale, guidance_rescale, image_guidance_scale or 0.0),
            generator=generator,
            conditioning_scales=conditioning_scales,
            whole=whole,
        )
        if start is not None:
            start.fill(run)
        elif latents is None:
            draw(run.latents, generator)
            run.latents.mul_(table.init_noise_sigma)
        elif latents.shape != run.latents.shape:
            raise ValueError(f"expected latents of shape {list(run.latents.shape)}, got {list(latents.shape)}")
        else:
            run.latents.copy_(latents).mul_(table.init_noise_sigma)
        return run

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """PIL images of latents as the sampler leaves them. Shapes: `latents` (N, C, H / 8, W / 8)."""
        return cast("list[Image.Image]", self.pictures.decode(latents, "pil"))

    def encode_prompt(self, texts: list[str], clip_skip: int | None = None) -> Tensor:
        """Text -> what the U-Net attends to; words past the encoder's length are left out, with a warning.

        Shapes: returns (N, tokens, width).
        """
        return self.prompts.encode(texts, clip_skip=clip_skip).hidden

    def schedule(
        self,
        sampler: str | Scheduler,
        num_steps: int,
        eta: float = 0.0,
        generator: Generators = None,
        span: Span = WHOLE,
        *,
        takes_new_latents: bool = False,
    ) -> Schedule:
        """The calls of a run; with `takes_new_latents` such that steps' results may be replaced."""
        if isinstance(sampler, str):
            found = self._schedule(sampler, num_steps, eta, span)
            if found.takes_new_latents or not takes_new_latents:
                return found
            sampler = make_scheduler(sampler, self.bundle.manifest.model.scheduler)
        found = make_schedule(sampler, num_steps, eta, span, generator)
        if takes_new_latents and not found.takes_new_latents:
            return make_schedule(sampler, num_steps, eta, span, generator, own=True)
        return found

    def _make_schedule(self, name: str, num_steps: int, eta: float, span: Span) -> Schedule:
        return make_schedule(make_scheduler(name, self.bundle.manifest.model.scheduler), num_steps, eta, span)
