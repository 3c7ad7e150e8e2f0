"""The loop in compiled C against the loop in PyTorch's operations: samplers, guidance, what is written in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cpu_library
from fastcache import CachePlan, compile_sampler
from fastcache.bundle.manifest import PassEntry
from fastcache.loop import steps as loop_steps
from fastcache.loop.drivers import Guidance
from fastcache.loop.drivers.c import CDriver
from fastcache.loop.drivers.pytorch import TorchDriver
from fastcache.loop.lane import Lane
from fastcache.loop.scheduled import ScheduledSampler
from fastcache.loop.steps import PlainRun, Step, driver_of
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler
from fastcache_engines import TensorSpec
from fastcache_kernels.cpu_step import Library
from fastcache_kernels.launch import KernelError

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STEPS, IMAGES = 9, 2
PASSES = {
    "full": PassEntry(engines=("full",), takes=(), stores=("cached_feature",)),
    "shallow-0": PassEntry(engines=("shallow-0",), takes=("cached_feature",), stores=()),
}
Use = Callable[[bool], None]


@pytest.fixture(scope="module")
def library(_shared_folder: Path) -> Library:
    return cpu_library.build(_shared_folder / "cpu-library")


@pytest.fixture
def use(library: Library, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes the loop find the C, or none."""

    def choose(compiled: bool) -> None:
        monkeypatch.setattr(loop_steps, "found_library", lambda: library if compiled else KernelError("not to be used"))

    return choose


class RowsEngine:
    """Predicts something else for each row, out of its sample, its timestep and the row's number."""

    def __init__(self, *, stores: bool, dtype: str = "float32") -> None:
        feature = (TensorSpec("cached_feature", "float32", ("batch", 2, 3, 5)),)
        latents = TensorSpec("sample", dtype, ("batch", 6, 3, 5))  # two channels more than the latents have
        self.inputs = (latents, TensorSpec("timestep", "float32", ("batch",)), *(() if stores else feature))
        self.outputs = (TensorSpec("noise_pred", dtype, ("batch", 4, 3, 5)), *(feature if stores else ()))

    def bind(self, tensors: Mapping[str, Tensor]) -> RowsBinding:
        return RowsBinding(tensors)


class RowsBinding:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def run(self) -> None:
        sample, timestep, out = (self.tensors[name] for name in ("sample", "timestep", "noise_pred"))
        scale = 0.3 + 0.1 * torch.arange(len(out), device=out.device).flip(0)
        own = (scale + timestep / 1e4).view(-1, 1, 1, 1)
        out.copy_(own * sample[:, :4] + 0.05 * sample[:, :4].flip(2, 3) + 0.02 * scale.view(-1, 1, 1, 1))


def lane_of(halves: int, dtype: str = "float32") -> Lane:
    engines = {name: RowsEngine(stores=name == "full", dtype=dtype) for name in PASSES}
    lane = Lane(engines, PASSES, images=IMAGES, halves=halves, channels=4)
    lane.set_inputs({})
    return lane


def begun(run: PlainRun) -> PlainRun:
    run.latents.normal_(generator=torch.Generator().manual_seed(0))
    return run


def steps_of(
    sampler: str, *, halves: int = 2, within: tuple[int, int] | None = None, **options: float
) -> Iterator[Step]:
    table = compile_sampler(make_scheduler(sampler, CONFIG), STEPS)
    plan = CachePlan.uniform(table.num_calls, 3)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    plan = plan if within is None else plan.guided_within(*within)
    guidance = Guidance(3.0, options.get("guidance_rescale", 0.0), options.get("image_guidance_scale", 0.0))
    return begun(PlainRun(lane_of(halves), table, plan, guidance, generator=generators)).steps


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    assert len(got) == len(expected)
    for own, other in zip(got, expected, strict=True):
        assert float((own - other).abs().max() / other.abs().max()) < tolerance


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"plms"}))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_rescale": 0.7},
        {"within": (3, 7), "guidance_rescale": 0.7},
        {"halves": 1},
        {"halves": 3, "image_guidance_scale": 1.5},
    ],
    ids=["guided", "rescaled", "interval", "unguided", "three parts"],
)
def test_every_step_of_every_sampler(sampler: str, options: dict[str, float], use: Use) -> None:
    results = list[list[Tensor]]()
    for compiled in (True, False):
        use(compiled)
        results.append([step.latents.clone() for step in steps_of(sampler, **options)])
    assert_same(*results)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++_2m", "euler_a"])
