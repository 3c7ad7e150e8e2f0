"""One arm, run once: what happens inside the worker processes of a benchmark.

The torch arms are diffusers' own pipelines over latents; the engine arms are fastcache's loop over a bundle. Both note
how long each U-Net call took: by the processor's clock, on a GPU by events in its stream.
"""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from torch import Tensor

import fastcache
from fastcache.bench.arms import Arm, BenchSettings
from fastcache.bench.plain import PlainPipeline
from fastcache.bundle.recipe import Size
from fastcache.compile.checkpoint import load
from fastcache.compile.models import find_model
from fastcache.pipeline.request import ControlArguments, Request
from fastcache.sampler.scheduler import make_scheduler
from fastcache_engines import Binding, DType, Engine, torch_dtype


@dataclass(frozen=True)
class Task:
    """What one worker is for: the torch arms of a dtype, or the arms of a bundle, with `cuda_graph` each one graph.

    `weights_bytes` is the size of what it will load.
    """

    settings: BenchSettings
    inputs: dict[str, Tensor]
    dtype: DType
    bundle: str | None = None
    cuda_graph: bool = False
    weights_bytes: int = 0


@dataclass(frozen=True)
class TimedRun:
    """One run of the denoising loop: the whole, and each U-Net call, in milliseconds; its latents, in float32.

    `call_ms` and `full` are empty for a loop in one CUDA graph. `peak_bytes` is the run's: of the GPU's memory where it
    runs on one, else of the process. `process_bytes` is the most that the process has held of the machine's memory,
    loading included.
    """

    loop_ms: float
    call_ms: tuple[float, ...]
    full: tuple[bool, ...]
    latents: Tensor
    peak_bytes: int | None = None
    process_bytes: int | None = None


