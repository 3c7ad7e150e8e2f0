"""A run as launches that never ask the host -> CUDA graphs: one for the whole loop, or one for each kind of step.

Between two passes stands one kernel, which reads the number of its step from the device and the sampler's numbers from
tables (`fastcache_kernels.guidance`). Graphs are kept by plan, sampler and addresses; what lies between an engine's
inputs and outputs is memory that all share. Everything but the recording runs on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcache.errors import BackendUnavailable
from fastcache.loop.drivers import UNGUIDED, Call, Guidance, contrast
from fastcache.loop.features import forecasts
from fastcache.loop.lane import Lane, Rows
from fastcache.loop.noise import Generators, draw
from fastcache.loop.plan import CachePlan
from fastcache.loop.scheduled import ScheduledSampler
from fastcache.loop.steps import Run, Sampler, Scales, Step
from fastcache.sampler.table import SamplerTable
from fastcache_engines import Binding, backends_with
from fastcache_engines.capturing import capture_lock
from fastcache_kernels.guidance import GuidanceStep
from fastcache_kernels.values import StepTables

_KEPT = 8  # loops a lane keeps: a graph of 50 steps of SD1.5 is some 30 000 nodes, tens of MiB on the host
_WARM_UP_RUNS = 3  # as torch.cuda.make_graphed_callables has it


class Recorder(Protocol):
    """Turns calls on fixed tensors into one launch."""

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Make calls for the first time: what they load or allocate once must not fall into a recording."""
        ...

    def capturable(self, binding: Binding) -> bool: ...

    def record(self, calls: Sequence[Call]) -> Callable[[], object]: ...


class CudaRecorder:
    """Recordings as CUDA graphs of one device, in one memory pool: no two of them run at the same time."""

    def __init__(self) -> None:
        self._stream, self._memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, calls: Sequence[Call]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with capture_lock, torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                for call in calls:
                    call()
        current.wait_stream(self._stream)

    def capturable(self, binding: Binding) -> bool:
        """Whether a binding says that it can be; ONNX Runtime's, which replays a graph of its own, does not."""
        with torch.cuda.stream(self._stream):
            return binding.capturable()

    def record(self, calls: Sequence[Call]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"stream": self._stream, "capture_error_mode": "thread_local"}
        with capture_lock, torch.cuda.graph(graph, pool=self._memory, **options):
            for call in calls:
                call()
        return graph.replay


class DeviceDriver:
    """A run's own work in one kernel after each pass, all numbers on the device.

    A step's update writes the input of the next one, where that one runs on the same rows and nobody writes to the
    latents in between. The kernel reads the number of its step from `numbers`, or from `counter`, which counts them.

    Raises: `ValueError` for latents that are no images, or a rescale outside of 0 to 1.
    """

    def __init__(self, lane: Lane, table: SamplerTable, rescale: float) -> None:
        self._lane, self._table, self._rescale = lane, table, rescale
        self.contrasts = table.contrasts
        numbers = table.numbers
        self.tables = StepTables(*(getattr(numbers, name).to(lane.device, copy=True) for name in vars(numbers)))
        self.ring = lane.ring(numbers.ring_calls)
        calls = table.num_calls
        self._noise = torch.zeros(calls, *lane.latent_shape, device=lane.device) if any(table.noise_drawn) else None
        # 16 bytes apart, for kernels are compiled for aligned addresses
        self._numbers = torch.arange(calls, dtype=torch.int32, device=lane.device)[:, None].repeat(1, 4)
        self.counter = torch.zeros(1, dtype=torch.int32, device=lane.device)
        self._counted: dict[int, GuidanceStep] = {}

    def begin(self, guidance_scale: float, generator: Generators) -> None:
        """Take a run's guidance and draw all its noise."""
        self.tables.guidance.fill_(guidance_scale)
        if self.contrasts:
            self.tables.weights.copy_(self._table.weights_at(guidance_scale))
        self.counter.zero_()
        if self._noise is not None:
            for step, drawn in enumerate(self._table.noise_drawn):
                if drawn:
                    draw(self._noise[step], generator)

    def input(self, step: int, rows: Rows) -> list[Call]:
        latents, timestep = self.ring[step % len(self.ring), 0], rows.tensors["timestep"]
        return [
            partial(
                torch.mul, latents.expand_as(rows.model_input), self.tables.input_scales[step], out=rows.model_input
            ),
            partial(timestep.copy_, self.tables.timesteps[step].expand_as(timestep)),
        ]

    def update(self, step: int, rows: Rows) -> list[Call]:
        return [*self._contrast(step, rows), self._kernel(rows, self._numbers[step, :1]).run]

    def counted(self, step: int, rows: Rows) -> list[Call]:
        """The update of whatever step the device counts, so that it is the same for all steps on these rows.

        But for what guidance is made of, which is written to a step's own place.
        """
        if id(rows) not in self._counted:
            self._counted[id(rows)] = self._kernel(rows, self.counter)
        return [*self._contrast(step, rows), self._counted[id(rows)].run, partial(self.counter.add_, 1)]

    def _contrast(self, step: int, rows: Rows) -> list[Call]:
        return [contrast(rows, self.ring[step % len(self.ring), 2])] if self.contrasts else []

    def _kernel(self, rows: Rows, number: Tensor) -> GuidanceStep:
        tensors = rows.tensors
        return GuidanceStep(
            tensors["noise_pred"],
            self.ring,
            self.tables,
            number,
            tensors["sample"],
            tensors["timestep"],
            rescale=self._rescale,
            noise=self._noise,
        )


