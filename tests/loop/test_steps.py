"""The loop over engines that compute next to nothing: which of them runs, what it allocates, whose buffers it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cpu_library
import fastcache
from fastcache import CachePlan, Forecast, SamplerTable, compile_sampler
from fastcache.bundle.manifest import PassEntry
from fastcache.loop.drivers import Guidance
from fastcache.loop.lane import Lane
from fastcache.loop.steps import PlainRun, Step
from fastcache.sampler.scheduler import make_scheduler
from fastcache_engines import TensorSpec

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SAMPLE = TensorSpec("sample", "float32", ("batch", 4, 8, 8))
TIMESTEP = TensorSpec("timestep", "float32", ("batch",))
NOISE_PRED = TensorSpec("noise_pred", "float32", ("batch", 4, 8, 8))
FEATURE = TensorSpec("cached_feature", "float32", ("batch", 16, 8, 8))
STEPS = 12
PASSES = {
    "full": PassEntry(engines=("full",), takes=(), stores=("cached_feature",)),
    "shallow-0": PassEntry(engines=("shallow-0",), takes=("cached_feature",), stores=()),
}


@pytest.fixture(autouse=True, params=["compiled", "composed"])
def own_work(request: pytest.FixtureRequest, _shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's own work in compiled C, and in PyTorch's operations."""
    cpu_library.choose(request.param, _shared_folder, monkeypatch, "fastcache.loop.steps")


class FakeEngine:
    """Predicts a tenth of its sample, and writes down when it ran and at which timestep."""

    def __init__(self, name: str, calls: list[tuple[str, float]]) -> None:
        stores = name == "full"
        self.name, self.calls = name, calls
        self.inputs = (SAMPLE, TIMESTEP) if stores else (SAMPLE, TIMESTEP, FEATURE)
        self.outputs = (NOISE_PRED, FEATURE) if stores else (NOISE_PRED,)

    def bind(self, tensors: Mapping[str, Tensor]) -> FakeBinding:
        return FakeBinding(self, {spec.name: tensors[spec.name] for spec in (*self.inputs, *self.outputs)})


class FakeBinding:
    def __init__(self, engine: FakeEngine, tensors: dict[str, Tensor]) -> None:
        self.engine, self.tensors = engine, tensors
        self.tenth = torch.tensor(0.1)

    def run(self) -> None:
        self.engine.calls.append((self.engine.name, float(self.tensors["timestep"][0])))
        torch.mul(self.tensors["sample"], self.tenth, out=self.tensors["noise_pred"])


class Loop:
    """Two images through the loop: the pool, the sampler and the engines' calls."""

    def __init__(self, sampler: str, *, guided: bool = True, steps: int = STEPS) -> None:
        self.calls: list[tuple[str, float]] = []
        engines = {name: FakeEngine(name, self.calls) for name in ("full", "shallow-0")}
        self.table: SamplerTable = compile_sampler(make_scheduler(sampler, CONFIG), steps)
        self.lane = Lane(engines, PASSES, images=2, halves=1 + guided, channels=4)

    def run(self, plan: CachePlan, *, rescale: float = 0.0) -> Iterator[Step]:
        self.lane.set_inputs({})
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        run = PlainRun(self.lane, self.table, plan, Guidance(7.5, rescale), generator=generators)
        run.latents.normal_(generator=torch.Generator().manual_seed(0))
        return run.steps


