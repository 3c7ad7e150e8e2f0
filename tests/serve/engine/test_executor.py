"""Parity: an image is the same alone, in company and from the pipeline, whatever its neighbours do; and memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cpu_library
import fastcache
from build_store import BuildStore
from fastcache import Bundle, CachePlan, FastCachePipeline
from fastcache.evaluate.quality import psnr_db
from fastcache.loop.adjustment import ScaleShift
from fastcache.loop.fit import Fit
from fastcache.loop.plan import Forecast
from fastcache.loop.streams import Streams
from fastcache.pipeline.arguments import plan_for, terms_of
from fastcache.pipeline.request import Request
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler
from fastcache.sampler.table import compile_sampler
from fastcache.serve.engine.device import is_out_of_memory
from fastcache.serve.engine.executor import Executor
from fastcache.serve.engine.order import Drawing
from fastcache.serve.engine.scheduler import Batch, Image, Job, Scheduler
from tiny_model import save_tiny_sdxl

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

SAMPLER_CYCLE = ["ddim", "euler_a", "dpm++_2m", "pndm", "unipc", "heun", "ddpm", "lms"]


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Bundle) -> FastCachePipeline:
    return fastcache.load(tiny_bundle.path, threads=1)


@pytest.fixture(scope="module", params=[1, 2], ids=["in batches", "in streams"])
def executor(pipe: FastCachePipeline, request: pytest.FixtureRequest) -> Executor:
    """Images in company share an engine call, or each has one of its own, two at once."""
    return Executor(pipe, 4, threads=request.param)


@pytest.fixture(params=["compiled", "composed"])
def own_work(request: pytest.FixtureRequest, _shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's own work in compiled C, and in PyTorch's operations."""
    cpu_library.choose(request.param, _shared_folder, monkeypatch, "fastcache.loop.steps")


def wish(k: int, **changes: Any) -> dict[str, Any]:
    """The kth of many different requests."""
    return {
        "prompt": "abcdefgh"[: 1 + k % 6],
        "negative_prompt": "x" if k % 3 == 0 else "",
        "guidance_scale": (7.5, 1.0, 3.0, 5.0)[k % 4],
        "seed": k,
        "sampler": SAMPLER_CYCLE[k % len(SAMPLER_CYCLE)],
        "num_inference_steps": 3 + k % 5,
        "interval": 1 + k % 4,
        **changes,
    }


def job_of(executor: Executor, k: int, **changes: Any) -> Job:
    fields = wish(k, **changes)
    interval, unguided = fields.pop("interval"), fields.pop("unguided", (0, 0))
    forecast, given = fields.pop("forecast", None), fields.pop("plan", None)
    manifest = executor.pipe.bundle.manifest
    schedule = executor.schedule(fields["sampler"], fields["num_inference_steps"])
    plan = CachePlan.uniform(schedule.sampler.num_calls, interval, manifest.branch_id)
    plan = given or replace(plan, unguided_steps=tuple(range(*unguided)), forecast=forecast)
    request = Request(**fields)
    terms = terms_of(request, manifest)
    drawing = Drawing(request, terms, fields["seed"], schedule, plan)
    return Job(f"{k}", 0, str(terms.size), plan, terms.guided, 1, 1e9, drawing)


def drawn(executor: Executor, jobs: Sequence[Job], *, apart: int = 0, slots: int = 0) -> dict[str, Tensor]:
    """The latents of jobs that start `apart` turns after each other, by the scheduler's decisions."""
    scheduler, latents, turn, coming = Scheduler(queue=100), dict[str, Tensor](), 0, list(jobs)
    scheduler.open(0, slots or executor.count)
    while coming or scheduler.jobs:
        while coming and turn >= apart * (len(jobs) - len(coming)):
            scheduler.reserve(1, 0)
            scheduler.add(coming.pop(0))
        for image in scheduler.admit():
            executor.fill(slot_of(image), image.job.content, image.index)
        batch = scheduler.next_batch()
        turn += 1
        if batch is None:
            continue
        run(executor, batch)
        for image in scheduler.advance(batch.images):
            if image.is_finished:
                latents[image.job.id] = executor.latents(slot_of(image)).clone().flatten(1)
                scheduler.finish(image)
    return latents


def slot_of(image: Image) -> int:
    assert image.slot is not None
    return image.slot


def run(executor: Executor, batch: Batch) -> None:
    steps = [(slot_of(image), image.step) for image in batch.images]
    executor.run(steps, name=batch.kind.name, guided=batch.kind.guided)


