"""A run as launches that never ask the host -> CUDA graphs: one for the whole loop, or one for each kind of step.

Between two engine calls stands one kernel, which reads the number of its step from the device and the sampler's numbers
from tables (`fastcache_kernels.guidance`). Graphs are kept by plan, sampler and addresses; what lies between an
engine's inputs and outputs is memory that all share. Everything but the recording runs on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcache.errors import BackendUnavailable
from fastcache.loop.between import Call, Generators, Scales, ScheduledSampler, draw
from fastcache.loop.buffers import BufferPool
from fastcache.loop.denoise import Step
from fastcache.loop.features import forecasts
from fastcache.loop.plan import CachePlan
from fastcache.loop.table import SamplerTable
from fastcache_engines import Binding
from fastcache_kernels.guidance import GuidanceStep
from fastcache_kernels.values import step_tables

_KEPT = 8  # loops a pool keeps: a graph of 50 steps of SD1.5 is some 30 000 nodes, tens of MiB on the host
_WARM_UP_RUNS = 3  # as torch.cuda.make_graphed_callables has it


class Recorder(Protocol):
    """Turns calls on fixed tensors into one launch."""

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Make calls for the first time: what they load or allocate once must not fall into a recording."""
        ...

    def capturable(self, binding: Any) -> bool: ...

    def record(self, calls: Sequence[Call]) -> Callable[[], object]: ...