def serve(pipe: Connection, task: Task) -> None:
    """A worker's life: load once, then run the arm in each message."""
    torch.set_num_threads(task.settings.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")  # the compiler's, on diffusers' code
    runner: Callable[[Arm], TimedRun] | None = None
    peak = Peak(task.settings.device)
    while True:
        try:
            arm = pipe.recv()
        except EOFError:
            return
        try:
            runner = runner or (TorchArms(task) if task.bundle is None else EngineArms(task, task.bundle))
            peak.reset()
            times = runner(arm)
            pipe.send(replace(times, peak_bytes=peak.bytes(), process_bytes=peak.process_bytes()))
        except Exception as error:  # whatever stops an arm is that arm's reason, not the end of the others
            if os.environ.get("FASTCACHE_DEBUG"):
                traceback.print_exc()
            pipe.send(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")


class TorchArms:
    """diffusers' own pipeline over latents, plain, compiled, or with the DeepCache package's helper.

    Where diffusers' needs more than latents and embeddings, the loop alone (`PlainPipeline`).
    """

    def __init__(self, task: Task) -> None:
        self.settings, device, dtype = task.settings, task.settings.device, torch_dtype(task.dtype)
        self.inputs = {name: tensor.to(device, dtype) for name, tensor in task.inputs.items()}
        model = find_model(self.settings.model, random_weights=self.settings.random_weights)
        unet: Any = model.load_unet()
        unet = unet.to(device, dtype)
        scheduler = make_scheduler(self.settings.sampler, model.scheduler)
        nets = [load(ControlNetModel, Path(folder)).to(device, dtype) for folder in self.settings.controlnets]
        self.pipe = _pipeline(unet, scheduler, self.inputs, nets)
        self.unet, self._compiled = unet, dict[str, Any]()
        self._parts = {name: getattr(self.pipe, name) for name in ("unet", "controlnet") if hasattr(self.pipe, name)}

    def __call__(self, arm: Arm) -> TimedRun:
        if arm.kind == "compile" and not self._compiled:
            self._compiled = {name: torch.compile(part) for name, part in self._parts.items()}
        for name, part in (self._compiled if arm.kind == "compile" else self._parts).items():
            setattr(self.pipe, name, part)
        if arm.kind != "deepcache":
            return self._run(1)
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=self.pipe)
        helper.set_params(cache_interval=arm.cache_interval, cache_branch_id=arm.branch_id)
        helper.enable()
        try:
            return self._run(arm.cache_interval)
        finally:
            helper.disable()
            # It leaves every module with a `forward` of its own, at which torch.compile would compile anew.
            for module in self.unet.modules():
                module.__dict__.pop("forward", None)

    def _run(self, interval: int) -> TimedRun:
        clock = CallClock(self.settings.device)
        first = getattr(self.pipe, "controlnet", self.pipe.unet)  # an engine's call is both, too
        hooks = [
            first.register_forward_pre_hook(lambda *_: clock.mark()),
            self.pipe.unet.register_forward_hook(lambda *_: clock.mark()),
        ]
        try:
            latents, loop_ms = clock.time(self._latents)
        finally:
            for hook in hooks:
                hook.remove()
        calls = clock.call_ms()
        return TimedRun(loop_ms, calls, tuple(i % interval == 0 for i in range(len(calls))), latents.float().cpu())

    def _latents(self) -> Tensor:
        if isinstance(self.pipe, PlainPipeline):
            return self.pipe(
                {name: rows for name, rows in self.inputs.items() if name != "latents"},
                self.inputs["latents"],
                self.settings.steps,
                self.settings.guidance_scale,
                self.settings.image_guidance_scale,
                torch.Generator().manual_seed(1),
            )
        negative, positive = self.inputs["encoder_hidden_states"].chunk(2)
        arguments: dict[str, Any] = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        if "text_embeds" in self.inputs:
            pooled = self.inputs["text_embeds"].chunk(2)
            arguments |= {"negative_pooled_prompt_embeds": pooled[0], "pooled_prompt_embeds": pooled[1]}
        if "control_image" in self.inputs:
            images = [self.inputs["control_image"]] * len(self.settings.controlnets)
            arguments |= {"image": images if len(images) > 1 else images[0], "controlnet_conditioning_scale": 1.0}
        return self.pipe(
            **arguments,
            height=self.settings.height,
            width=self.settings.width,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale,
            generator=torch.Generator().manual_seed(1),
            latents=self.inputs["latents"],
            output_type="latent",
        ).images


def _pipeline(unet: Any, scheduler: Any, inputs: Mapping[str, Tensor], nets: Sequence[ControlNetModel]) -> Any:
    """diffusers' text-to-image pipeline with nothing in it but what is given, or else the loop alone.

    Raises: `ValueError` for ControlNets of a model that these pipelines do not run.
    """
    sdxl = "text_embeds" in inputs
    refines = sdxl and inputs["time_ids"].shape[1] == 5
    if refines or "encoder_hidden_states" not in inputs or unet.config.in_channels != unet.config.out_channels:
        if nets:
            raise ValueError("expected a U-Net of latents and text beside ControlNets, got one that takes more or less")
        return PlainPipeline(unet, scheduler)
    kind: Any = getattr(diffusers, f"StableDiffusion{'XL' if sdxl else ''}{'ControlNet' if nets else ''}Pipeline")
    missing = ("text_encoder_2", "tokenizer_2") if sdxl else ("safety_checker", "feature_extractor")
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", *missing))
    if nets:
        parts["controlnet"] = nets[0] if len(nets) == 1 else MultiControlNetModel(list(nets))
    pipe = kind(unet=unet, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class EngineArms:
    """A bundle's engines in fastcache's own loop, all full or after a uniform plan."""

    def __init__(self, task: Task, bundle: str) -> None:
        self.settings, self.inputs, self.whole = task.settings, task.inputs, task.cuda_graph
        if self.whole and self.settings.guided_rows == 3:
            raise ValueError("expected guidance of two parts for a CUDA graph, got three; take the arm without +graph")
        apart = ("latents", "control_image")
        self.conditioning: dict[str, Any] = {name: rows for name, rows in self.inputs.items() if name not in apart}
        settings, self._clock = self.settings, CallClock(self.settings.device)
        wrap = None if self.whole else self._timed  # a graph holds no call of its own
        self.pipe = fastcache.load(bundle, threads=settings.threads, cuda_graph=self.whole, wrap=wrap)
        # Loads the engines, so that what that takes counts as no run's peak.
        self.pipe.runtime.lane(images=settings.batch, guided=settings.guided)

    def __call__(self, arm: Arm) -> TimedRun:
        full = list[bool]()
        latents, loop_ms = self._clock.time(lambda: self._latents(arm, full))
        return TimedRun(loop_ms, self._clock.call_ms() if full else (), tuple(full), latents.float().cpu())

    def _timed(self, engine: Engine) -> Engine:
        """An engine of a pass with a clock around each run; what runs once a picture is no call of the U-Net."""
        return TimedEngine(engine, self._clock) if "noise_pred" in [spec.name for spec in engine.outputs] else engine

    def _latents(self, arm: Arm, full: list[bool]) -> Tensor:
        request = Request(
            num_inference_steps=self.settings.steps,
            cache_interval=arm.cache_interval,
            sampler=self.settings.sampler,
            generator=torch.Generator().manual_seed(1),
            latents=self.inputs["latents"],
            guidance_scale=self.settings.guidance_scale,
            image_guidance_scale=self.settings.image_guidance_scale,
        )
        inputs = self.conditioning | self._steering()
        run = self.pipe.start(request, inputs, guided=self.settings.guided, whole=self.whole)
        if self.whole:  # and then there is one step, the last
            return next(run.steps).latents.clone()
        full += [run.plan.is_full(i) for i in range(run.plan.num_steps)]
        *_, last = run.steps
        return last.latents.clone()

    def _steering(self) -> dict[str, Any]:
        """What the passes take of the ControlNets' picture, made in each run, as diffusers' pipelines do."""
        settings, image = self.settings, self.inputs.get("control_image")
        if image is None:
            return {}
        given = ControlArguments(
            control_image=[image] * len(settings.controlnets) if settings.controlnets[1:] else image
        )
        size = Size(width=settings.width, height=settings.height)
        steered = self.pipe.controls.steer(
            given, rows=settings.batch, guided=settings.guided, size=size, num_calls=settings.steps
        )
        return {**steered.inputs}


class TimedEngine:
    """An engine that notes when each of its runs began and ended."""

    def __init__(self, engine: Engine, clock: CallClock) -> None:
        self.inputs, self.outputs, self._engine, self._clock = engine.inputs, engine.outputs, engine, clock

    def bind(self, tensors: Mapping[str, Tensor]) -> Binding:
        return _TimedBinding(self._engine.bind(tensors), self._clock)


class _TimedBinding:
    def __init__(self, binding: Binding, clock: CallClock) -> None:
        self._binding, self._clock = binding, clock

    def run(self) -> None:
        self._clock.mark()
        self._binding.run()
        self._clock.mark()

    def capturable(self) -> bool:
        return False  # a graph has no times of its calls


class CallClock:
    """How long a loop and the calls in it take. On a GPU the loop waits for it at its two ends only."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._marks: list[Any] = []

    def mark(self) -> None:
        """A call begins, or ends."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def time(self, loop: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """What the loop returns, and the milliseconds it took; calls are counted anew."""
        self._marks.clear()
        self._wait()
        start = time.perf_counter()
        result = loop()
        self._wait()
        return result, (time.perf_counter() - start) * 1e3

    def call_ms(self) -> tuple[float, ...]:
        """The time from each call's beginning to its end."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return tuple(a.elapsed_time(b) if self._cuda else (b - a) * 1e3 for a, b in pairs)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class Peak:
    """The most memory that a run takes: of the GPU where there is one, else of this process (known on Linux only)."""

    def __init__(self, device: str) -> None:
        self._cuda, self._loading = device.startswith("cuda"), 0
        self._free_bytes = torch.cuda.mem_get_info()[0] if self._cuda else 0
        self._outside_bytes: int | None = None

    def reset(self) -> None:
        """A run begins."""
        self._loading = max(self._loading, _resident_peak_bytes() or 0)
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int | None:
        """The peak since `reset`. What a library took of the GPU beside torch is taken from the first run."""
        if not self._cuda:
            return _resident_peak_bytes()
        if self._outside_bytes is None:
            taken = self._free_bytes - torch.cuda.mem_get_info()[0]
            self._outside_bytes = max(0, taken - torch.cuda.memory_reserved())
        return torch.cuda.max_memory_allocated() + self._outside_bytes

    def process_bytes(self) -> int | None:
        """The most that this process has ever held."""
        return max(self._loading, _resident_peak_bytes() or 0) or None


def _resident_peak_bytes() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
