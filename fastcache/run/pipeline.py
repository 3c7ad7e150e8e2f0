"""A bundle -> text to images, with diffusers' argument names and the plan as one more argument.

Everything a picture needs (tokenizer, text encoder, U-Net, VAE decoder, noise schedule) comes from the bundle. Knows
prompts and pictures; how a step runs is `denoise.py`'s business.
"""

from __future__ import annotations

import copy
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastcache.bundle import Bundle, open_bundle
from fastcache.run.buffers import BufferPool
from fastcache.run.denoise import Generators, ScheduledSampler, Step, denoise, draw
from fastcache.run.plan import CachePlan
from fastcache.run.runtime import Runtime, run_once
from fastcache.run.sampler import (
    NonlinearSamplerError,
    SamplerTable,
    Scheduler,
    compile_sampler,
    make_scheduler,
    same_sampler,
)

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[["FastCachePipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """The images, in the type asked for, and the plan that drew them."""

    images: Any
    plan: CachePlan


@dataclass(frozen=True)
class Run:
    """What `FastCachePipeline.start` settled: the buffers, the sampler, the plan, and the steps still to take."""

    pool: BufferPool
    sampler: SamplerTable | ScheduledSampler
    plan: CachePlan
    steps: Iterator[Step]


def load(path: str | os.PathLike[str], *, threads: int = 0) -> FastCachePipeline:
    """Open a bundle, every byte checked before anything is loaded. `threads` 0 means as many as torch uses.

    Raises: `BundleError` for a bundle that is damaged or for another machine or version; `BackendUnavailable`.
    """
    return FastCachePipeline(open_bundle(Path(path)), threads=threads)


class FastCachePipeline:
    """Draws images with the engines of a checked bundle. Not for several threads at once: runs share buffers."""

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        self.bundle = bundle
        self.runtime = Runtime(bundle, threads=threads)
        self._table = lru_cache(maxsize=16)(self._compile_table)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        self.bundle.engine_path("text_encoder")  # says what is missing in a bundle without text
        return CLIPTokenizer.from_pretrained(self.bundle.file("tokenizer"), local_files_only=True)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        *,
        cache_interval: int = 1,
        plan: CachePlan | None = None,
        sampler: str | Scheduler = "ddim",
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        guidance_rescale: float = 0.0,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> PipelineOutput:
        """Draw images. Arguments mean what they mean in diffusers' `StableDiffusionPipeline`.

        `cache_interval` N refreshes the cached feature every Nth step (1: no caching); `plan` says it step by step.
        One generator a picture makes a picture independent of its neighbours in the batch. `callback_on_step_end`
        gets (pipeline, step, timestep, {"latents": ...}) and may return other latents; unipc's corrector takes these
        otherwise than in diffusers.

        Shapes: `latents` (N, C, H / 8, W / 8) as drawn from a unit normal; `prompt_embeds` (N, tokens, width). Returns
        PIL images, a float array (N, H, W, 3) or tensor (N, 3, H, W) in [0, 1], or latents.

        Raises: `ValueError` for arguments that do not fit the bundle; `BundleError` for a component it lacks.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"expected output_type pil, np, pt or latent, got {output_type!r}")
        if output_type != "latent":
            self.bundle.engine_path("vae_decoder")
        self._check_size(height, width)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"expected a finite guidance_scale, got {guidance_scale}")
        guided = guidance_scale > 1
        embeds = self._embeds(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt, guided
        )
        run = self.start(
            embeds,
            guided=guided,
            num_inference_steps=num_inference_steps,
            plan=plan,
            cache_interval=cache_interval,
            sampler=sampler,
            eta=eta,
            generator=generator,
            latents=latents,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        result = run.pool.latents[0]
        for step in run.steps:
            result = step.latents
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step.index, step.timestep, {"latents": result})
                if changed and changed.get("latents") is not None:
                    result.copy_(changed["latents"])
        return PipelineOutput(self._images(result.clone(), output_type), run.plan)

    def provenance(self, plan: CachePlan) -> dict[str, object]:
        """What of a picture's making the pipeline knows, for `png_bytes`."""
        manifest = self.bundle.manifest
        return {
            "Software": f"fastcache {manifest.versions['fastcache']}",
            "model": manifest.model.name,
            "plan": plan.to_json(),
            "bundle_sha256": manifest.bundle_sha256,
        }

    def stream(self, prompt: str | Sequence[str], **arguments: Any) -> Iterator[Step]:
        """The steps of a run as they finish; stop reading to cancel. Arguments as in `__call__`, but for the output's.

        `decode(step.latents)` makes a preview, and of the last step the picture.
        """
        guidance_scale = arguments.setdefault("guidance_scale", 7.5)
        negative, count = arguments.pop("negative_prompt", None), arguments.pop("num_images_per_prompt", 1)
        embeds = self._embeds(prompt, negative, None, None, count, guidance_scale > 1)
        return self.start(embeds, guided=guidance_scale > 1, **arguments).steps

    def start(
        self,
        encoder_hidden_states: Tensor,
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
        **conditioning: Tensor,
    ) -> Run:
        """Settle sampler and plan, fill the buffers, and return the run, its first step not yet taken.

        Shapes: `encoder_hidden_states` (2N, tokens, width) if guided, unconditional half first, else (N, ...);
        `conditioning` the U-Net's further inputs by name, of as many rows.
        """
        table = self._sampler(sampler, num_inference_steps, eta, generator)
        plan = self._plan(plan, cache_interval, len(table.timesteps), sampler)
        rows = encoder_hidden_states.shape[0]
        batch = rows // 2 if guided else rows
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise ValueError(f"expected one generator, or one for each of {batch} images, got {len(generator)}")
        pool = self.runtime.pool(batch=batch, guided=guided, num_calls=plan.num_steps)
        pool.set_inputs({"encoder_hidden_states": encoder_hidden_states, **conditioning})
        noise = pool.latents[0]
        if latents is None:
            draw(noise, generator)
        elif latents.shape != noise.shape:
            raise ValueError(f"expected latents of shape {list(noise.shape)}, got {list(latents.shape)}")
        else:
            noise.copy_(latents)
        noise.mul_(table.init_noise_sigma)
        steps = denoise(
            pool, table, plan, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, generator=generator
        )
        return Run(pool, table, plan, steps)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """PIL images of latents as the sampler leaves them. Shapes: `latents` (N, C, H / 8, W / 8)."""
        return cast("list[Image.Image]", self._images(latents, "pil"))

    def _images(self, latents: Tensor, output_type: OutputType) -> Any:
        if output_type == "latent":
            return latents
        pictures = run_once(self.runtime.vae_decoder, {"latents": latents.contiguous().to(self.runtime.device)})
        if output_type == "pt":
            return pictures
        array = cast("npt.NDArray[np.float32]", pictures.permute(0, 2, 3, 1).cpu().numpy())
        if output_type == "np":
            return array
        return [Image.fromarray(pixels) for pixels in (array * 255).round().astype(np.uint8)]

    def _check_size(self, height: int | None, width: int | None) -> None:
        built = self.bundle.manifest.height, self.bundle.manifest.width
        wanted = built[0] if height is None else height, built[1] if width is None else width
        if wanted != built:
            raise ValueError(
                f"expected {built[0]}x{built[1]}, the size this bundle was built for, got {wanted[0]}x{wanted[1]}; "
                "build another with --height and --width"
            )

    def _sampler(
        self, sampler: str | Scheduler, num_steps: int, eta: float, generator: Generators
    ) -> SamplerTable | ScheduledSampler:
        if num_steps < 1:
            raise ValueError(f"expected num_inference_steps of 1 or more, got {num_steps}")
        if isinstance(sampler, str):
            return self._table(sampler, num_steps, eta)
        try:
            return compile_sampler(sampler, num_steps, **_step_arguments(sampler, eta))
        except NonlinearSamplerError as error:
            warnings.warn(f"no table for this scheduler, so its own step runs: {error}", stacklevel=4)
        own = copy.deepcopy(sampler)
        own.set_timesteps(num_steps)
        one = list(generator) if isinstance(generator, Sequence) else generator
        return ScheduledSampler(own, _step_arguments(own, eta, one))

    def _compile_table(self, name: str, num_steps: int, eta: float) -> SamplerTable:
        scheduler = make_scheduler(name, self.bundle.manifest.model.scheduler)
        return compile_sampler(scheduler, num_steps, **_step_arguments(scheduler, eta))

    def _plan(self, plan: CachePlan | None, cache_interval: int, num_calls: int, sampler: str | Scheduler) -> CachePlan:
        manifest = self.bundle.manifest
        if plan is None:
            return CachePlan.uniform(num_calls, cache_interval, manifest.branch_id)
        if cache_interval != 1:
            raise ValueError("expected cache_interval or plan, got both")
        if any(branch not in (None, manifest.branch_id) for branch in plan.branches):
            raise ValueError(
                f"expected a plan for branch {manifest.branch_id}, which the bundle was cut at, got {plan.branches}"
            )
        if plan.model not in (None, manifest.model.name):
            raise ValueError(f"expected a plan made for model {manifest.model.name}, got one for {plan.model}")
        if isinstance(sampler, str) and plan.sampler is not None and not same_sampler(plan.sampler, sampler):
            raise ValueError(f"expected a plan made for sampler {sampler}, got one for {plan.sampler}")
        return plan

    def _embeds(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        num_images_per_prompt: int,
        guided: bool,
    ) -> Tensor:
        """Text or embeddings -> one row an image, the unconditional rows first under guidance."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(
                "expected either prompt or prompt_embeds, got " + ("neither" if prompt is None else "both")
            )
        if num_images_per_prompt < 1:
            raise ValueError(f"expected num_images_per_prompt of 1 or more, got {num_images_per_prompt}")
        positive = prompt_embeds if prompt_embeds is not None else self.encode_prompt(_texts("prompt", prompt))
        positive = positive.repeat_interleave(num_images_per_prompt, dim=0)
        if not guided:
            return positive
        if negative_prompt_embeds is None:
            count = positive.shape[0] // num_images_per_prompt
            texts = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
            if len(texts) not in (1, count):
                raise ValueError(f"expected one negative_prompt, or one for each of {count} prompts, got {len(texts)}")
            negative_prompt_embeds = self.encode_prompt(texts if len(texts) == count else texts * count)
        negative = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if negative.shape != positive.shape:
            raise ValueError(
                f"expected negative_prompt_embeds of shape {list(positive.shape)}, got {list(negative.shape)}"
            )
        return torch.cat([negative, positive])

    def encode_prompt(self, texts: list[str]) -> Tensor:
        """Text -> what the U-Net attends to; words past the encoder's length are left out, with a warning.

        Shapes: returns (N, tokens, width).
        """
        length = self.bundle.manifest.model.tokens
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for text in texts:
            if len(self.tokenizer(text).input_ids) > (length or 0):
                warnings.warn(f"only the first {length} tokens of the prompt count: {text!r}", stacklevel=4)
        return run_once(self.runtime.text_encoder, {"input_ids": tokens.input_ids.contiguous().to(self.runtime.device)})


def _texts(name: str, value: str | Sequence[str] | None) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected {name} to be a string or a list of strings, got {value!r}")
    return texts


def _step_arguments(scheduler: Scheduler, eta: float, generator: Any = None) -> dict[str, Any]:
    """What of eta and generator this scheduler's `step` takes."""
    import inspect

    accepted = inspect.signature(scheduler.step).parameters
    arguments = {"eta": eta, "generator": generator}
    return {name: value for name, value in arguments.items() if name in accepted and value}


def png_bytes(image: Image.Image, provenance: Mapping[str, object]) -> bytes:
    """The image as a PNG that says in text chunks how it was made."""
    info = PngInfo()
    for key, value in provenance.items():
        info.add_itxt(key, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
