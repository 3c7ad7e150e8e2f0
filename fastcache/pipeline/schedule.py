"""A sampler's name or scheduler, a number of steps, and where among them to begin and end -> the U-Net calls to make.

Also what the scheduler makes of an image and noise before each of those calls, which image to image starts from and
inpainting comes back to. Knows schedulers; knows nothing about images, engines or plans.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastcache.loop.fitted import begun_at, fitted_table
from fastcache.loop.noise import Generators
from fastcache.loop.plan import CachePlan
from fastcache.loop.scheduled import ScheduledSampler
from fastcache.sampler.scheduler import SAMPLERS, Scheduler, step_arguments
from fastcache.sampler.stored import Samplers
from fastcache.sampler.table import NonlinearSamplerError, SamplerTable, compile_sampler, prepare


@dataclass(frozen=True)
class Span:
    """Which part of the denoising to do, in diffusers' terms: by `strength`, or from one fraction of it to another."""

    strength: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None

    def of(self, scheduler: Any, num_steps: int) -> tuple[int, int]:
        """The first of a prepared scheduler's calls, and the one after the last.

        Raises: `ValueError` where none are left.
        Source: `get_timesteps` of diffusers' image to image pipelines, and `denoising_end` of SDXL's.
        """
        timesteps, trained, order = scheduler.timesteps, scheduler.config.num_train_timesteps, scheduler.order
        begin, end = 0, len(timesteps)
        if self.denoising_start is not None:
            left = int((timesteps < round(trained - self.denoising_start * trained)).sum())
            begin = end - (left + 1 if order == 2 and left % 2 == 0 else left)  # both calls of a step, or neither
        elif self.strength is not None:
            begin = max(num_steps - min(int(num_steps * self.strength), num_steps), 0) * order
        if self.denoising_end is not None:
            end = begin + int((timesteps[begin:] >= round(trained - self.denoising_end * trained)).sum())
        if begin >= end:
            raise ValueError(f"expected a part of {num_steps} steps with a step in it, got {self._text()}; take more")
        return begin, end

    def _text(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return " and ".join(f"{name} {value}" for name, value in given.items())


WHOLE = Span()


@dataclass(frozen=True)
class Steps:
    """How many denoising steps, or where the scheduler is to take them: at which timesteps, or at which sigmas.

    Of a `fitted` plan they are those of its reference run, and the plan says which of them are taken.
    """

    count: int
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    fitted: CachePlan | None = None

    @property
    def places(self) -> dict[str, tuple[float, ...]]:
        named = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        return {name: values for name, values in named.items() if values is not None}

    def prepare(self, scheduler: Scheduler) -> Any:
        """A copy of the scheduler, its timesteps set. Raises: `ValueError` for steps that it cannot make."""
        return prepare(scheduler, self.count, self.places)


def steps_for(scheduler: Scheduler, num_calls: int) -> int | None:
    """How many steps of a scheduler make so many U-Net calls, if any do."""
    for count in (num_calls, num_calls - 1, (num_calls + 1) // 2):  # PNDM makes one more, Heun two but at the last
        with suppress(ValueError):  # more steps than it was trained with, say
            if count > 0 and len(Steps(count).prepare(scheduler).timesteps) == num_calls:
                return count
    return None


@dataclass(frozen=True, eq=False)
class Schedule:
    """The calls to make; `prepared` gives the scheduler they are of, its timesteps set."""

    sampler: SamplerTable | ScheduledSampler
    prepared: Callable[[], Any]

    @property
    def takes_new_latents(self) -> bool:
        """Whether its updates hold where someone has put other latents in place; UniPC's table keeps its own."""
        return isinstance(self.sampler, ScheduledSampler) or self.sampler.recursion() is self.sampler.stepwise

    @cached_property
    def noised(self) -> Tensor:
        """Before call i an image x under noise z is `noised[i, 0] * x + noised[i, 1] * z`; after the last, x.

        Shapes: (calls + 1, 2), float32.

        Raises: `ValueError` for a scheduler that cannot put an image under noise.
        """
        scheduler, rows = copy.deepcopy(self.prepared()), list[list[float]]()
        if not hasattr(scheduler, "add_noise"):
            raise ValueError(
                f"expected a scheduler with add_noise to begin with an image, got {type(scheduler).__name__}; "
                "choose another sampler"
            )
        one, zero = (torch.full((1, 1, 1, 1), x, dtype=torch.float32, device="cpu") for x in (1.0, 0.0))
        extra = step_arguments(scheduler, 0.0, torch.Generator("cpu"))
        timesteps = torch.as_tensor(self.sampler.timesteps).to(scheduler.timesteps.dtype)
        for t in timesteps:
            rows.append([scheduler.add_noise(x, z, t[None]).item() for x, z in ((one, zero), (zero, one))])
            scheduler.step(zero, t, scheduler.scale_model_input(zero, t), **extra)
        return torch.tensor([*rows, [1.0, 0.0]], dtype=torch.float32, device="cpu")


def make_schedule(
    scheduler: Scheduler, steps: Steps, eta: float, span: Span, generator: Generators = None, *, own: bool = False
) -> Schedule:
    """A table where the scheduler has one, and else, with a warning, the scheduler itself; `own` asks for the latter.

    Raises: `ValueError` for steps that the scheduler cannot make, or a span without any.
    """
    begun = steps.prepare(scheduler)

    def prepared() -> Any:
        return begun

    num_steps = len(begun.timesteps) if steps.places else steps.count  # as `retrieve_timesteps` of diffusers counts
    begin, end = (0, None) if span == WHOLE else span.of(begun, num_steps)
    if steps.fitted is not None:
        kind = str(scheduler.config.get("prediction_type", "epsilon"))
        reference = compile_sampler(scheduler, steps.count)
        return Schedule(_fitted(reference, kind, steps.fitted, eta, begin, span), prepared)
    if begin and hasattr(begun, "set_begin_index"):
        begun.set_begin_index(begin)
    if not own:
        extra = step_arguments(scheduler, eta)
        try:
            table = compile_sampler(scheduler, steps.count, begin_index=begin, places=steps.places, **extra)
            return Schedule(_first(table, end, begin), prepared)
        except NonlinearSamplerError as error:
            warnings.warn(f"no table for this scheduler, so its own step runs: {error}", stacklevel=5)
    one = list(generator) if isinstance(generator, Sequence) else generator
    own_begun = copy.deepcopy(begun)
    return Schedule(ScheduledSampler(begun, step_arguments(begun, eta, one), begin, end), lambda: own_begun)


def named_schedule(samplers: Samplers, name: str, steps: Steps, eta: float, span: Span) -> Schedule:
    """As `make_schedule` of a sampler by its name; a whole run out of the bundle's tables where they have it.

    Raises: as `make_schedule`; `ValueError` for a name that stands for no sampler.
    """
    is_whole = span == WHOLE and not eta and not steps.places
    # What a fit's reference is where eta is not said, a class without a name of ours decides.
    table = samplers.table(name, steps.count) if is_whole and (steps.fitted is None or name in SAMPLERS) else None
    if table is None:
        return make_schedule(samplers.make(name), steps, eta, span)
    if steps.fitted is not None:
        table = _fitted(table, samplers.prediction_type, steps.fitted, eta, 0, span)
    return Schedule(table, lambda: steps.prepare(samplers.make(name)))


def _fitted(
    reference: SamplerTable, prediction_type: str, plan: CachePlan, eta: float, begin: int, span: Span
) -> SamplerTable:
    """The table of a fitted plan's run, from its first FULL point at or after a call of the reference on.

    Raises: `ValueError` for noise at each step or an early end, which no row was fitted for.
    """
    if eta or span.denoising_end is not None:
        what, got = ("eta 0", eta) if eta else ("no denoising_end", span.denoising_end)
        raise ValueError(f"expected {what} with a fitted plan, fitted for a whole run without noise, got {got:g}")
    begun = begun_at(plan, reference, prediction_type, begin)
    if begun.fit is None or (begin == 0 and begun.fit.points[0] != 0):
        raise ValueError(
            "expected a fitted plan that begins at the reference's first call, got one that begins later; give an image"
        )
    return fitted_table(reference, begun.fit)


def _first(table: SamplerTable, end: int | None, begin: int) -> SamplerTable:
    """A table's calls before `end`, which is counted from the scheduler's first."""
    calls = table.num_calls if end is None else end - begin
    if calls == table.num_calls:
        return table
    return replace(
        table,
        timesteps=table.timesteps[:calls],
        input_scale=table.input_scale[:calls],
        x=table.x[:calls],
        eps=table.eps[:calls, :calls],
        noise=table.noise[:calls, :calls],
        noise_drawn=table.noise_drawn[:calls],
        stepwise=table.stepwise[:calls],
        sigmas=None if table.sigmas is None else table.sigmas[:calls],
    )
