"""A batch that the scheduler chose -> an engine call, and each image's own guidance and sampler update around it.

The one place of the serving side that computes. Knows nothing about queues, threads or HTTP, nor who shares a batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any, Final

import torch
from PIL import Image as Pillow
from torch import Tensor

from fastcache.bundle.manifest import Manifest
from fastcache.bundle.recipe import Size
from fastcache.errors import BundleError
from fastcache.loop.drivers import Guidance
from fastcache.loop.lanes import Lanes
from fastcache.loop.noise import draw
from fastcache.loop.plan import CachePlan
from fastcache.loop.steps import PlainRun, foretold
from fastcache.loop.streams import load_streams
from fastcache.pipeline.arguments import Terms
from fastcache.pipeline.controls import Steering
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.prompts import Prompt, unet_inputs
from fastcache.pipeline.request import Request
from fastcache.pipeline.schedule import WHOLE, Schedule, Span, Steps
from fastcache.sampler.table import SamplerTable
from fastcache.serve.engine.speeds import Speeds

_WORTH_TIMING_AGAIN_S: Final = 1.0


class DeviceBroken(RuntimeError):
    """The device answers no more; only a new process can help."""


@dataclass(eq=False)
class Drawing:
    """What a job draws, the first image with `seed`, and what that means for the bundle.

    `steering` is made when its first image starts, for all of them: all that the U-Net takes besides latents.
    """

    request: Request
    terms: Terms
    seed: int
    schedule: Schedule
    plan: CachePlan
    steering: Steering | None = field(default=None, repr=False)


@dataclass(eq=False)
class _InFlight:
    """An image on its lane, among those of its size."""

    lanes: Lanes
    run: PlainRun
    scales: Tensor | None  # of ControlNets, where they change from step to step


@dataclass(eq=False)
class _Made:
    """A schedule, once a thread has made it; the others wait for that one."""

    schedule: Schedule | None = None
    making: Lock = field(default_factory=Lock)


class Executor:
    """A bundle's engines, and a lane for each of at most `most` images in flight, for each size that is drawn.

    There are `express` lanes more, for jobs that are short beside those that hold the others.

    `threads` are those of streams on a CPU; 0 means as many as torch uses.

    Raises: `BundleError` for a bundle that has no text encoder or VAE decoder, or whose U-Net edits a whole image.
    """

    def __init__(self, pipe: FastCachePipeline, most: int, *, threads: int = 0) -> None:
        manifest, self.pipe = pipe.bundle.manifest, pipe
        model, profile = manifest.model, manifest.profiles["batch"]
        if profile.min > 1:
            raise BundleError(f"expected a bundle for 1 image or more, got one for {profile}; build with --batch 1:4:8")
        if model.edits:
            raise BundleError(
                f"expected a U-Net that takes an image in at most two rows, got {model.name}, which takes it in three; "
                "draw with `fastcache generate`"
            )
        for role in ("text_encoder_2" if model.time_ids is not None else "text_encoder", "vae_decoder"):
            pipe.bundle.engine_path(role)
        self.count, self.device = min(most, profile.max), pipe.runtime.device
        self.express = self.count // 4 if self.count >= 4 else int(self.count > 1)
        self._streams = load_streams(pipe.bundle, threads) if self.count > 1 else None
        self.speeds = Speeds()
        self._tables = lru_cache(maxsize=128)(lambda *_: _Made())
        self._asking = Lock()
        # People ask for a prompt again and again, and for the empty negative one always.
        self._embeds = lru_cache(maxsize=32)(lambda text: pipe.prompts.encode([text]))
        self._lanes: dict[Size, Lanes] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._paced: Any = None

    def schedule(self, sampler: str, num_steps: int | Steps, span: Span = WHOLE) -> Schedule:
        """A sampler's calls as a table, made once, however many threads ask for it at the same time.

        Raises: `ValueError` for steps that the sampler cannot take, or a sampler that is no table.
        """
        with self._asking:
            made = self._tables(sampler, num_steps, span)
        with made.making:
            made.schedule = made.schedule or self._make_schedule(sampler, num_steps, span)
        return made.schedule

    def _make_schedule(self, sampler: str, num_steps: int | Steps, span: Span) -> Schedule:
        schedule = self.pipe.schedule(sampler, num_steps, span=span)
        if not isinstance(schedule.sampler, SamplerTable):
            raise ValueError(f"expected a sampler that is a table, got {sampler}, which is not; name another sampler")
        return schedule

    def lanes(self, size: Size) -> Lanes:
        """The lanes for images of a size, made when it is first drawn."""
        if size not in self._lanes:
            runtime, manifest = self.pipe.runtime, self.pipe.bundle.manifest
            self._lanes[size] = Lanes(
                runtime.pass_engines,
                manifest.passes,
                count=self.count + self.express,
                channels=manifest.model.latent_channels,
                sizes={"height": size.height, "width": size.width, "tokens": manifest.profiles["tokens"].opt},
                device=self.device,
                streams=self._streams,
            )
        return self._lanes[size]

    @property
    def held_bytes(self) -> int:
        """What the images in flight take now, of all sizes."""
        return sum(lanes.held_bytes for lanes in list(self._lanes.values()))

    def warm_up(self) -> None:
        """Load every engine and run each at the usual size, so that the first request pays for none of it.

        What a step takes is timed here first, in a second run unless that would take long.
        """
        manifest = self.pipe.bundle.manifest
        schedule = self._usual_schedule()
        with ThreadPoolExecutor(1) as beside:
            # Native code works, while Python encodes the text.
            loading = beside.submit(lambda: self.lanes(manifest.sizes[0]).bind())
            self._embeds("")
            if "vae_encoder" in manifest.engines:
                size = manifest.sizes[0]
                self.pipe.runtime.once("vae_encoder", {"image": torch.zeros(1, 3, size.height, size.width)})
            loading.result()
        plan = CachePlan.all_full(schedule.sampler.num_calls)
        request = blank_request(manifest)
        self.fill(0, Drawing(request, self.pipe.terms(request), 0, schedule, plan), 0)
        for name in manifest.passes:
            for guided in (True, False):
                if (took := self._timed_step(name, guided)) < _WORTH_TIMING_AGAIN_S:
                    took = self._timed_step(name, guided)
                self.speeds.note_step(name, guided, took)
        self.pictures([0])
        start = time.perf_counter()
        self.pictures([0])
        self.speeds.note("decode", time.perf_counter() - start)
        self.clear(0)

    def _timed_step(self, name: str, guided: bool) -> float:
        start = time.perf_counter()
        self.run([(0, 0)], name=name, guided=guided)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _usual_schedule(self) -> Schedule:
        """That of a request which names no sampler, or else one of any."""
        terms = self.pipe.terms(blank_request(self.pipe.bundle.manifest))
        try:
            return self.schedule(terms.sampler_name, terms.steps.count)
        except ValueError:  # the model's own runs its own step, so that requests must name another
            return self.schedule("ddim", terms.steps.count)

    def fill(self, lane: int, drawing: Drawing, index: int) -> None:
        """Put image `index` at its start: noise, or a picture under noise; and what steers it, unless an image of the
        same job has made that.
        """
        if drawing.steering is None:
            drawing.steering = self._steer(drawing)
        terms, schedule, steering = drawing.terms, drawing.schedule, drawing.steering
        generator = torch.Generator("cpu").manual_seed(drawing.seed + index)
        lanes = self.lanes(terms.size)
        own = lanes.lanes[lane]
        own.set_inputs(steering.inputs, terms.guided)
        run = PlainRun(
            own,
            schedule.sampler,
            drawing.plan,
            Guidance(terms.guidance_scale, drawing.request.guidance_rescale),
            generator=[generator],
            conditioning_scales=steering.scales,
            guided=terms.guided,
        )
        start = self.pipe.pictures.start(drawing.request, terms, schedule, 1, [generator])
        if start is None:
            draw(run.latents, [generator])
            run.latents.mul_(schedule.sampler.init_noise_sigma)
        else:
            start.fill(run)
        scales = None if steering.scales is None else torch.tensor(steering.scales, device=self.device)
        self._in_flight[lane] = _InFlight(lanes, run, scales)

    def _steer(self, drawing: Drawing) -> Steering:
        """What the U-Net takes besides latents. Shapes: (halves, ...), the unconditional one first."""
        model = self.pipe.bundle.manifest.model
        request, terms = drawing.request, drawing.terms
        wanted, unwanted = str(request.prompt), request.negative_prompt
        negative = Prompt("negative_prompt")
        if terms.guided and not (unwanted is None and model.zero_negative):
            negative = self._encoded("negative_prompt", str(unwanted or ""))
        embeds = self.pipe.prompts.condition(self._encoded("prompt", wanted), negative, count=1, guided=terms.guided)
        from_image = request.image is not None
        inputs = unet_inputs(model, embeds, terms.size, request, guided=terms.guided, from_image=from_image)
        calls = drawing.schedule.sampler.num_calls
        steering = self.pipe.controls.steer(request, rows=1, guided=terms.guided, size=terms.size, num_calls=calls)
        return Steering(inputs | steering.inputs, steering.scales)

    def _encoded(self, name: str, text: str) -> Prompt:
        embeds = self._embeds(text)
        return Prompt(name, embeds=embeds.hidden, pooled=embeds.pooled)

    def clear(self, lane: int) -> None:
        """Let go of a lane's drawing. Its tensors stay for the next."""
        self._in_flight.pop(lane, None)

    def run(self, steps: Sequence[tuple[int, int]], *, name: str, guided: bool) -> None:
        """One call of a pass for these (lane, step) of one size, and what each does around it.

        If it raises, nothing has moved.
        """
        numbers, runs = [lane for lane, _ in steps], [self._in_flight[lane].run for lane, _ in steps]
        lanes = self._in_flight[numbers[0]].lanes
        turns = [
            run.turns[step] if rows is run.lane.rows(guided) else run.turn(step, rows)
            for run, (_, step), rows in zip(runs, steps, lanes.rows(numbers, guided), strict=True)
        ]
        for lane, (_, step) in zip(numbers, steps, strict=True):
            self._scale(lane, step, guided)
        for turn in turns:
            for call in turn.input:
                call()
        lanes.run(name, numbers, guided)
        for run, turn, (_, step) in zip(runs, turns, steps, strict=True):
            for call in turn.update:
                call()
            run.end(step)
        self._pace()

    def _scale(self, lane: int, step: int, guided: bool) -> None:
        """Bring a step's ControlNet scales to the lane, from where those in company are gathered."""
        flight = self._in_flight[lane]
        if flight.scales is not None:
            own = flight.lanes.lanes[lane]
            own.rows(guided).tensors["conditioning_scale"].copy_(flight.scales[step])
            own.touch("conditioning_scale")

    def _pace(self) -> None:
        """Keep one step ahead of a GPU and no more, so that a cancelled image is gone within a step."""
        if self.device == "cpu":
            return
        event = torch.cuda.Event()
        event.record()
        if self._paced is not None:
            self._paced.synchronize()
        self._paced = event

    def latents(self, lane: int) -> Tensor:
        """An image's latents, as the last step left them. Shapes: returns (1, C, H, W)."""
        return self._in_flight[lane].run.latents

    def pictures(self, lanes: Sequence[int]) -> list[Pillow.Image]:
        """The pictures of the latents on these lanes, of one size, as they are now."""
        return self.pipe.decode(torch.cat([self.latents(lane) for lane in lanes]))

    def preview(self, lane: int, step: int) -> Pillow.Image:
        """The picture that the step just taken foretells: without noise, and the sharper the later the step."""
        (picture,) = self.pipe.decode(self.foretold(lane, step))
        return picture

    def foretold(self, lane: int, step: int) -> Tensor:
        """The latents without noise that the step just taken foretells. Shapes: returns (1, C, H, W)."""
        kind = self.pipe.bundle.manifest.model.scheduler.get("prediction_type", "epsilon")
        return foretold(self._in_flight[lane].run, step, kind)

    def check_device(self) -> None:
        """Raises: `DeviceBroken` if the device fails at what cannot fail."""
        try:
            probe = torch.ones(8, device=self.device)
            alive = float((probe + probe).sum()) == 16.0
        except RuntimeError as error:
            raise DeviceBroken(f"expected the device to add, got {type(error).__name__}; start again") from error
        if not alive:
            raise DeviceBroken("expected the device to add, got another sum; start again")


def blank_request(manifest: Manifest) -> Request:
    """A request that a bundle can draw, with black pictures for all that it is shown."""
    model, size = manifest.model, manifest.sizes[0]
    black = Pillow.new("RGB", (size.width, size.height))
    kinds = [entry.kind for entry in model.controls]
    pictures: dict[str, Any] = {}
    if (count := kinds.count("controlnet")) > 0:
        pictures["control_image"] = black if count == 1 else [black] * count
    if "t2i_adapter" in kinds:
        pictures["adapter_image"] = black
    if "ip_adapter" in kinds:
        pictures["ip_adapter_image"] = black
    if model.in_channels != model.latent_channels:
        pictures |= {"image": black, "mask_image": black}
    return Request("", guidance_scale=2.0, height=size.height, width=size.width, **pictures)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a backend ran out of memory. Each says it in its own words, so the words are looked at."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in ("out of memory", "failed to allocate memory", "bad_alloc", "cannot allocate memory")
    )
