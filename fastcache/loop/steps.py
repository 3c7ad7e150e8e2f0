"""A lane, a sampler and a plan -> the latents, one step at a time: the pass's input, the pass, guidance, the row.

What a step does is laid out before the first one, as calls on tensors that exist. A pipeline takes the steps of a run
one after the other (`Run.steps`); a server takes those of many runs in turns, and they share passes (`lanes.py`).
Knows nothing about prompts, images or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from fastcache.cut.chain import ADJUSTMENT, neutral
from fastcache.loop.drivers import UNGUIDED, Call, Driver, Guidance, Turn
from fastcache.loop.drivers.c import CDriver, fits
from fastcache.loop.drivers.pytorch import TorchDriver
from fastcache.loop.features import check_channels, check_reuse, forecasts
from fastcache.loop.lane import Lane, Rows
from fastcache.loop.noise import Generators
from fastcache.loop.plan import CachePlan
from fastcache.loop.scheduled import ScheduledSampler
from fastcache.sampler.table import SamplerTable
from fastcache_kernels.cpu_step import Library, found_library

Sampler = SamplerTable | ScheduledSampler
Scales = Sequence[float] | Sequence[Sequence[float]]  # of one ControlNet, or of several, at each step


@dataclass(frozen=True, slots=True)
class Step:
    """What a finished step left: `latents` is the tensor itself, to be read before the next step, or written to."""

    index: int
    timestep: float
    full: bool
    latents: Tensor


def check_fits(lane: Lane, sampler: Sampler, plan: CachePlan) -> None:
    """Raise `ValueError` for a plan of another length than the sampler's calls, or that a lane's passes cannot run."""
    if plan.num_steps != sampler.num_calls:
        raise ValueError(
            f"expected a plan for the sampler's {sampler.num_calls} U-Net calls, got one for {plan.num_steps}"
        )
    check_reuse(plan, lane.passes)
    own = lane.tensors.get(ADJUSTMENT)
    check_channels(plan.scale_shift, 0 if own is None else own.shape[-1])


class Run:
    """A lane's images on their way, from the latents that its caller writes to `latents` before the first step.

    `latents` are where the last step left them; what is in `after` is called when a step is over. Of `ring` the last
    calls' latents and predictions can be read.

    Raises: `ValueError`, at once, for a plan that does not fit the sampler or the lane's passes.
    """

    def __init__(self, lane: Lane, sampler: Sampler, plan: CachePlan) -> None:
        check_fits(lane, sampler, plan)
        self.lane, self.sampler, self.plan = lane, sampler, plan
        self.after: Callable[[Step], object] | None = None
        self.ring, self.latents = Tensor(), Tensor()
        self._number, self._ends = lane.run, list[Step]()

    @cached_property
    def steps(self) -> Iterator[Step]:
        """The steps, each taken when it is read; the last one's latents are the result.

        A step raises `RuntimeError` where a newer run has taken the lane over.
        """
        raise NotImplementedError

    def end(self, step: int) -> Step:
        """A step is over: what it left."""
        end = self._ends[step]
        self.latents = end.latents
        if self.after is not None:
            self.after(end)
        return end

    def check(self) -> None:
        """Raise `RuntimeError` where a newer run has taken the lane over."""
        if self.lane.run != self._number:
            raise RuntimeError("a newer run has taken this one's buffers; finish or drop a stream before the next call")

    def _on(self, ring: Tensor) -> None:
        """Settle where the calls of this run lie."""
        places = ring[:, 0].unbind()  # the latents before step i are in place i, those of the last step behind it
        self.ring, self.latents = ring, places[0]
        self._ends = [
            Step(step, float(timestep), self.plan.is_full(step), places[(step + 1) % len(places)])
            for step, timestep in enumerate(self.sampler.timesteps.tolist())
        ]


class PlainRun(Run):
    """A run whose steps are calls from here, on a lane of its own or beside others in a server.

    `generator` draws the noise of stochastic samplers, one for the whole batch or one for each image.
    `conditioning_scales` are a ControlNet's at each step, where they are not all those that the lane's inputs were set
    to. A lane of two halves is run without guidance where `guided` is False.
    """

    def __init__(
        self,
        lane: Lane,
        sampler: Sampler,
        plan: CachePlan,
        guidance: Guidance = UNGUIDED,
        *,
        generator: Generators = None,
        conditioning_scales: Scales | None = None,
        guided: bool = True,
    ) -> None:
        super().__init__(lane, sampler, plan)
        self._guided = guided
        self._before, self._after = forecasts(lane, plan, sampler.sigmas, guided=guided)
        self._scales = None if conditioning_scales is None else torch.tensor(conditioning_scales, device=lane.device)
        self._adjustments = adjustments_of(plan, lane)
        self._driver = driver_of(lane, sampler, guidance, generator)
        self._on(self._driver.ring)
        self.turns = [self.turn(step, lane.rows(self.is_guided(step))) for step in range(plan.num_steps)]

    def is_guided(self, step: int) -> bool:
        return self._guided and self.plan.is_guided(step)

    def turn(self, step: int, rows: Rows) -> Turn:
        """What a step does around its pass, which runs on these rows; `turns` are those on the lane's own."""
        scales = [] if self._scales is None else [partial(rows.tensors["conditioning_scale"].copy_, self._scales[step])]
        if (adjustment := rows.tensors.get(ADJUSTMENT)) is not None:
            scales.append(partial(adjustment.copy_, self._adjustments[step]))
        own = self._driver.turn(step, rows)
        return Turn([*own.input, *scales, *self._before.get(step, ())], [*self._after.get(step, ()), *own.update])

    @cached_property
    def steps(self) -> Iterator[Step]:
        keys = [(name, self.is_guided(step)) for step, name in enumerate(self.plan.passes)]
        passes = {key: self.lane.call(*key) for key in dict.fromkeys(keys)}
        return self._take([passes[key] for key in keys])

    def _take(self, passes: Sequence[Call]) -> Iterator[Step]:
        for step, turn, run in zip(range(len(passes)), self.turns, passes, strict=True):
            self.check()
            for call in turn.input:  # the scaled latents once a half, the timestep, the features that are forecast
                call()
            run()
            for call in turn.update:  # guidance, and the row
                call()
            yield self.end(step)


