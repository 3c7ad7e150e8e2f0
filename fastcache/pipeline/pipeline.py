"""A bundle -> text to images, image to image and inpainting, with diffusers' argument names and the plan as one more.

Everything a picture needs (tokenizers, text encoders, U-Net, VAE, noise schedule) comes from the bundle. Brings
together prompts (`prompts.py`), pictures (`images.py`) and calls (`schedule.py`); how a step runs is the loop's
business.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from fastcache.bundle.bundle import Bundle
from fastcache.loop.drivers import Guidance
from fastcache.loop.noise import Generators, draw
from fastcache.loop.plan import CachePlan
from fastcache.loop.runtime import Runtime
from fastcache.loop.steps import Run, Scales, Step, foretold
from fastcache.pipeline.arguments import Terms, images_of, plan_for, terms_of
from fastcache.pipeline.callbacks import Callbacks, callbacks_of
from fastcache.pipeline.controls import Controls, refreshed
from fastcache.pipeline.images import Pictures, Start
from fastcache.pipeline.loading import load
from fastcache.pipeline.prompts import Embeds, Prompt, Prompts, unet_inputs
from fastcache.pipeline.provenance import record
from fastcache.pipeline.request import Request
from fastcache.pipeline.schedule import WHOLE, Schedule, Span, Steps, make_schedule, named_schedule
from fastcache.pipeline.signature import arguments_of
from fastcache.pipeline.tokenizer import Tokenizer
from fastcache.sampler.scheduler import Scheduler
from fastcache.sampler.table import SamplerTable
from fastcache_engines import Engine

__all__ = ["FastCachePipeline", "PipelineOutput", "Run"]


@dataclass(frozen=True)
class PipelineOutput:
    """The images, in the type asked for, the plan that drew them, and the record of how they were made."""

    images: Any
    plan: CachePlan
    made: dict[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, eq=False)
class _Course:
    """What a run goes by besides its terms: its calls, what steers and starts it, what is called after each step."""

    schedule: Schedule
    scales: Scales | None = None
    start: Start | None = None
    callbacks: Callbacks | None = None


class FastCachePipeline:
    """Draws images with the engines of a checked bundle. Not for several threads at once: runs share buffers.

    In a callback `guidance_scale`, `num_timesteps` and `_interrupt` are what they are in diffusers' pipelines. A copy,
    or what a pickle of it becomes, is loaded again from the bundle's path.
    """

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
        self._options: dict[str, Any] = {"threads": threads, "cuda_graph": cuda_graph, "wrap": wrap}
        self._guidance_scale, self._num_timesteps, self._interrupt = 0.0, 0, False

    def __reduce__(self) -> tuple[Any, ...]:
        trusted = self.bundle.trusted and str(self.bundle.trusted.resolve())
        return _load_again, (str(self.bundle.path.resolve()), self._options | {"trusted": trusted})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The first text encoder's."""
        return next(iter(self.prompts.tokenizers.values()))

    @property
    def guidance_scale(self) -> float:
        """That of the run at hand, or of the last one."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many U-Net calls the run at hand makes, or the last one did."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends the run with the latents as they are."""
        return self._interrupt

    @arguments_of(Request)
    def __call__(self, request: Request) -> PipelineOutput:
        """Draw images. The arguments are those of `Request`, and mean what they mean in diffusers' pipelines.

        Without `return_dict` it returns a tuple of images and plan.

        Shapes: returns PIL images, a float array (N, H, W, 3) or tensor (N, 3, H, W) in [0, 1], or latents.

        Raises: `ValueError` for arguments that do not fit the bundle; `BundleError` for a component it lacks.
        """
        drawn = self.draw(request)
        return drawn if request.return_dict else cast(Any, (drawn.images, drawn.plan))

    def draw(self, request: Request, watch: Watch | None = None) -> PipelineOutput:
        """As calling the pipeline with the request's arguments; `watch` sees every step, and changes nothing."""
        if request.output_type != "latent":
            self.bundle.engine_path("vae_decoder")
        callbacks, terms = callbacks_of(request), self.terms(request)
        with _own_tensors():
            stepwise = callbacks.called or watch is not None or request.mask_image is not None
            run = self.begin(request, terms, whole=not stepwise)
            for step in run.steps:
                callbacks.after(self, step, run.lane.tensors)
                if watch is not None:
                    watch(self, run, step)
                if self._interrupt:
                    break
            images = self.pictures.decode(run.latents.clone(), request.output_type)
        return PipelineOutput(images, run.plan, record(self.bundle.manifest, request, terms, run.plan))

    def terms(self, request: Request) -> Terms:
        """What a request means for the bundle. Raises: as `__call__`."""
        self.controls.check(request)
        return terms_of(request, self.bundle.manifest, samplers=self.bundle.samplers)

    def begin(self, request: Request, terms: Terms | None = None, *, whole: bool = False) -> Run:
        """Everything up to the first step, which the run returned then takes.

        `terms` are what the request means here, where the caller knows. `whole` allows a run that is one CUDA graph to
        have one step only, the last.

        Raises: as `__call__`.
        """
        terms, callbacks = terms or self.terms(request), callbacks_of(request)
        with _own_tensors():
            embeds = self._embeds(request, terms)
            images = embeds.hidden.shape[0] // (1 + terms.guided)
            generator = request.generators(images)
            schedule = self.schedule(
                terms.sampler,
                terms.steps,
                request.eta,
                generator,
                terms.span,
                takes_new_latents=bool(callbacks.called) or request.mask_image is not None,
            )
            start = self.pictures.start(request, terms, schedule, images, generator)
            calls = len(schedule.sampler.timesteps)
            steering = self.controls.steer(request, rows=images, guided=terms.guided, size=terms.size, num_calls=calls)
            inputs = unet_inputs(
                self.bundle.manifest.model,
                embeds,
                terms.size,
                request,
                guided=terms.guided,
                from_image=request.image is not None,
            )
            course = _Course(schedule, steering.scales, start, callbacks)
            return self._started(request, terms, inputs | steering.inputs, generator, course, whole)

    def _embeds(self, request: Request, terms: Terms) -> Embeds:
        positive = Prompt(
            "prompt", request.prompt, request.prompt_2, request.prompt_embeds, request.pooled_prompt_embeds
        )
        negative = Prompt(
            "negative_prompt",
            request.negative_prompt,
            request.negative_prompt_2,
            request.negative_prompt_embeds,
            request.negative_pooled_prompt_embeds,
        )
        count = request.num_images_per_prompt
        return self.prompts.condition(positive, negative, count=count, guided=terms.guided, clip_skip=request.clip_skip)

    @arguments_of(Request)
    def stream(self, request: Request) -> Iterator[Step]:
        """The steps of a run as they finish; stop reading to cancel. Arguments as in `__call__`.

        `decode(step.latents)` makes a preview, and of the last step the picture.
        """
        return self.begin(request).steps

    def start(self, request: Request, inputs: Mapping[str, Tensor], *, guided: bool, whole: bool = False) -> Run:
        """As `begin`, from the U-Net's inputs in place of prompts and pictures.

        Shapes: `inputs` by name, of 2N rows if guided, unconditional half first, else N; for InstructPix2Pix 3N, the
        first two thirds unconditional. A U-Net that takes no more than latents has none; then there are as many images
        as latents, or else generators.
        """
        terms = terms_of(request, self.bundle.manifest, samplers=self.bundle.samplers, span=WHOLE, guided=guided)
        images = images_of(self.bundle.manifest.model, inputs, request, guided)
        with _own_tensors():
            generator = request.generators(images)
            schedule = self.schedule(terms.sampler, terms.steps, request.eta, generator)
            return self._started(request, terms, inputs, generator, _Course(schedule), whole)

    def _started(
        self,
        request: Request,
        terms: Terms,
        inputs: Mapping[str, Tensor],
        generator: Generators,
        course: _Course,
        whole: bool,
    ) -> Run:
        """Settle the plan, fill the buffers, and lay out the steps."""
        manifest, table = self.bundle.manifest, course.schedule.sampler
        plan = plan_for(request, manifest, len(table.timesteps), terms.sampler)
        plan = refreshed(plan, course.scales)
        if course.callbacks is not None and terms.guided:
            plan = course.callbacks.cut(plan)
        images, hidden = images_of(manifest.model, inputs, request, terms.guided), inputs.get("encoder_hidden_states")
        lane = self.runtime.lane(
            images=images, guided=terms.guided, size=terms.size, tokens=None if hidden is None else hidden.shape[1]
        )
        lane.set_inputs(inputs)
        run = self.runtime.run(
            lane,
            table,
            plan,
            Guidance(terms.guidance_scale, request.guidance_rescale, terms.image_guidance_scale or 0.0),
            generator=generator,
            conditioning_scales=course.scales,
            whole=whole,
        )
        _fill(run, request.latents, course.start, generator)
        self._guidance_scale, self._num_timesteps, self._interrupt = terms.guidance_scale, plan.num_steps, False
        return run

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """PIL images of latents as the sampler leaves them. Shapes: `latents` (N, C, H / 8, W / 8)."""
        return cast("list[Image.Image]", self.pictures.decode(latents, "pil"))

    def preview(self, run: Run, step: int) -> Image.Image:
        """What the step just taken foretells of a run's first image: without noise, the sharper the later the step.

        By the bundle's preview decoder where it has one. Of a scheduler's own step, which foretells nothing, it shows
        the latents, noise included.
        """
        latents = run.latents
        if isinstance(run.sampler, SamplerTable):
            latents = foretold(run, step, self.bundle.manifest.model.scheduler.get("prediction_type", "epsilon"))
        return self.pictures.preview(latents)

    def encode_prompt(self, texts: list[str], clip_skip: int | None = None) -> Tensor:
        """Text -> what the U-Net attends to; words past the encoder's length are left out, with a warning.

        Shapes: returns (N, tokens, width).
        """
        return self.prompts.encode(texts, clip_skip=clip_skip).hidden

    def schedule(
        self,
        sampler: str | Scheduler,
        steps: int | Steps,
        eta: float = 0.0,
        generator: Generators = None,
        span: Span = WHOLE,
        *,
        takes_new_latents: bool = False,
    ) -> Schedule:
        """The calls of a run; with `takes_new_latents` such that steps' results may be replaced."""
        steps = steps if isinstance(steps, Steps) else Steps(steps)
        if isinstance(sampler, str):
            found = self._schedule(sampler, steps, eta, span)
            if isinstance(found.sampler, SamplerTable) and (found.takes_new_latents or not takes_new_latents):
                return found
            return make_schedule(self.bundle.samplers.make(sampler), steps, eta, span, generator, own=True)
        found = make_schedule(sampler, steps, eta, span, generator)
        if takes_new_latents and not found.takes_new_latents:
            return make_schedule(sampler, steps, eta, span, generator, own=True)
        return found

    def _make_schedule(self, name: str, steps: Steps, eta: float, span: Span) -> Schedule:
        return named_schedule(self.bundle.samplers, name, steps, eta, span)


Watch = Callable[[FastCachePipeline, Run, Step], object]


def _load_again(path: str, options: dict[str, Any]) -> FastCachePipeline:
    return load(path, **options)


def _fill(run: Run, latents: Tensor | None, start: Start | None, generator: Generators) -> None:
    """Put what the first step takes into place: an image under noise, the latents given, or noise."""
    first, sigma = run.latents, run.sampler.init_noise_sigma
    if start is not None:
        start.fill(run)
    elif latents is None:
        draw(first, generator)
        first.mul_(sigma)
    elif latents.shape != first.shape:
        raise ValueError(f"expected latents of shape {list(first.shape)}, got {list(latents.shape)}")
    else:
        first.copy_(latents).mul_(sigma)


@contextmanager
def _own_tensors() -> Generator[None]:
    """No gradients, and whatever a caller has switched on, tensors that the next run can write to: not those of
    inference mode, and none on the meta device.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":  # a mode that costs microseconds an operation
            stack.enter_context(torch.device("cpu"))
        yield
