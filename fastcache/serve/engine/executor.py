"""A batch that the scheduler chose -> an engine call, and each image's own guidance and sampler update around it.

The one place of the serving side that computes. Knows nothing about queues, threads or HTTP, nor who shares a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor

from fastcache.bundle.recipe import Size
from fastcache.errors import BundleError
from fastcache.loop.drivers import Guidance
from fastcache.loop.lanes import Lanes
from fastcache.loop.noise import draw
from fastcache.loop.steps import PlainRun
from fastcache.loop.streams import load_streams
from fastcache.pipeline.controls import Steering
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.prompts import Prompt, unet_inputs
from fastcache.serve.engine.order import Drawing
from fastcache.serve.engine.schedules import Schedules
from fastcache.serve.engine.speeds import Speeds
from fastcache_engines.capturing import without_captures


@dataclass(eq=False)
class _InFlight:
    """An image on its lane, among those of its size."""

    lanes: Lanes
    run: PlainRun
    scales: Tensor | None  # of ControlNets, where they change from step to step


class Executor:
    """A bundle's engines, and a lane for each of at most `most` images in flight, for each size that is drawn.

    There are `express` lanes more, for jobs that are short beside those that hold the others. While it works on a GPU
    no other thread captures a graph there: one that loads a bundle takes turns with the one that draws.

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
        self.schedule = Schedules(pipe)
        # People ask for a prompt again and again, and for the empty negative one always.
        self.embeds = lru_cache(maxsize=32)(lambda text: pipe.prompts.encode([text]))
        self._lanes: dict[Size, Lanes] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._paced: Any = None

    def lanes(self, size: Size) -> Lanes:
        """The lanes for images of a size, made when it is first drawn."""
        if size not in self._lanes:
            engines, manifest = self.pipe.runtime.pass_engines, self.pipe.bundle.manifest
            with without_captures(self.device):
                self._lanes[size] = Lanes(
                    engines,
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

    def fill(self, lane: int, drawing: Drawing, index: int) -> None:
        """Put image `index` at its start: noise, or a picture under noise; and what steers it, unless an image of the
        same job has made that.
        """
        with without_captures(self.device):
            self._fill(lane, drawing, index)

    def _fill(self, lane: int, drawing: Drawing, index: int) -> None:
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
        embeds = self.embeds(text)
        return Prompt(name, embeds=embeds.hidden, pooled=embeds.pooled)

    def clear(self, lane: int) -> None:
        """Let go of a lane's drawing. Its tensors stay for the next."""
        self._in_flight.pop(lane, None)

    def run(self, steps: Sequence[tuple[int, int]], *, name: str, guided: bool) -> None:
        """One call of a pass for these (lane, step) of one size, and what each does around it.

        If it raises, nothing has moved.
        """
        with without_captures(self.device):
            self._run(steps, name, guided)
        self._pace()

    def _run(self, steps: Sequence[tuple[int, int]], name: str, guided: bool) -> None:
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
        with without_captures(self.device):
            return self.pipe.decode(torch.cat([self.latents(lane) for lane in lanes]))

    def preview(self, lane: int, step: int) -> Pillow.Image:
        """The picture that the step just taken foretells: without noise, and the sharper the later the step."""
        with without_captures(self.device):
            return self.pipe.preview(self._in_flight[lane].run, step)
