"""The loop with all numbers on the device, recorded in pieces or whole, against the loop step by step."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcache
import fastcache_engines
from eager_engines import GUIDANCE, generators, plain_run, refill, small_lane, start
from fastcache import BackendUnavailable, Bundle, CachePlan, Forecast, SamplerTable, compile_sampler
from fastcache.loop.drivers import Call, Guidance
from fastcache.loop.drivers.cudagraph import CapturedRun, CudaRecorder, Recorder
from fastcache.loop.fit import Fit
from fastcache.loop.fitted import fitted_table
from fastcache.loop.lane import Lane
from fastcache.loop.scheduled import ScheduledSampler
from fastcache.loop.steps import Step
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler
from list_recorder import ListRecorder

pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STEPS = 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def table_of(sampler: str) -> SamplerTable:
    return compile_sampler(make_scheduler(sampler, CONFIG), STEPS)


def recorder_of(device: str) -> Recorder:
    return CudaRecorder() if device == "cuda" else ListRecorder()


def run(recorder: Recorder | None, lane: Lane, table: SamplerTable, plan: CachePlan, **options: Any) -> Iterator[Step]:
    refill(lane)
    options = {"guidance_scale": 3.0, "generator": generators()} | options
    if recorder is None:
        return plain_run(lane, table, plan, **options).steps
    guidance = Guidance(*(options.pop(name, usual) for name, usual in GUIDANCE.items()))
    captured = CapturedRun(recorder, lane, table, plan, guidance, **options)
    captured.latents.copy_(start()).mul_(table.init_noise_sigma)
    return captured.steps


def last(steps: Iterator[Step]) -> Tensor:
    *_, step = steps
    return step.latents.clone()


def check(
    sampler: str, plan_of: Callable[[int], CachePlan], device: str, *, halves: int = 2, rescale: float = 0.0
) -> None:
    table = table_of(sampler)
    check_table(table, plan_of(table.num_calls), device, halves=halves, rescale=rescale)


def check_table(table: SamplerTable, plan: CachePlan, device: str, *, halves: int = 2, rescale: float = 0.0) -> None:
    lane, recorder = small_lane(halves=halves, device=device), recorder_of(device)
    expected = [step.latents.clone() for step in run(None, lane, table, plan, guidance_rescale=rescale)]
    scale = float(expected[-1].abs().max())
    whole = list(run(recorder, lane, table, plan, guidance_rescale=rescale))
    assert [step.index for step in whole] == [table.num_calls - 1]
    assert float((whole[0].latents - expected[-1]).abs().max()) < 2e-4 * scale
    stepwise = run(recorder, lane, table, plan, guidance_rescale=rescale, stepwise=True)
    for step, wanted in zip(stepwise, expected, strict=True):
        assert (step.full, step.timestep) == (plan.is_full(step.index), float(table.timesteps[step.index]))
        assert float((step.latents - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"plms"}))
def test_every_sampler(sampler: str, device: str) -> None:
    check(sampler, lambda calls: CachePlan.uniform(calls, 3), device)


PLANS: dict[str, Callable[[int], CachePlan]] = {
    "all full": CachePlan.all_full,
    "interval": lambda calls: CachePlan.uniform(calls, 3).guided_within(3, 6),
    "depths": lambda calls: CachePlan.from_branches((None, 2, 0, None, 5, 2, 0, 0)),
    "forecast": lambda calls: replace(CachePlan.uniform(calls, 2), forecast=Forecast(2)),
    "all": lambda calls: CachePlan.from_branches((None, 2, None, 5, 2, 0, None, 0), forecast=Forecast(1)).guided_within(
        2, 7
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_plan(name: str, halves: int, device: str) -> None:
    check("dpm++_2m_sde", PLANS[name], device, halves=halves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("contrasts", [(), ((0.1,), (), (0.2, -0.1), (0.0, 0.1, -0.2))])
def test_a_fitted_plan(contrasts: tuple[tuple[float, ...], ...], halves: int, device: str) -> None:
    """Four points of eight calls, by rows that look back over up to three of them."""
    rows = ((0.9, -0.1), (0.1, 0.02, 0.7, -0.2), (0.0, 0.1, -0.1, 0.05, 0.8, -0.3), (0.0, 0.1, 1.1, -0.2))
    fit = Fit(STEPS, (0, 2, 3, 6), rows, 3.0, 64, 64, "0" * 64, "inductor", "fp32", 4)
    fit = replace(fit, contrasts=contrasts)
    plan = CachePlan(("full", "shallow-0", "full", "shallow-0"), sampler="ddim", fit=fit)
    check_table(fitted_table(table_of("ddim"), fit), plan, device, halves=halves)


@pytest.mark.parametrize("device", DEVICES)
def test_rescaled_guidance(device: str) -> None:
    check("ddim", PLANS["interval"], device, rescale=0.7)


@pytest.mark.parametrize("device", DEVICES)
def test_latents_written_between_two_steps_are_taken_up(device: str) -> None:
    table, plan = table_of("dpm++_2m"), CachePlan.uniform(STEPS, 3)
    lane, recorder, results = small_lane(device=device), recorder_of(device), list[Tensor]()
    for used in (None, recorder):
        options = {} if used is None else {"stepwise": True}
        steps = run(used, lane, table, plan, **options)
        for step in islice(steps, 4):
            if step.index == 3:
                step.latents.mul_(0.5)
        results.append(last(steps))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    assert float((results[0] - last(run(None, lane, table, plan))).abs().max()) > 0.01


class ForgetfulRecorder(ListRecorder):
    """As a graph does, it keeps nothing of the calls that it recorded; what nobody else keeps is gone at a replay."""

    def record(self, calls: Sequence[Call]) -> Any:
        self.recordings += 1
        kept = [weakref.WeakMethod(call) if inspect.ismethod(call) else weakref.ref(call) for call in calls]

        def launch() -> None:
            for kept_call in kept:
                call = kept_call()
                assert call is not None, "what a graph writes to is gone"
                call()

        return launch


@pytest.mark.parametrize("stepwise", [False, True])
def test_what_was_recorded_keeps_its_memory(stepwise: bool) -> None:
    lane, table, plan = small_lane(), table_of("dpm++_2m"), PLANS["interval"](STEPS)
    expected = last(run(None, lane, table, plan, guidance_rescale=0.7))
    recorder = ForgetfulRecorder()
    for _ in range(2):
        gc.collect()
        drawn = last(run(recorder, lane, table, plan, guidance_rescale=0.7, stepwise=stepwise))
        torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)


def test_a_recording_serves_every_run_with_its_plan_sampler_and_addresses() -> None:
    recorder, table, plan = ListRecorder(), table_of("ddim"), CachePlan.uniform(STEPS, 3)
    lane = small_lane()
    first = last(run(recorder, lane, table, plan))
    other = last(run(recorder, lane, table, replace(plan, made_by="again"), guidance_scale=6.0))
    assert (recorder.recordings, recorder.warm_ups) == (1, 1)
    assert float((first - other).abs().max()) > 1e-3
    torch.testing.assert_close(other, last(run(None, lane, table, plan, guidance_scale=6.0)), rtol=1e-4, atol=1e-4)

    last(run(recorder, lane, table, CachePlan.uniform(STEPS, 2)))
    last(run(recorder, lane, table_of("ddim"), plan))
    last(run(recorder, lane, table, plan, guidance_rescale=0.5))
    assert recorder.recordings == 4
    last(run(recorder, small_lane(), table, plan))
    assert recorder.recordings == 5
    lane._bindings.clear()  # what is bound anew may read other addresses
    last(run(recorder, lane, table, plan))
    assert recorder.recordings == 6
    assert torch.equal(last(run(recorder, lane, table, plan)), first)
    assert recorder.recordings == 6


def test_a_lane_keeps_few_recordings() -> None:
    recorder, table, lane = ListRecorder(), table_of("ddim"), small_lane()
    for interval in (1, 2, 3, 4, 5, 6, 7, 8):
        last(run(recorder, lane, table, CachePlan.uniform(STEPS, interval)))
    last(run(recorder, lane, table, CachePlan.from_refresh_steps(STEPS, (0, 1))))
    assert len(lane.recorded) == 8
    last(run(recorder, lane, table, CachePlan.uniform(STEPS, 8)))
    assert recorder.recordings == 9
    last(run(recorder, lane, table, CachePlan.uniform(STEPS, 1)))
    assert recorder.recordings == 10


@pytest.mark.parametrize(
    ("plan", "kinds"),
    [
        (CachePlan.uniform(STEPS, 3), 2),
        (CachePlan.uniform(STEPS, 3).guided_within(3, 6), 4),
        (CachePlan.from_branches((None, 2, 0, None, 2, 2, 0, 0)), 3),
    ],
)
def test_steps_of_a_kind_share_a_recording(plan: CachePlan, kinds: int) -> None:
    recorder = ListRecorder()
    last(run(recorder, small_lane(), table_of("unipc"), plan, stepwise=True))
    assert recorder.recordings == kinds


def test_a_run_that_lost_its_buffers_stops() -> None:
    recorder, table, plan, lane = ListRecorder(), table_of("ddim"), CachePlan.uniform(STEPS, 3), small_lane()
    old = run(recorder, lane, table, plan, stepwise=True)
    next(old)
    new = run(recorder, lane, table, plan, stepwise=True)
    with pytest.raises(RuntimeError, match="a newer run"):
        next(old)
    assert len(list(new)) == STEPS


def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lane, plan = small_lane(), CachePlan.uniform(STEPS, 3)
    with pytest.raises(ValueError, match="8 U-Net calls, got one for 9"):
        run(ListRecorder(), lane, table_of("ddim"), CachePlan.uniform(STEPS + 1, 3))
    scheduler = make_scheduler("ddim", CONFIG)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="expected a sampler with a table"):
        CapturedRun(ListRecorder(), lane, ScheduledSampler(scheduler, {}), plan)
    monkeypatch.setattr("eager_engines.EagerBinding.capturable", lambda self: False)
    with pytest.raises(BackendUnavailable, match="got EagerBinding; load without cuda_graph"):
        run(ListRecorder(), lane, table_of("ddim"), plan)


def test_a_bundle_for_the_cpu_has_no_cuda_graph(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="expected a bundle for a GPU with cuda_graph, got one for cpu"):
        fastcache.load(tiny_bundle.path, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["inductor", "tensorrt", "tensorrt-rtx"])
def test_engines_of_a_bundle_in_one_graph(backend: str, tmp_path: Path) -> None:
    support = fastcache_engines.backend(backend).support("cuda")
    if not (support.can_build and support.can_run):
        pytest.skip(support.reason)
    bundle = fastcache.build_engines("demo", output=tmp_path / "engines", backend=backend, device="cuda")
    plain, graphs = fastcache.load(bundle.path), fastcache.load(bundle.path, cuda_graph=True)
    plan = CachePlan.uniform(20, 3).guided_within(3, 15)
    for prompt in ("a large red circle", "a small blue ring"):  # the second out of the first one's recording
        drawn = [
            pipe(
                prompt,
                num_inference_steps=20,
                plan=plan,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images
            for pipe in (plain, graphs)
        ]
        torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_kernels_themselves_in_tritons_interpreter() -> None:
    """The same tests in a process where `GuidanceStep` launches its kernel, which here only the interpreter can run."""
    pytest.importorskip("triton")
    chosen = [f"{__file__}::test_every_kind_of_plan[all-2-cpu]", f"{__file__}::test_rescaled_guidance[cpu]"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen],
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert "2 passed" in result.stdout