def from_pipeline(pipe: FastCachePipeline, k: int, plan: CachePlan | None = None, **changes: Any) -> Tensor:
    fields = wish(k, **changes)
    output = pipe(
        fields["prompt"],
        negative_prompt=fields["negative_prompt"],
        guidance_scale=fields["guidance_scale"],
        num_inference_steps=fields["num_inference_steps"],
        sampler=fields["sampler"],
        cache_interval=fields["interval"] if plan is None else None,
        plan=plan,
        generator=[torch.Generator().manual_seed(fields["seed"])],
        output_type="latent",
    )
    return output.images.clone().view(1, -1)


@pytest.mark.usefixtures("own_work")
@pytest.mark.parametrize("apart", [0, 1, 3])
def test_an_image_is_the_same_alone_in_company_and_from_the_pipeline(
    apart: int, executor: Executor, pipe: FastCachePipeline
) -> None:
    together = drawn(executor, [job_of(executor, k) for k in range(16)], apart=apart)
    for k in range(16):
        alone = drawn(executor, [job_of(executor, k)])[f"{k}"]
        assert alone.isfinite().all()
        assert psnr_db(alone, from_pipeline(pipe, k)) >= 100
        assert psnr_db(together[f"{k}"], alone) >= 100
    assert psnr_db(together["0"], together["8"]) < 40


@pytest.mark.usefixtures("own_work")
def test_steps_without_guidance_share_calls_too(executor: Executor, pipe: FastCachePipeline) -> None:
    """The last steps of two guided images run with those of one that has no guidance at all."""
    jobs = [job_of(executor, k, interval=1, unguided=(0, 0) if k == 1 else (2, 3)) for k in (0, 1, 6)]
    together = drawn(executor, jobs)
    for job in jobs:
        k = int(job.id)
        assert psnr_db(together[job.id], from_pipeline(pipe, k, job.plan)) >= 100
        if k != 1:
            assert psnr_db(together[job.id], from_pipeline(pipe, k)) < 60


FORECASTS = [None, Forecast(1), Forecast(2), Forecast(1, 0.5), Forecast(1, by="sigma"), Forecast(2, by="sigma")]


@pytest.mark.usefixtures("own_work")
@pytest.mark.parametrize("apart", [0, 2])
def test_forecasts_share_calls_with_plain_reuse(apart: int, executor: Executor, pipe: FastCachePipeline) -> None:
    """Guided and not, at different steps; images 4 and 5 go over to steps without guidance between two that store."""
    own: dict[str, Any] = {"num_inference_steps": 10, "sampler": "ddim"}
    jobs = [
        job_of(executor, k, **own, interval=2 + k % 3, unguided=(5, 10) if k in (4, 6) else (0, 0), forecast=forecast)
        for k, forecast in enumerate([*FORECASTS, Forecast(2)])
    ]
    together = drawn(executor, jobs, apart=apart)
    for job in jobs:
        k = int(job.id)
        assert psnr_db(together[job.id], from_pipeline(pipe, k, job.plan, **own)) >= 90
        if job.plan.forecast is not None:
            assert psnr_db(together[job.id], from_pipeline(pipe, k, replace(job.plan, forecast=None), **own)) < 70


@pytest.mark.usefixtures("own_work")
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_a_fitted_plan_shares_calls_with_others(
    guidance_scale: float, executor: Executor, pipe: FastCachePipeline
) -> None:
    manifest, points = pipe.bundle.manifest, (0, 2, 5, 7, 11)
    rows = tuple((1.0, 0.1) if k == 0 else (0.1, 0.02, 0.9, -0.3) for k in range(5))
    fit = Fit(12, points, rows, 4.0, manifest.height, manifest.width, manifest.weights_sha256, "any", "fp32", 4)
    fit = replace(fit, contrasts=((0.1,), (0.1, -0.1), (), (0.0, 0.1, -0.1), (0.05,)))
    passes = ("full", "shallow-0", "full", "shallow-0", "shallow-0")
    request = Request("a", guidance_scale=guidance_scale, seed=3, plan=CachePlan(passes, sampler="ddim", fit=fit))
    terms = terms_of(request, manifest)
    schedule = executor.schedule(terms.sampler_name, terms.steps)
    plan = plan_for(request, manifest, schedule.sampler.num_calls, terms.sampler)
    job = Job("fitted", 0, str(terms.size), plan, terms.guided, 1, 1e9, Drawing(request, terms, 3, schedule, plan))
    found = drawn(executor, [job_of(executor, 0), job, job_of(executor, 1)], apart=1)["fitted"]
    wanted = pipe("a", guidance_scale=guidance_scale, seed=3, plan=request.plan, output_type="latent").images
    assert psnr_db(found, wanted.reshape(1, -1)) >= 100
    plain = replace(plan, fit=replace(fit, contrasts=()))
    without = pipe("a", guidance_scale=guidance_scale, seed=3, plan=plain, output_type="latent").images
    assert (psnr_db(found, without.reshape(1, -1)) < 60) == terms.guided  # without guidance there is nothing to count