class CudaRecorder:
    """Recordings as CUDA graphs of one device, in one memory pool: no two of them run at the same time."""

    def __init__(self) -> None:
        self._stream, self._memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, calls: Sequence[Call]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                for call in calls:
                    call()
        current.wait_stream(self._stream)

    def capturable(self, binding: Any) -> bool:
        """Whether a binding says that it can be; ONNX Runtime's, which replays a graph of its own, does not."""
        asked = getattr(binding, "capturable", None)
        with torch.cuda.stream(self._stream):
            return asked is not None and asked()

    def record(self, calls: Sequence[Call]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            for call in calls:
                call()
        return graph.replay


class DeviceLoop:
    """The calls of a plan's steps with all numbers on the device.

    `ring` holds the last calls' latents, predictions and noise, as `GuidanceStep` says. A step leaves the inputs of the
    next one in place, where that one runs on the same rows and nobody writes to the latents in between.

    Raises: `ValueError` for latents that are no images, or a rescale outside of 0 to 1.
    """

    def __init__(
        self, pool: BufferPool, table: SamplerTable, plan: CachePlan, rescale: float, scaled: bool = False
    ) -> None:
        self._pool, self._table, self._plan, self._rescale = pool, table, plan, rescale
        self._guided = [plan.is_guided(step) or pool.halves == 1 for step in range(plan.num_steps)]
        device, calls = pool.history.device, table.num_calls
        updates = [(update.first, update.weights) for update in table.recursion()]
        self._tables = step_tables(
            updates, input_scales=table.input_scale.tolist(), timesteps=table.timesteps.tolist(), device=device
        )
        self.ring = torch.zeros(self._tables.ring_calls, 3, *pool.latent_shape, device=device)
        self._noise = torch.zeros(calls, *pool.latent_shape, device=device) if any(table.noise_drawn) else None
        # 16 bytes apart, for kernels are compiled for aligned addresses
        self._numbers = torch.arange(calls, dtype=torch.int32, device=device)[:, None].repeat(1, 4)
        self._counter = torch.zeros(1, dtype=torch.int32, device=device)
        self._scales = None  # of ControlNets, at each step
        if scaled:
            self._scales = torch.zeros(calls, *pool.tensors["conditioning_scale"].shape[1:], device=device)
        self._before, self._after = forecasts(pool, plan, table.sigmas)
        self._counted = {guided: self._update(guided, self._counter) for guided in set(self._guided)}
        self._enters = [self._enter(step) for step in range(calls)]

    def begin(self, guidance_scale: float, generator: Generators, scales: Scales | None = None) -> None:
        """Take the pool's first latents, draw all noise, and write the first step's inputs."""
        self._tables.guidance.fill_(guidance_scale)
        if self._scales is not None and scales is not None:
            self._scales.copy_(torch.tensor(scales))
        self._counter.zero_()
        self.ring[0, 0].copy_(self._pool.latents[0])
        if self._noise is not None:
            for step, drawn in enumerate(self._table.noise_drawn):
                if drawn:
                    draw(self._noise[step], generator)
        self.enter(0)

    def latents(self, step: int) -> Tensor:
        """Where a step leaves its result, and the next ones overwrite it."""
        return self.ring[(step + 1) % len(self.ring), 0]

    def enter(self, step: int) -> None:
        """Write a step's inputs, out of the latents before it."""
        for call in self._enters[step]:
            call()

    def whole(self) -> list[Call]:
        """Every call of the run; the steps' numbers lie in memory."""
        steps = range(self._plan.num_steps)
        updates = [self._update(self._guided[step], self._numbers[step, :1]) for step in steps]
        turns = [step > 0 and self._guided[step] != self._guided[step - 1] for step in steps]
        return [
            call
            for step in steps
            for call in (*(self._enters[step] if turns[step] else self._scale(step)), *self._calls(step, updates[step]))
        ]

    def single(self, step: int) -> list[Call]:
        """The calls of one step after `enter`; the device counts it, so they are the same for all steps of its kind."""
        return [*self._calls(step, self._counted[self._guided[step]]), partial(self._counter.add_, 1)]

    def kind(self, step: int) -> Hashable:
        """Steps of one kind make the same calls."""
        apart = step if self._plan.forecast is not None else None  # a forecast's weights are numbers of its calls
        return self._plan.branches[step], self._guided[step], apart

    def engines(self) -> list[Call]:
        """Each engine that the plan runs, once."""
        keys = dict.fromkeys(zip(self._plan.branches, self._guided, strict=True))
        return [self._pool.binding(*key).run for key in keys]

    def _update(self, guided: bool, number: Tensor) -> GuidanceStep:
        tensors = self._pool.rows(guided).tensors
        return GuidanceStep(
            tensors["noise_pred"],
            self.ring,
            self._tables,
            number,
            tensors["sample"],
            tensors["timestep"],
            rescale=self._rescale,
            noise=self._noise,
        )

    def _calls(self, step: int, update: GuidanceStep) -> list[Call]:
        return [
            *self._before.get(step, ()),
            self._pool.binding(self._plan.branches[step], self._guided[step]).run,
            *self._after.get(step, ()),
            update.run,
        ]

    def _enter(self, step: int) -> list[Call]:
        rows, latents = self._pool.rows(self._guided[step]), self.ring[step % len(self.ring), 0]
        timestep = rows.tensors["timestep"]
        return [
            partial(
                torch.mul, latents.expand_as(rows.model_input), self._tables.input_scales[step], out=rows.model_input
            ),
            partial(timestep.copy_, self._tables.timesteps[step].expand_as(timestep)),
            *self._scale(step),
        ]

    def _scale(self, step: int) -> list[Call]:
        """Write the ControlNet's scale, where it changes from step to step."""
        if self._scales is None:
            return []
        scale = self._pool.rows(self._guided[step]).tensors["conditioning_scale"]
        return [partial(scale.copy_, self._scales[step].expand_as(scale))]


@dataclass
class Recorded:
    """A loop, what of it has been recorded (under None the whole, else a kind of step), and the bindings it runs."""

    loop: DeviceLoop
    bindings: list[Binding]
    launches: dict[Hashable, Callable[[], object]] = field(default_factory=dict)

    def launch(self, recorder: Recorder, kind: Hashable, calls: Callable[[], Sequence[Call]]) -> Callable[[], object]:
        """A recording, made when it is first asked for."""
        if not self.launches:
            recorder.warm_up(self.loop.engines())
        if kind not in self.launches:
            self.launches[kind] = recorder.record(calls())
        return self.launches[kind]


def denoise_captured(
    recorder: Recorder,
    pool: BufferPool,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    *,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    conditioning_scales: Scales | None = None,
    generator: Generators = None,
    stepwise: bool = False,
) -> Iterator[Step]:
    """As `denoise`, out of recordings: of the whole run, yielding its last step only, or with `stepwise` of each step.

    All noise is drawn before the first step. Between two steps the latents may be written to.

    Raises: `ValueError` as `denoise`, and for a sampler without a table; `BackendUnavailable` for engines that cannot
    be recorded.
    """
    if isinstance(sampler, ScheduledSampler):
        raise ValueError("expected a sampler with a table for a CUDA graph, got a scheduler's own step; use denoise")
    if plan.num_steps != sampler.num_calls:
        raise ValueError(
            f"expected a plan for the sampler's {sampler.num_calls} U-Net calls, got one for {plan.num_steps}"
        )
    recorded = _recorded(recorder, pool, sampler, plan, guidance_rescale, conditioning_scales is not None)
    loop, steps = recorded.loop, range(plan.num_steps)
    if stepwise:
        launches = [recorded.launch(recorder, loop.kind(step), partial(loop.single, step)) for step in steps]
    else:
        launches = [recorded.launch(recorder, None, loop.whole)]
    loop.begin(guidance_scale, generator, conditioning_scales)
    return _launched(pool, pool.run, loop, launches, sampler.timesteps.tolist(), plan)


def _launched(
    pool: BufferPool,
    run: int,
    loop: DeviceLoop,
    launches: Sequence[Callable[[], object]],
    timesteps: Sequence[float],
    plan: CachePlan,
) -> Iterator[Step]:
    first = plan.num_steps - len(launches)  # a whole run's one launch ends with the last step
    for step, launch in enumerate(launches, first):
        if pool.run != run:
            raise RuntimeError("a newer run has taken this one's buffers; finish or drop a stream before the next call")
        launch()
        yield Step(step, timesteps[step], plan.is_full(step), loop.latents(step))
        if step + 1 < plan.num_steps:
            loop.enter(step + 1)  # always: torch does not count what is written to a tensor in inference mode


def _recorded(
    recorder: Recorder, pool: BufferPool, table: SamplerTable, plan: CachePlan, rescale: float, scaled: bool
) -> Recorded:
    """The recordings of these very bindings and addresses, or a new place for them; the oldest give way."""
    keys = {(branch, plan.is_guided(step)): None for step, branch in enumerate(plan.branches)}
    bindings = [pool.binding(*key) for key in keys]
    for binding in bindings:
        if not recorder.capturable(binding):
            raise BackendUnavailable(
                f"expected engines that a CUDA graph can hold (tensorrt, inductor), got {type(binding).__name__}; "
                "load without cuda_graph"
            )
    addresses = [tensor.data_ptr() for _, guided in keys for tensor in pool.rows(guided).tensors.values()]
    schedule = plan.branches, plan.unguided_steps, plan.forecast
    key = id(recorder), table, schedule, rescale, scaled, tuple(map(id, bindings)), tuple(addresses)
    kept = pool.recorded
    found = kept.pop(key, None) or Recorded(DeviceLoop(pool, table, plan, rescale, scaled), bindings)
    kept[key] = found  # the newest comes last
    while len(kept) > _KEPT:
        kept.pop(next(iter(kept)))
    return found
