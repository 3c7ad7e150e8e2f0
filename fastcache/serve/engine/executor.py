"""A batch that the scheduler chose -> an engine call, and each image's own guidance and sampler update around it.

The one place of the serving side that computes. Knows nothing about queues, threads or HTTP, nor who shares a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from fastcache.loop.between import Around
from fastcache.loop.features import Moves
from fastcache.loop.table import SamplerTable
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.prompts import Prompt, Sizes
from fastcache.serve.engine.slots import Slots
from fastcache.serve.engine.steps import Place, RingTable, Steps
from fastcache.serve.engine.streams import load_streams


class DeviceBroken(RuntimeError):
    """The device answers no more; only a new process can help."""


@dataclass(eq=False)
class Drawing:
    """What a job draws: the text, and how; `moves` are its plan's, by branch.

    `conditioning` is made when its first image starts, for all of them.
    """

    prompt: str
    negative_prompt: str | None
    guidance_scale: float
    seed: int
    sampler: str
    num_inference_steps: int
    size: Size
    table: RingTable
    moves: Mapping[int, Moves] = field(default_factory=dict[int, Moves])
    conditioning: dict[str, Tensor] | None = field(default=None, repr=False)


@dataclass(eq=False)
class _InFlight:
    """A drawing in its slot: its steps, and what each does where the image runs alone, in its own `place`."""

    drawing: Drawing
    slots: Slots
    steps: Steps
    place: Place
    alone: Sequence[Around]

    def around(self, step: int, place: Place) -> Around:
        return self.alone[step] if place is self.place else self.steps.around(step, place)


@dataclass(eq=False)
class _Made:
    """A sampler's table, once a thread has made it; the others wait for that one."""

    table: RingTable | None = None
    making: Lock = field(default_factory=Lock)