@pytest.mark.parametrize(
    ("threads", "backend"),
    [
        pytest.param(1, "onnxruntime", id="in batches"),
        pytest.param(2, "openvino", id="in streams", marks=pytest.mark.slow),
    ],
)
def test_patterns_of_blocks_share_calls_with_others(
    threads: int, backend: str, builds: BuildStore, tiny_model: Path
) -> None:
    """Each by its own scales and shifts, beside images without any, at other steps."""
    built = builds.bundle(tiny_model, backend=backend, blocks="transformer", branch_id="0,2")
    pipe = fastcache.load(built.path, threads=1)
    executor, channels = (
        Executor(pipe, 4, threads=threads),
        sum(block.channels for block in pipe.bundle.manifest.blocks),
    )
    passes = ("full", "blocks-1010", "blocks-0000", "shallow-0", "blocks-0111")
    plans = list[CachePlan]()
    for k in range(3):
        table = np.random.default_rng(k).normal(1, 0.2, (5, 2, channels))
        own = CachePlan((passes[0], *passes[1 + k :], *passes[1 : 1 + k]), scale_shift=ScaleShift.of(table))
        plans.append(own if k else replace(own, scale_shift=None))
    common: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 5}
    jobs = [job_of(executor, k, **common, plan=plan) for k, plan in enumerate(plans)]
    together = drawn(executor, jobs, apart=1)
    for k, job in enumerate(jobs):
        assert psnr_db(together[job.id], from_pipeline(pipe, k, job.plan, **common)) >= 100


def test_what_images_in_flight_take_is_bounded(pipe: FastCachePipeline) -> None:
    """Forecasts included, whatever plans come: of the highest order in all slots it is the bound, and no more."""
    executor = Executor(pipe, 3, threads=1)
    lanes = executor.lanes(pipe.bundle.manifest.sizes[0])
    before, every = lanes.held_bytes, executor.count + executor.express
    drawn(executor, [job_of(executor, k, interval=2) for k in range(every)], slots=every)
    plain = lanes.held_bytes
    assert before < plain < lanes.most_bytes
    for order in (1, 2, 1, 2):
        drawn(executor, [job_of(executor, k, interval=2, forecast=Forecast(order)) for k in range(8)], slots=every)
        assert plain < executor.held_bytes <= lanes.most_bytes
    assert executor.held_bytes == lanes.most_bytes


def test_a_slot_keeps_nothing_of_the_image_before(executor: Executor) -> None:
    """Not even for a plan whose first step is shallow, which no plan is: then there is nothing, and no picture."""
    expected = drawn(executor, [job_of(executor, 3)])["3"]
    drawn(executor, [job_of(executor, k) for k in (5, 6, 7, 8, 9)])
    assert torch.equal(drawn(executor, [job_of(executor, 3)])["3"], expected)
    executor.fill(0, job_of(executor, 0).content, 0)
    executor.run([(0, 0)], name="shallow-0", guided=True)
    assert executor.latents(0).isnan().any()


def test_a_table_is_made_once_for_all_who_ask(executor: Executor) -> None:
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda _: executor.schedule("ddim", 60), range(8)))
    assert len(set(map(id, tables))) == 1
    with pytest.raises(ValueError, match="num_steps >= 1, got 0"):
        executor.schedule("ddim", 0)
    assert executor.schedule("ddim", 60) is tables[0]


