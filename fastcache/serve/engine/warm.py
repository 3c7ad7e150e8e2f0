"""A bundle just loaded -> one whose first request waits for nothing: every engine run once, and the steps timed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from PIL import Image as Pillow

from fastcache.bundle.manifest import Manifest
from fastcache.bundle.recipe import Size
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.request import Request
from fastcache.pipeline.schedule import Schedule
from fastcache.serve.engine.executor import Executor
from fastcache.serve.engine.order import Drawing
from fastcache_engines.capturing import without_captures

_WORTH_TIMING_AGAIN_S: Final = 1.0


def warm_up(executor: Executor) -> None:
    """Run each engine at the usual size. What a step takes is timed in a second run, unless that would take long."""
    manifest, pipe = executor.pipe.bundle.manifest, executor.pipe
    size, schedule = manifest.sizes[0], _usual_schedule(executor)
    _bind(executor, size)
    request = blank_request(manifest)
    plan = CachePlan.all_full(schedule.sampler.num_calls)
    executor.fill(0, Drawing(request, pipe.terms(request), 0, schedule, plan), 0)
    for name in manifest.passes:
        for guided in (True, False):
            if (took := _timed_step(executor, name, guided)) < _WORTH_TIMING_AGAIN_S:
                took = _timed_step(executor, name, guided)
            executor.speeds.note_step(name, guided, took)
    executor.pictures([0])
    if "preview_decoder" in manifest.engines:
        executor.preview(0, 0)
    start = time.perf_counter()
    executor.pictures([0])
    executor.speeds.note("decode", time.perf_counter() - start)
    executor.clear(0)


def _bind(executor: Executor, size: Size) -> None:
    """Load and bind the engines of a size, and run those that come before the loop."""

    def run_once() -> None:
        executor.embeds("")
        if "vae_encoder" in executor.pipe.bundle.manifest.engines:
            executor.pipe.runtime.once("vae_encoder", {"image": torch.zeros(1, 3, size.height, size.width)})

    if executor.device != "cpu":  # in one thread, for engines on a GPU capture graphs as they are bound
        executor.lanes(size).bind()
        with without_captures(executor.device):
            run_once()
        return
    with ThreadPoolExecutor(1) as beside:
        # Native code works, while Python encodes the text.
        loading = beside.submit(lambda: executor.lanes(size).bind())
        run_once()
        loading.result()


def _timed_step(executor: Executor, name: str, guided: bool) -> float:
    start = time.perf_counter()
    executor.run([(0, 0)], name=name, guided=guided)
    if executor.device != "cpu":
        torch.cuda.current_stream().synchronize()
    return time.perf_counter() - start


def _usual_schedule(executor: Executor) -> Schedule:
    """That of a request which names no sampler, or else one of any."""
    terms = executor.pipe.terms(blank_request(executor.pipe.bundle.manifest))
    try:
        return executor.schedule(terms.sampler_name, terms.steps.count)
    except ValueError:  # the model's own runs its own step, so that requests must name another
        return executor.schedule("ddim", terms.steps.count)


def blank_request(manifest: Manifest) -> Request:
    """A request that a bundle can draw, with black pictures for all that it is shown."""
    model, size = manifest.model, manifest.sizes[0]
    black = Pillow.new("RGB", (size.width, size.height))
    kinds = [entry.kind for entry in model.controls]
    pictures: dict[str, Any] = {}
    if (count := kinds.count("controlnet")) > 0:
        pictures["control_image"] = black if count == 1 else [black] * count
    if "t2i_adapter" in kinds:
        pictures["adapter_image"] = black
    if "ip_adapter" in kinds:
        pictures["ip_adapter_image"] = black
    if model.in_channels != model.latent_channels:
        pictures |= {"image": black, "mask_image": black}
    return Request("", guidance_scale=2.0, height=size.height, width=size.width, **pictures)
