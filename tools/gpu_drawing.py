"""Whole pictures on a GPU, or in a rehearsal on the CPU: a loop launched and as one graph, fitted plans, the server.

Knows bundles and pipelines; nothing about the order of steps.
"""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_task import Task, say
from torch import Tensor

import fastcache
from fastcache.bench.bench import make_inputs
from fastcache.bench.lineup import build_bundles
from fastcache.bench.loops import CallClock
from fastcache.bundle.bundle import Bundle
from fastcache.compile.models import find_model
from fastcache.evaluate.judges import calibration_prompts
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.request import Request
from fastcache.planning.fitting import Fitting, Reference

STOCHASTIC = "euler_a"  # its noise comes from a generator on the CPU, which no step may wait for
CALIBRATED_ON = 3
GUIDANCE = 7.5  # where rows are by a formula


def run_demo(task: Task, folder: Path) -> dict[str, Any]:
    """A bundle's loop launched step by step and as one CUDA graph: times, how far apart, and what waits for the GPU.

    By plain and by fitted plans, and by a sampler that draws noise.
    """
    bundle = bundle_of(task, folder, whole=True)
    pipes = {"launches": fastcache.load(bundle.path), "graph": graphed(bundle)}
    plan = CachePlan.uniform(task.steps, 3)
    # `say` counts the pictures that a fit walks on
    fitting = Fitting(pipes["launches"], calibration_prompts(CALIBRATED_ON), Reference("ddim", task.steps, 4.0), say)
    points = range(0, task.steps, 2)
    fitted = fitting.fit(CachePlan.uniform(len(points), 3), points)
    rows = list[dict[str, Any]]()
    for name, own, sampler in (
        ("uniform", plan, "ddim"),
        ("fitted", fitted, "ddim"),
        ("noise", plan, STOCHASTIC),
    ):
        drawn = {kind: timed_run(pipe, own, sampler, task, kind == "graph") for kind, pipe in pipes.items()}
        apart = (drawn["graph"][0] - drawn["launches"][0]).abs().max() / drawn["launches"][0].abs().max()
        figures = {kind: figures for kind, (_, figures) in drawn.items()}
        rows.append({"plan": name, "sampler": sampler, "graph_vs_launches": float(apart), **figures})
        say(json.dumps(rows[-1]))
    return {"bundle": bundle.manifest.bundle_sha256, "loops": rows}


def bundle_of(task: Task, folder: Path, *, whole: bool = False) -> Bundle:
    """A step's own bundle, for two pictures at once and with all that draws one where it is `whole`.

    Raises: `RuntimeError` saying why there is none.
    """
    task = replace(task, arms=((f"engine:{task.backend}:{task.dtype}", 1, 0),), batch=2 if whole else task.batch)
    bundles, lineup = build_bundles(task.lineup, task.settings, folder, say, whole=whole)
    if not bundles:
        raise RuntimeError(f"no bundle: {next(iter(lineup.skipped.values()))}")
    return next(iter(bundles.values()))


