"""One arm of a benchmark, run once: what happens inside the worker processes of `bench.py`.

The torch arms are diffusers' own pipelines over latents; the engine arms are fastcache's loop over a bundle. Both note
when each U-Net call began and ended.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import fastcache
from fastcache.compile.models import find_model
from fastcache.run.sampler import make_scheduler
from fastcache_engines import Binding

Arm = Literal["eager", "deepcache", "compile", "engine", "engine+cache"]
ARMS: tuple[Arm, ...] = get_args(Arm)
GUIDANCE_SCALE = 7.5


@dataclass(frozen=True)
class BenchSettings:
    """What every arm runs: the same model, size, steps and inputs. Sizes in pixels."""

    model: str
    random_weights: bool
    bundle: str
    arms: tuple[Arm, ...]
    cache_interval: int
    branch_id: int
    steps: int
    height: int
    width: int
    batch: int
    sampler: str
    dtype: str
    warmup: int
    repeats: int
    threads: int


@dataclass(frozen=True)
class LoopTimes:
    """One run of the denoising loop: the whole, and each U-Net call, in milliseconds."""

    loop_ms: float
    call_ms: tuple[float, ...]
    full: tuple[bool, ...]
    peak_bytes: int | None
    latents: Tensor


def serve(pipe: Connection, of_engines: bool, settings: BenchSettings, inputs: Any) -> None:
    """A worker's life: load once, then run the arm named in each message."""
    torch.set_num_threads(settings.threads)
    runner: Callable[[Arm], LoopTimes] | None = None
    while True:
        try:
            arm = pipe.recv()
        except EOFError:
            return
        try:
            runner = runner or (EngineArms if of_engines else TorchArms)(settings, inputs)
            _reset_peak()
            times = runner(arm)
            pipe.send(replace(times, peak_bytes=_peak_bytes()))
        except Exception as error:  # whatever stops an arm is that arm's reason, not the end of the others
            if os.environ.get("FASTCACHE_DEBUG"):
                traceback.print_exc()
            pipe.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


class TorchArms:
    """diffusers' own pipeline over latents, plain, compiled, or with the DeepCache package's helper."""

    def __init__(self, settings: BenchSettings, inputs: dict[str, Tensor]) -> None:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        self.settings, self.inputs = settings, inputs
        model = find_model(settings.model, random_weights=settings.random_weights)
        unet: Any = model.load_unet()
        channels = unet.config.in_channels
        if channels != unet.config.out_channels:
            raise ValueError(f"diffusers' text-to-image pipeline does not run a U-Net of {channels} channels")
        pipeline: Any = StableDiffusionXLPipeline if "text_embeds" in inputs else StableDiffusionPipeline
        missing = ["vae", "text_encoder", "tokenizer"]
        missing += (
            ["text_encoder_2", "tokenizer_2"] if "text_embeds" in inputs else ["safety_checker", "feature_extractor"]
        )
        scheduler = make_scheduler(settings.sampler, model.scheduler)
        self.pipe: Any = pipeline(unet=unet, scheduler=scheduler, **dict.fromkeys(missing))
        self.pipe.set_progress_bar_config(disable=True)
        self.unets: dict[str, Any] = {"eager": unet, "deepcache": unet}

    def __call__(self, arm: Arm) -> LoopTimes:
        if arm == "compile" and "compile" not in self.unets:
            self.unets["compile"] = torch.compile(self.unets["eager"])
        self.pipe.unet = self.unets[arm]
        if arm != "deepcache":
            return self._run(1)
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=self.pipe)
        helper.set_params(cache_interval=self.settings.cache_interval, cache_branch_id=self.settings.branch_id)
        helper.enable()
        try:
            return self._run(self.settings.cache_interval)
        finally:
            helper.disable()

    def _run(self, interval: int) -> LoopTimes:
        starts, ends = list[float](), list[float]()
        hooks = [
            self.pipe.unet.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
            self.pipe.unet.register_forward_hook(lambda *_: ends.append(time.perf_counter())),
        ]
        negative, positive = self.inputs["encoder_hidden_states"].chunk(2)
        arguments: dict[str, Any] = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        if "text_embeds" in self.inputs:
            pooled = self.inputs["text_embeds"].chunk(2)
            arguments |= {"negative_pooled_prompt_embeds": pooled[0], "pooled_prompt_embeds": pooled[1]}
        try:
            start = time.perf_counter()
            latents = self.pipe(
                **arguments,
                height=self.settings.height,
                width=self.settings.width,
                num_inference_steps=self.settings.steps,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(1),
                latents=self.inputs["latents"],
                output_type="latent",
            ).images
            loop_ms = (time.perf_counter() - start) * 1e3
        finally:
            for hook in hooks:
                hook.remove()
        calls = tuple((end - begin) * 1e3 for begin, end in zip(starts, ends, strict=True))
        return LoopTimes(loop_ms, calls, tuple(i % interval == 0 for i in range(len(calls))), None, latents)


class _Timed:
    """A binding that notes how long each run took."""

    def __init__(self, binding: Binding, calls: list[float]) -> None:
        self.binding, self._calls = binding, calls

    def run(self) -> None:
        start = time.perf_counter()
        self.binding.run()
        self._calls.append((time.perf_counter() - start) * 1e3)


class EngineArms:
    """The bundle's engines in fastcache's own loop, all full or after a uniform plan."""

    def __init__(self, settings: BenchSettings, inputs: dict[str, Tensor]) -> None:
        self.settings, self.inputs = settings, inputs
        self.conditioning: dict[str, Any] = {name: rows for name, rows in inputs.items() if name != "latents"}
        self.pipe = fastcache.load(settings.bundle, threads=settings.threads)
        self.pipe.runtime.pool(batch=settings.batch, guided=True, num_calls=settings.steps)  # loads the engines

    def __call__(self, arm: Arm) -> LoopTimes:
        start = time.perf_counter()
        run = self.pipe.start(
            **self.conditioning,
            guided=True,
            num_inference_steps=self.settings.steps,
            cache_interval=1 if arm == "engine" else self.settings.cache_interval,
            sampler=self.settings.sampler,
            generator=torch.Generator().manual_seed(1),
            latents=self.inputs["latents"],
            guidance_scale=GUIDANCE_SCALE,
        )
        calls = list[float]()
        pool, bindings = run.pool, (run.pool.full, run.pool.shallow)
        pool.full, pool.shallow = (_Timed(binding, calls) for binding in bindings)
        try:
            *_, last = run.steps
        finally:
            pool.full, pool.shallow = bindings
        loop_ms = (time.perf_counter() - start) * 1e3
        full = tuple(run.plan.is_full(i) for i in range(run.plan.num_steps))
        return LoopTimes(loop_ms, tuple(calls), full, None, last.latents.clone())


def _reset_peak() -> None:
    """Let the kernel count this process's peak anew (Linux; elsewhere there is no such figure)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
