"""A batch that the scheduler chose -> an engine call, and each image's own guidance and sampler update around it.

The one place of the serving side that computes. Knows nothing about queues, threads or HTTP, nor who shares a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor

from fastcache.bundle.recipe import Size
from fastcache.errors import BundleError
from fastcache.loop.drivers import Guidance
from fastcache.loop.lanes import Lanes
from fastcache.loop.noise import draw
from fastcache.loop.plan import CachePlan
from fastcache.loop.steps import PlainRun, foretold
from fastcache.loop.streams import load_streams
from fastcache.pipeline.arguments import Terms
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.prompts import Prompt, unet_inputs
from fastcache.pipeline.request import Request
from fastcache.pipeline.schedule import Steps
from fastcache.sampler.table import SamplerTable


class DeviceBroken(RuntimeError):
    """The device answers no more; only a new process can help."""


@dataclass(eq=False)
class Drawing:
    """What a job draws, the first image with `seed`, and what that means for the bundle.

    `conditioning` is made when its first image starts, for all of them.
    """

    request: Request
    terms: Terms
    seed: int
    table: SamplerTable
    plan: CachePlan
    conditioning: dict[str, Tensor] | None = field(default=None, repr=False)


@dataclass(eq=False)
class _InFlight:
    """An image on its lane, among those of its size."""

    lanes: Lanes
    run: PlainRun


@dataclass(eq=False)
class _Made:
    """A sampler's table, once a thread has made it; the others wait for that one."""

    table: SamplerTable | None = None
    making: Lock = field(default_factory=Lock)


class Executor:
    """A bundle's engines, and a lane for each of at most `most` images in flight, for each size that is drawn.

    `threads` are those of streams on a CPU; 0 means as many as torch uses.

    Raises: `BundleError` for a bundle that has no text encoder or VAE, or whose U-Net takes an image as well.
    """

    def __init__(self, pipe: FastCachePipeline, most: int, *, threads: int = 0) -> None:
        manifest, self.pipe = pipe.bundle.manifest, pipe
        model, profile = manifest.model, manifest.profiles["batch"]
        if profile.min > 1:
            raise BundleError(f"expected a bundle for 1 image or more, got one for {profile}; build with --batch 1:4:8")
        if model.in_channels != model.latent_channels:
            raise BundleError(
                f"expected a text-to-image bundle, got one whose U-Net takes {model.in_channels} channels for "
                f"{model.latent_channels}; serve another"
            )
        if model.controls:
            raise BundleError(
                f"expected a text-to-image bundle, got one with {model.controls[0].name}, which needs a picture for "
                "each image; serve another, or draw with `fastcache generate`"
            )
        for role in ("text_encoder_2" if model.time_ids is not None else "text_encoder", "vae_decoder"):
            pipe.bundle.engine_path(role)
        self.count, self.device = min(most, profile.max), pipe.runtime.device
        self._streams = load_streams(pipe.bundle, threads) if self.count > 1 else None
        self._tables = lru_cache(maxsize=128)(lambda *_: _Made())
        self._asking = Lock()
        # People ask for a prompt again and again, and for the empty negative one always.
        self._embeds = lru_cache(maxsize=32)(lambda text: pipe.prompts.encode([text]))
        self._lanes: dict[Size, Lanes] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._paced: Any = None

    def table(self, sampler: str, num_steps: int | Steps) -> SamplerTable:
        """A sampler's table, made once, however many threads ask for it at the same time.

        Raises: `ValueError` for steps that the sampler cannot take.
        """
        with self._asking:
            made = self._tables(sampler, num_steps)
        with made.making:
            made.table = made.table or self._make_table(sampler, num_steps)
        return made.table

    def _make_table(self, sampler: str, num_steps: int | Steps) -> SamplerTable:
        table = self.pipe.schedule(sampler, num_steps).sampler
        if not isinstance(table, SamplerTable):
            raise ValueError(f"expected a sampler that is a table, got {sampler}, which is not; name another sampler")
        return table

    def lanes(self, size: Size) -> Lanes:
        """The lanes for images of a size, made when it is first drawn."""
        if size not in self._lanes:
            runtime, manifest = self.pipe.runtime, self.pipe.bundle.manifest
            self._lanes[size] = Lanes(
                runtime.pass_engines,
                manifest.passes,
                count=self.count,
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
        """Load every engine and run each once at the usual size, so that the first request pays for none of it."""
        manifest = self.pipe.bundle.manifest
        table = self._usual_table()
        with ThreadPoolExecutor(1) as beside:
            # Native code works, while Python encodes the text.
            loading = beside.submit(lambda: self.lanes(manifest.sizes[0]).bind())
            self._embeds("")
            loading.result()
        plan = CachePlan.all_full(table.num_calls)
        request = Request("", guidance_scale=2.0)
        self.fill(0, Drawing(request, self.pipe.terms(request), 0, table, plan), 0)
        for name in manifest.passes:
            for guided in (True, False):
                self.run([(0, 0)], name=name, guided=guided)
        self.pictures([0])
        self.clear(0)

    def _usual_table(self) -> SamplerTable:
        """That of a request which names no sampler, or else one of any."""
        terms = self.pipe.terms(Request(""))
        try:
            return self.table(terms.sampler_name, terms.steps.count)
        except ValueError:  # the model's own runs its own step, so that requests must name another
            return self.table("ddim", terms.steps.count)

    def fill(self, lane: int, drawing: Drawing, index: int) -> None:
        """Encode the text, unless an image of the same job did, and draw the noise of image `index`."""
        if drawing.conditioning is None:
            drawing.conditioning = self._condition(drawing)
        terms, generator = drawing.terms, torch.Generator("cpu").manual_seed(drawing.seed + index)
        lanes = self.lanes(terms.size)
        own = lanes.lanes[lane]
        own.set_inputs(drawing.conditioning, terms.guided)
        guidance = Guidance(terms.guidance_scale, drawing.request.guidance_rescale)
        run = PlainRun(own, drawing.table, drawing.plan, guidance, generator=[generator], guided=terms.guided)
        draw(run.latents, [generator])
        run.latents.mul_(drawing.table.init_noise_sigma)
        self._in_flight[lane] = _InFlight(lanes, run)

    def _condition(self, drawing: Drawing) -> dict[str, Tensor]:
        """What the U-Net takes besides latents. Shapes: (halves, ...), the unconditional one first."""
        model = self.pipe.bundle.manifest.model
        request, guided = drawing.request, drawing.terms.guided
        wanted, unwanted = str(request.prompt), request.negative_prompt
        negative = Prompt("negative_prompt")
        if guided and not (unwanted is None and model.zero_negative):
            negative = self._encoded("negative_prompt", str(unwanted or ""))
        embeds = self.pipe.prompts.condition(self._encoded("prompt", wanted), negative, count=1, guided=guided)
        return unet_inputs(model, embeds, drawing.terms.size, request, guided=guided)

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
        for turn in turns:
            for call in turn.input:
                call()
        lanes.run(name, numbers, guided)
        for run, turn, (_, step) in zip(runs, turns, steps, strict=True):
            for call in turn.update:
                call()
            run.end(step)
        self._pace()

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a backend ran out of memory. Each says it in its own words, so the words are looked at."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in ("out of memory", "failed to allocate memory", "bad_alloc", "cannot allocate memory")
    )