class Executor:
    """A bundle's engines, and slots for at most `most` images in flight, for each size that is drawn.

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
        self._slots: dict[Size, Slots] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._paced: Any = None

    def table(self, sampler: str, num_steps: int) -> RingTable:
        """A sampler's table, made once, however many threads ask for it at the same time.

        Raises: `ValueError` for steps that the sampler cannot take.
        """
        with self._asking:
            made = self._tables(sampler, num_steps)
        with made.making:
            made.table = made.table or self._make_table(sampler, num_steps)
        return made.table

    def _make_table(self, sampler: str, num_steps: int) -> RingTable:
        table = self.pipe.schedule(sampler, num_steps).sampler
        if not isinstance(table, SamplerTable):
            raise ValueError(f"expected a sampler that is a table, got {sampler}, which runs its own step here")
        kind = self.pipe.bundle.manifest.model.scheduler.get("prediction_type", "epsilon")
        return RingTable.of(table, self.device, kind)

    def slots(self, size: Size) -> Slots:
        """The slots for images of a size, made when it is first drawn."""
        if size not in self._slots:
            runtime, manifest = self.pipe.runtime, self.pipe.bundle.manifest
            self._slots[size] = Slots(
                {None: runtime.full, **runtime.shallow_engines},
                count=self.count,
                channels=manifest.model.latent_channels,
                sizes={"height": size.height, "width": size.width, "tokens": manifest.profiles["tokens"].opt},
                device=self.device,
                streams=self._streams,
            )
        return self._slots[size]

    @property
    def held_bytes(self) -> int:
        """What the images in flight take now, of all sizes."""
        return sum(slots.held_bytes for slots in list(self._slots.values()))

    def warm_up(self) -> None:
        """Load every engine and run each once at the usual size, so that the first request pays for none of it."""
        manifest = self.pipe.bundle.manifest
        with ThreadPoolExecutor(1) as beside:
            # Native code works, while Python spends 4 s on importing the tokenizer's and the sampler's packages.
            loading = beside.submit(lambda: self.slots(manifest.sizes[0]).bind())
            drawing = Drawing("", None, 2.0, 0, "ddim", 50, manifest.sizes[0], self.table("ddim", 50))
            self._embeds("")
            loading.result()
        self.fill(0, drawing, 0)
        for branch in (None, *manifest.branches):
            self.run([(0, 0)], branch=branch, guided=True)
        self.pictures([0])
        self.clear(0)

    def fill(self, slot: int, drawing: Drawing, index: int) -> None:
        """Encode the text, unless an image of the same job did, and draw the noise of image `index`."""
        if drawing.conditioning is None:
            drawing.conditioning = self._condition(drawing)
        slots, guidance = self.slots(drawing.size), drawing.guidance_scale
        slots.fill(slot, drawing.conditioning)
        slots.make_room(slot, {branch: moves.count for branch, moves in drawing.moves.items()})
        steps = Steps(slots.history[slot], slots.latent_shape, drawing.table, guidance, drawing.seed + index)
        (place,) = slots.places([slot], 1 + (guidance > 1))
        alone = [steps.around(step, place) for step in range(len(drawing.table.timesteps))]
        self._in_flight[slot] = _InFlight(drawing, slots, steps, place, alone)

    def _condition(self, drawing: Drawing) -> dict[str, Tensor]:
        """What the U-Net takes besides latents, the conditional row first. Shapes: (halves, ...)."""
        model = self.pipe.bundle.manifest.model
        guided, num_ids, unwanted = drawing.guidance_scale > 1, model.time_ids, drawing.negative_prompt
        negative = Prompt("negative_prompt")
        if guided and not (unwanted is None and model.zero_negative):
            negative = self._encoded("negative_prompt", unwanted or "")
        embeds = self.pipe.prompts.condition(self._encoded("prompt", drawing.prompt), negative, count=1, guided=guided)
        found = {"encoder_hidden_states": embeds.hidden}
        if num_ids is not None and embeds.pooled is not None:
            size = drawing.size.height, drawing.size.width
            ids = Sizes().time_ids(size, num_ids=num_ids, rows=1 + guided, guided=guided, from_image=False)
            found |= {"text_embeds": embeds.pooled, "time_ids": ids}
        return {name: value.flip(0) for name, value in found.items()}

    def _encoded(self, name: str, text: str) -> Prompt:
        embeds = self._embeds(text)
        return Prompt(name, embeds=embeds.hidden, pooled=embeds.pooled)

    def clear(self, slot: int) -> None:
        """Let go of a slot's drawing. Its tensors stay for the next."""
        self._in_flight.pop(slot, None)

    def run(self, steps: Sequence[tuple[int, int]], *, branch: int | None, guided: bool) -> None:
        """One U-Net call for these (slot, step) of one size, and their updates. If it raises, nothing has moved."""
        numbers, halves = [slot for slot, _ in steps], 1 + guided
        slots = self._in_flight[numbers[0]].slots
        turns = [
            (self._in_flight[slot], slot, step, self._in_flight[slot].around(step, place))
            for (slot, step), place in zip(steps, slots.places(numbers, halves), strict=True)
        ]
        for image, slot, step, around in turns:
            for call in around.before:
                call()
            if branch is not None and branch in image.drawing.moves and step in image.drawing.moves[branch].makes:
                slots.make(branch, slot, halves, *image.drawing.moves[branch].makes[step])
        slots.run(branch, numbers, halves)
        for image, slot, step, around in turns:
            for stored, moves in image.drawing.moves.items():
                if step in moves.keeps:
                    slots.keep(stored, slot, halves, moves.keeps[step])
            for call in around.after:
                call()
            image.steps.latents = around.latents
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

    def latents(self, slot: int) -> Tensor:
        """An image's latents, as the last step left them. Shapes: returns (1, C, H, W)."""
        return self._in_flight[slot].steps.latents

    def pictures(self, slots: Sequence[int]) -> list[Pillow.Image]:
        """The pictures of the latents in these slots, of one size, as they are now."""
        return self.pipe.decode(torch.cat([self.latents(slot) for slot in slots]))

    def preview(self, slot: int, step: int) -> Pillow.Image:
        """The picture that the step just taken foretells: without noise, and the sharper the later the step."""
        (picture,) = self.pipe.decode(self.foretold(slot, step))
        return picture

    def foretold(self, slot: int, step: int) -> Tensor:
        """The latents without noise that the step just taken foretells. Shapes: returns (1, C, H, W)."""
        return self._in_flight[slot].steps.foretold(step)

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