def test_what_is_written_between_steps_counts(sampler: str, use: Use) -> None:
    """For the next input as for the updates that look back on it, as a callback or a mask has it."""
    results = dict[tuple[bool, bool], list[Tensor]]()
    for compiled in (True, False):
        use(compiled)
        for writes in (True, False):
            own = results[compiled, writes] = []
            for step in steps_of(sampler):
                if writes and step.index in (2, 3, 6):
                    step.latents.mul_(0.5).add_(0.1)
                own.append(step.latents.clone())
    assert_same(results[True, True], results[False, True])
    assert float((results[True, True][-1] - results[True, False][-1]).abs().max()) > 1e-2


def test_a_step_is_three_calls(use: Use) -> None:
    """The engine's, one before it and one after it; a stochastic sampler's noise is a fourth."""
    use(True)
    for sampler, after in (("dpm++_2m", 1), ("euler_a", 2)):
        table = compile_sampler(make_scheduler(sampler, CONFIG), STEPS)
        run = PlainRun(lane_of(2), table, CachePlan.uniform(STEPS, 3), Guidance(3.0, 0.7))
        assert {(len(turn.input), len(turn.update)) for turn in run.turns} == {(1, after)}


def test_what_the_c_is_not_for(use: Use) -> None:
    """Other dtypes and schedulers that run themselves; and where there is none."""
    table, guidance = compile_sampler(make_scheduler("ddim", CONFIG), STEPS), Guidance(3.0)
    scheduler = make_scheduler("ddim", CONFIG)
    scheduler.set_timesteps(STEPS)
    lane, narrow = lane_of(2), lane_of(2, "bfloat16")
    use(True)
    assert isinstance(driver_of(lane, table, guidance, None), CDriver)
    assert isinstance(driver_of(lane, ScheduledSampler(scheduler, {}), guidance, None), TorchDriver)
    assert isinstance(driver_of(narrow, table, guidance, None), TorchDriver)
    *_, last = begun(PlainRun(narrow, table, CachePlan.uniform(STEPS, 3), guidance)).steps
    assert last.latents.isfinite().all()
    use(False)
    assert isinstance(driver_of(lane, table, guidance, None), TorchDriver)


@given(st.sampled_from((4, 64, 1000, 20000)), st.floats(-30, 30), st.floats(0.1, 1.0), st.integers(0, 100))
def test_rescaling_in_pytorchs_operations(size: int, mean: float, rescale: float, seed: int) -> None:
    """The deviations without torch.std, in float32, against torch.std in float64."""
    spec = TensorSpec("sample", "float32", ("batch", 1, 1, size))
    engine = type("Engine", (), {"inputs": (spec, TensorSpec("timestep", "float32", ("batch",)))})()
    engine.outputs = (TensorSpec("noise_pred", "float32", ("batch", 1, 1, size)),)
    passes = {"full": PassEntry(engines=("full",), takes=(), stores=())}
    lane = Lane({"full": engine}, passes, images=2, halves=2, channels=1)
    noise_pred = lane.tensors["noise_pred"].normal_(generator=torch.Generator().manual_seed(seed)).add_(mean)
    table = compile_sampler(make_scheduler("ddim", CONFIG), 1)
    driver = TorchDriver(lane, table, Guidance(7.5, rescale), None)
    for call in driver.turn(0, lane.rows()).update:
        call()
    unconditional, conditional = noise_pred.double().split(2)
    plain = torch.lerp(unconditional, conditional, 7.5)
    factor = conditional.flatten(1).std(1) / plain.flatten(1).std(1)
    expected = plain * (rescale * factor + 1 - rescale)[:, None, None, None]
    assert float((driver.ring[0, 1].double() - expected).abs().max() / expected.abs().max()) < 1e-5