@pytest.mark.parametrize("steps", [1, 2, 9, 30])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_ring_is_the_table(name: str, steps: int, pipe: FastCachePipeline) -> None:
    table = compile_sampler(make_scheduler(name, pipe.bundle.manifest.model.scheduler), steps)
    weights, generator = table.numbers.weights.flatten(1), torch.Generator().manual_seed(0)
    calls = table.num_calls
    x, eps, noise = (torch.randn(n, 5, generator=generator) for n in (1, calls, calls))
    ring = torch.zeros(weights.shape[1], 5)
    ring[0] = x[0]
    for call in range(calls):
        row = 3 * (call % (len(ring) // 3))
        ring[row + 1], ring[row + 2] = eps[call], noise[call]
        following = weights[call] @ ring
        ring[(row + 3) % len(ring)] = following
        expected = table.x[call] * x[0] + table.eps[call].float() @ eps + table.noise[call].float() @ noise
        torch.testing.assert_close(following, expected.float(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product(["ddim", "ddpm", "euler", "euler_a", "lms"], ["epsilon", "v_prediction"]),
        *itertools.product(["ddim", "ddpm"], ["sample"]),  # of these alone diffusers takes it
    ],
)
def test_what_a_step_foretells_is_the_schedulers_own(name: str, kind: str, pipe: FastCachePipeline) -> None:
    scheduler: Any = make_scheduler(name, {**pipe.bundle.manifest.model.scheduler, "prediction_type": kind})
    table, generator = compile_sampler(scheduler, 7), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(7)
    x = torch.randn(1, 4, 2, 2, generator=generator) * table.init_noise_sigma
    for call, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, timestep)
        output = torch.randn(x.shape, generator=generator)
        step = scheduler.step(output, timestep, x)
        of_sample, of_noise = table.foretells(kind)[call]
        found = of_sample * x + of_noise * output
        torch.testing.assert_close(found, step.pred_original_sample, rtol=1e-3, atol=1e-3)
        x = step.prev_sample


def test_streams_end_all_calls_before_they_raise() -> None:
    class Call:
        has_ended = False

        def __init__(self, failure: Exception | None) -> None:
            self.failure = failure

        def run(self) -> None:
            if self.failure is not None:
                raise self.failure
            time.sleep(0.2)
            self.has_ended = True

    good = [Call(None) for _ in range(3)]
    with pytest.raises(MemoryError, match="no room"):
        Streams({}, threads=2).run([call.run for call in (Call(MemoryError("no room")), *good)])
    assert all(call.has_ended for call in good)


def test_the_last_step_foretells_the_picture(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion's schedule ends at 0.1% noise, so that DDIM's result is that near to what it foretells."""
    shown, preview = list[Tensor](), executor.pipe.pictures.preview

    def look(latents: Tensor) -> Any:
        shown.append(latents.clone())
        return preview(latents)

    monkeypatch.setattr(executor.pipe.pictures, "preview", look)
    executor.fill(0, job_of(executor, 0, num_inference_steps=8, interval=1).content, 0)
    off = list[float]()
    for step in range(8):
        executor.run([(0, step)], name="full", guided=True)
        assert executor.preview(0, step).size == executor.pictures([0])[0].size
        off.append(psnr_db(shown[step], executor.latents(0)))
    assert off[-1] > max(off[:-1])
    assert off[-1] > 25


def test_what_memory_errors_look_like() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer"))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.slow
def test_sdxl_in_two_sizes_and_of_two_branches(builds: BuildStore) -> None:
    """Requests of either size, with plans of either branch, in company, against the pipeline."""
    model = builds.model("tiny-sdxl", save_tiny_sdxl)
    pipe = fastcache.load(builds.bundle(model, sizes=("32x32", "48x32"), branch_id=(0, 2)).path, threads=1)
    executor, forecast = Executor(pipe, 4), Forecast(2, by="sigma")
    plans = [
        CachePlan.from_branches((None, 0, 2, 0, None, 2)),
        CachePlan.from_branches((None, 2, 0, None, 0, 0), forecast=forecast, unguided_steps=(4, 5)),
        CachePlan.all_full(6),
    ]
    sizes = pipe.bundle.manifest.sizes
    jobs = list[Job]()
    for k in range(12):
        size, schedule = sizes[k % 2], executor.schedule("ddim", 6)
        plan, negative = plans[k // 2 % 3], None if k % 3 else "z"
        request = Request(
            "abc",
            negative_prompt=negative,
            guidance_scale=5.0,
            sampler="ddim",
            num_inference_steps=6,
            height=size.height,
            width=size.width,
        )
        content = Drawing(request, terms_of(request, pipe.bundle.manifest), k, schedule, plan)
        jobs.append(Job(f"{k}", 0, str(size), plan, True, 1, 1e9, content))
    together = drawn(executor, jobs, apart=1)
    for k, job in enumerate(jobs):
        size, content = sizes[k % 2], job.content
        expected = pipe(
            content.request.prompt,
            negative_prompt=content.request.negative_prompt,
            guidance_scale=5.0,
            num_inference_steps=6,
            width=size.width,
            height=size.height,
            plan=job.plan,
            generator=[torch.Generator().manual_seed(k)],
            output_type="latent",
        ).images
        assert psnr_db(together[job.id], expected.view(1, -1)) >= 90
    assert psnr_db(together["0"], together["2"]) < 40