def foretold(run: Run, step: int, prediction_type: str) -> Tensor:
    """The latents without noise that a step, the last one taken, foretells. Shapes: (N, C, ...).

    Raises: `ValueError` for a sampler without a table.
    """
    if not isinstance(run.sampler, SamplerTable):
        raise ValueError("expected a sampler with a table for what a step foretells, got a scheduler's own step")
    of_sample, of_noise = run.sampler.foretells(prediction_type)[step]
    x, e = run.ring[step % len(run.ring), :2]
    return of_sample * x + of_noise * e


def adjustments_of(plan: CachePlan, lane: Lane) -> Sequence[Tensor]:
    """For each step what the residuals that it reuses are scaled by, and what is added to them.

    Shapes: (1, 2, channels of all blocks) each; none for a lane without blocks.
    """
    own = lane.tensors.get(ADJUSTMENT)
    if own is None:
        return []
    if plan.scale_shift is None:
        return [neutral(*own[:1].shape[::2]).to(own)] * plan.num_steps
    return torch.from_numpy(plan.scale_shift.table.copy()).to(own)[:, None].unbind()


def driver_of(lane: Lane, sampler: Sampler, guidance: Guidance, generator: Generators) -> Driver:
    """The compiled C where it is there and is for this lane and this sampler, else PyTorch's operations."""
    library = found_library()
    if isinstance(library, Library) and isinstance(sampler, SamplerTable) and fits(lane):
        return CDriver(library, lane, sampler, guidance, generator)
    return TorchDriver(lane, sampler, guidance, generator)