def allocations(work: Callable[[], Any]) -> list[int]:
    """The bytes of every allocation that torch makes meanwhile, also those freed again within one operation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events: Any = record.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


THIRDS = CachePlan.uniform(STEPS, 3)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++_2m", "euler_a", "unipc"])
@pytest.mark.parametrize(
    ("plan", "rescale"),
    [
        (THIRDS, 0.0),
        (THIRDS, 0.7),
        (THIRDS.guided_within(3, 9), 0.7),
        (replace(THIRDS, forecast=Forecast(2)).guided_within(3, 9), 0.0),
    ],
    ids=["plain", "rescale", "interval", "forecast"],
)
def test_a_step_allocates_nothing(plan: CachePlan, rescale: float, sampler: str, guided: bool) -> None:
    steps = Loop(sampler, guided=guided).run(plan, rescale=rescale)
    next(steps)
    assert allocations(lambda: list(islice(steps, 10))) == []


def test_an_allocation_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeBinding.run
    monkeypatch.setattr(FakeBinding, "run", lambda self: (torch.empty(10), run(self)))
    steps = Loop("ddim").run(CachePlan.uniform(STEPS, 3))
    next(steps)
    assert allocations(lambda: list(islice(steps, 9))) == [40] * 9
    assert allocations(lambda: torch.zeros(10).mul(2.0)) != []


def test_what_the_full_engine_stores_is_what_the_shallow_one_reads() -> None:
    lane: Any = Loop("ddim").lane
    (full,), (shallow,) = lane.bindings("full"), lane.bindings("shallow-0")
    for name in ("cached_feature", "sample", "timestep", "noise_pred"):
        assert full.tensors[name].data_ptr() == shallow.tensors[name].data_ptr() == lane.tensors[name].data_ptr()


def test_a_bundles_engines_share_the_feature_too(demo_bundle: Callable[[int], fastcache.Bundle]) -> None:
    """Whatever the full engine writes to the one buffer there is, the shallow one takes."""
    lane = fastcache.load(demo_bundle(0).path).runtime.lane(images=1, guided=True)
    lane.set_inputs({"encoder_hidden_states": torch.zeros(2, 32, 128)})
    lane.call("full")()
    expected = lane.tensors["noise_pred"].clone()
    lane.call("shallow-0")()
    torch.testing.assert_close(lane.tensors["noise_pred"], expected)
    lane.tensors["cached_feature"].neg_()
    lane.call("shallow-0")()
    assert not torch.allclose(lane.tensors["noise_pred"], expected, atol=1e-2)


@pytest.mark.parametrize(("sampler", "num_calls"), [("ddim", STEPS), ("heun", 2 * STEPS - 1), ("pndm", STEPS + 1)])
def test_the_plan_says_which_engine_a_call_runs(sampler: str, num_calls: int) -> None:
    loop = Loop(sampler)
    refreshes = (0, 1, 5, 9)
    steps = list(loop.run(CachePlan.from_refresh_steps(num_calls, refreshes)))
    assert [name for name, _ in loop.calls] == ["full" if i in refreshes else "shallow-0" for i in range(num_calls)]
    assert [timestep for _, timestep in loop.calls] == pytest.approx(loop.table.timesteps.tolist())
    assert [step.full for step in steps] == [i in refreshes for i in range(num_calls)]
    assert [step.index for step in steps] == list(range(num_calls))


def test_the_engines_see_scaled_latents_once_for_each_half() -> None:
    loop = Loop("euler")
    steps = loop.run(CachePlan.all_full(STEPS))
    sample, step = loop.lane.tensors["sample"], next(steps)
    for i in range(1, 4):
        before = step.latents.clone()
        step = next(steps)
        torch.testing.assert_close(sample, torch.cat([before, before]) * loop.table.input_scale[i].float())


def test_a_plan_of_another_length_is_refused_at_once() -> None:
    loop = Loop("heun")
    with pytest.raises(ValueError, match=f"{2 * STEPS - 1} U-Net calls, got one for {STEPS}"):
        loop.run(CachePlan.uniform(STEPS, 3))
    assert loop.calls == []


def test_old_noise_and_old_features_do_not_reach_a_new_run() -> None:
    """A longer stochastic run leaves noise where a multistep sampler's rows are read with weight 0."""
    used, fresh = Loop("dpm++_2m"), Loop("dpm++_2m")
    used.lane.ring(5).normal_()
    plan = CachePlan.uniform(STEPS, 3)
    *_, expected = fresh.run(plan)
    *_, result = used.run(plan)
    assert torch.equal(result.latents, expected.latents)
    used.lane.set_inputs({})
    assert used.lane.tensors["cached_feature"][:, 0].isnan().all()


@pytest.mark.parametrize("taken", [0, 1])
def test_a_run_that_lost_its_buffers_stops(taken: int) -> None:
    loop = Loop("ddim")
    old = loop.run(CachePlan.uniform(STEPS, 3))
    assert len(list(islice(old, taken))) == taken
    new = loop.run(CachePlan.uniform(STEPS, 3))
    with pytest.raises(RuntimeError, match="a newer run"):
        next(old)
    assert len(list(new)) == STEPS