class Listed:
    """What stands in for CUDA graphs in a rehearsal: the calls that a graph would hold, made anew."""

    def warm_up(self, calls: Sequence[Callable[[], object]]) -> None:
        for call in calls:
            call()

    def capturable(self, binding: object) -> bool:
        return True

    def record(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        return lambda: [call() for call in calls]


def graphed(bundle: Bundle) -> FastCachePipeline:
    if bundle.manifest.device_type == "cuda":
        return fastcache.load(bundle.path, cuda_graph=True)
    pipe = fastcache.load(bundle.path)
    pipe.runtime._recorder = Listed()
    return pipe


def timed_run(
    pipe: FastCachePipeline, plan: CachePlan, sampler: str, task: Task, whole: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The latents of a run's second go, the loop's milliseconds, and where in it the host waited for the GPU."""
    clock = CallClock(task.device)

    def begin() -> Any:
        generator = torch.Generator().manual_seed(0)
        steps = None if plan.fit is not None else task.steps
        request = Request(
            "a", num_inference_steps=steps, plan=plan, sampler=sampler, guidance_scale=4.0, generator=generator
        )
        return pipe.begin(request, whole=whole)

    def loop(run: Any) -> Tensor:
        *_, last = run.steps
        return last.latents

    loop(begin())
    run, waits = begin(), Counter[str]()
    latents, loop_ms = clock.time(lambda: watched(lambda: loop(run), task.device, waits))
    return latents.float().cpu(), {"loop_ms": round(loop_ms, 3), "waits": dict(waits)}


def watched(work: Callable[[], Tensor], device: str, waits: Counter[str]) -> Tensor:
    """What `work` gives; torch says where it makes the host wait for a GPU, which is counted by place."""
    if device != "cuda":
        return work()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits.update(f"{Path(one.filename).name}:{one.lineno}" for one in told if "synchroniz" in str(one.message))
    return result


def run_server(task: Task, folder: Path) -> dict[str, Any]:
    """A server's start with its warm-up, one picture, and one beside a reload, in seconds.

    Raises: `RuntimeError` for a picture that was not drawn.
    """
    from fastcache.serve.engine.events import Done, Drawn
    from fastcache.serve.http.limits import Limits
    from fastcache.serve.http.schema import ImageRequest
    from fastcache.serve.http.service import Service

    bundle, asked = (
        bundle_of(task, folder, whole=True),
        ImageRequest(prompt="a", num_inference_steps=task.steps, seed=0),
    )

    async def draw(service: Service) -> float:
        start, pictures = time.perf_counter(), 0
        async with service.drawing(asked) as ticket:
            async for event in ticket.events():
                pictures += isinstance(event, Drawn)
                if isinstance(event, Done) and event.failure is not None:
                    raise RuntimeError(f"expected a picture of the server, got: {event.failure}")
        if pictures != 1:
            raise RuntimeError(f"expected one picture of the server, got {pictures}")
        return time.perf_counter() - start

    async def serve() -> dict[str, Any]:
        service, start = Service(bundle.path, Limits(max_batch=2, timeout_s=120.0)), time.perf_counter()
        await service.start()
        found = {"start_s": time.perf_counter() - start, "image_s": await draw(service)}
        beside, _ = await asyncio.gather(draw(service), service.catalogue.reload())
        found |= {"image_beside_reload_s": beside, "image_after_s": await draw(service)}
        await service.close()
        return {name: round(value, 3) for name, value in found.items()}

    return asyncio.run(serve())


def run_fitted(task: Task, folder: Path) -> dict[str, Any]:
    """A plan on the reference's grid that stops at a third of its points: launched, and as one CUDA graph.

    Its rows are by a formula, for the model has random weights; what rows cost is the same.
    """
    bundle, model = bundle_of(task, folder), find_model(task.model, random_weights=task.settings.random_weights)
    inputs = {name: value.to(task.device) for name, value in make_inputs(model, task.settings).items()}
    latents = inputs.pop("latents")
    launched, clock = fastcache.load(bundle.path), CallClock(task.device)
    plan, arms = by_formula(launched, task), list[dict[str, Any]]()
    for name, pipe in (("launches", launched), ("graph", graphed(bundle))):

        def loop(pipe: FastCachePipeline = pipe, whole: bool = name == "graph") -> Tensor:
            generator = torch.Generator().manual_seed(1)
            request = Request(plan=plan, latents=latents, guidance_scale=GUIDANCE, generator=generator)
            *_, last = pipe.start(request, inputs, guided=True, whole=whole).steps
            return last.latents.clone()

        loop()
        times = sorted(clock.time(loop)[1] for _ in range(task.repeats))
        calls = f"{plan.num_steps} calls of {task.steps}, {len(plan.refresh_steps)} full"
        arms.append({"name": f"fitted, {calls}: {task.backend} {name}", "loop_ms_p50": times[len(times) // 2]})
    return {"plan": json.loads(plan.to_json()), "arms": arms}


def by_formula(pipe: FastCachePipeline, task: Task) -> CachePlan:
    reference = Reference("ddim", task.steps, GUIDANCE)
    skipping = Fitting(pipe, [""], reference).skipping(max(1, task.steps // 3), "line")
    return replace(skipping, passes=CachePlan.uniform(skipping.num_steps, 3).passes)