class DeviceLoop:
    """The calls of a plan's steps on a lane, to be recorded whole or one by one."""

    def __init__(self, lane: Lane, table: SamplerTable, plan: CachePlan, rescale: float, scaled: bool = False) -> None:
        self._lane, self._plan = lane, plan
        self._driver = DeviceDriver(lane, table, rescale)
        self.ring = self._driver.ring
        self._guided = [plan.is_guided(step) or lane.halves == 1 for step in range(plan.num_steps)]
        self._rows = [lane.rows(guided) for guided in self._guided]
        self._scales = None  # of ControlNets, at each step
        if scaled:
            shape = lane.tensors["conditioning_scale"].shape[1:]
            self._scales = torch.zeros(table.num_calls, *shape, device=lane.device)
        self._before, self._after = forecasts(lane, plan, table.sigmas)
        self._enters = [[*self._driver.input(step, rows), *self._scale(step)] for step, rows in enumerate(self._rows)]

    def begin(self, guidance_scale: float, generator: Generators, scales: Scales | None) -> None:
        """Take a run's numbers, draw all its noise, and write the first step's input."""
        self._driver.begin(guidance_scale, generator)
        if self._scales is not None and scales is not None:
            self._scales.copy_(torch.tensor(scales))
        self.enter(0)

    def enter(self, step: int) -> None:
        """Write a step's inputs, out of the latents before it."""
        for call in self._enters[step]:
            call()

    def whole(self) -> list[Call]:
        """Every call of the run; the steps' numbers lie in memory."""
        turns = [step > 0 and self._guided[step] != self._guided[step - 1] for step in range(self._plan.num_steps)]
        return [
            call
            for step, rows in enumerate(self._rows)
            for call in (
                *(self._enters[step] if turns[step] else self._scale(step)),
                *self._pass(step),
                *self._driver.update(step, rows),
            )
        ]

    def single(self, step: int) -> list[Call]:
        """The calls of one step after `enter`; the device counts it, so they are the same for all steps of its kind."""
        return [*self._pass(step), *self._driver.counted(step, self._rows[step])]

    def kind(self, step: int) -> Hashable:
        """Steps of one kind make the same calls."""
        # A forecast's weights are numbers of its calls, and what guidance is made of has a place for each call.
        apart = step if self._plan.forecast is not None or self._driver.contrasts else None
        return self._plan.passes[step], self._guided[step], apart

    def passes(self) -> list[Call]:
        """Each pass that the plan runs, once."""
        keys = dict.fromkeys(zip(self._plan.passes, self._guided, strict=True))
        return [self._lane.call(*key) for key in keys]

    def _pass(self, step: int) -> list[Call]:
        run = self._lane.call(self._plan.passes[step], self._guided[step])
        return [*self._before.get(step, ()), run, *self._after.get(step, ())]

    def _scale(self, step: int) -> list[Call]:
        """Write the ControlNet's scale, where it changes from step to step."""
        if self._scales is None:
            return []
        scale = self._rows[step].tensors["conditioning_scale"]
        return [partial(scale.copy_, self._scales[step].expand_as(scale))]


@dataclass
class Recorded:
    """A loop, what of it has been recorded (under None the whole, else a kind of step), and the bindings it runs.

    The calls that were recorded are kept with it: a graph goes on reading and writing the memory that they hold.
    """

    loop: DeviceLoop
    bindings: list[Binding]
    launches: dict[Hashable, Callable[[], object]] = field(default_factory=dict)
    calls: dict[Hashable, Sequence[Call]] = field(default_factory=dict)

    def launch(self, recorder: Recorder, kind: Hashable, calls: Callable[[], Sequence[Call]]) -> Callable[[], object]:
        """A recording, made when it is first asked for."""
        if not self.launches:
            recorder.warm_up(self.loop.passes())
        if kind not in self.launches:
            self.calls[kind] = calls()
            self.launches[kind] = recorder.record(self.calls[kind])
        return self.launches[kind]


class CapturedRun(Run):
    """A run out of recordings: of the whole run, yielding its last step only, or with `stepwise` of each step.

    All noise is drawn before the first step. Between two steps the latents may be written to.

    Raises: `ValueError` as `Run`, and for a sampler without a table; `BackendUnavailable` for engines that cannot be
    recorded.
    """

    def __init__(
        self,
        recorder: Recorder,
        lane: Lane,
        sampler: Sampler,
        plan: CachePlan,
        guidance: Guidance = UNGUIDED,
        *,
        generator: Generators = None,
        conditioning_scales: Scales | None = None,
        stepwise: bool = False,
    ) -> None:
        if isinstance(sampler, ScheduledSampler):
            raise ValueError("expected a sampler with a table for a CUDA graph, got a scheduler's own step; load plain")
        super().__init__(lane, sampler, plan)
        self._numbers = guidance.scale, generator, conditioning_scales
        recorded = _recorded(recorder, lane, sampler, plan, guidance.rescale, conditioning_scales is not None)
        self._loop = loop = recorded.loop
        if stepwise:
            steps = range(plan.num_steps)
            self._launches = [recorded.launch(recorder, loop.kind(step), partial(loop.single, step)) for step in steps]
        else:
            self._launches = [recorded.launch(recorder, None, loop.whole)]
        self._on(loop.ring)

    @cached_property
    def steps(self) -> Iterator[Step]:
        return self._take()

    def _take(self) -> Iterator[Step]:
        first = self.plan.num_steps - len(self._launches)  # a whole run's one launch ends with the last step
        for step, launch in enumerate(self._launches, first):
            self.check()
            if step == first:
                self._loop.begin(*self._numbers)
            else:
                self._loop.enter(step)  # always: torch does not count what is written to a tensor in inference mode
            launch()
            yield self.end(step)


def _recorded(
    recorder: Recorder, lane: Lane, table: SamplerTable, plan: CachePlan, rescale: float, scaled: bool
) -> Recorded:
    """The recordings of these very bindings and addresses, or a new place for them; the oldest give way."""
    keys = {(name, plan.is_guided(step)): None for step, name in enumerate(plan.passes)}
    bindings = [binding for key in keys for binding in lane.bindings(*key)]
    for binding in bindings:
        if not recorder.capturable(binding):
            raise BackendUnavailable(
                f"expected engines that a CUDA graph can hold ({backends_with('captured')}), got "
                f"{type(binding).__name__}; load without cuda_graph"
            )
    ring = lane.ring(table.numbers.ring_calls)
    tensors = [ring, *(tensor for _, guided in keys for tensor in lane.rows(guided).tensors.values())]
    schedule = plan.passes, plan.unguided_steps, plan.forecast
    key = (
        *(id(recorder), table, schedule, rescale, scaled),
        *map(id, bindings),
        *(tensor.data_ptr() for tensor in tensors),
    )
    kept = lane.recorded
    found = kept.pop(key, None) or Recorded(DeviceLoop(lane, table, plan, rescale, scaled), bindings)
    kept[key] = found  # the newest comes last
    while len(kept) > _KEPT:
        kept.pop(next(iter(kept)))
    return found
