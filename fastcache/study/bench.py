"""Arms (PyTorch eager, the DeepCache package, torch.compile, engines with and without caching) -> times side by side.

The torch arms run in one process and the engine arms in another, so that each has its own memory and threads; the arms
take turns, round by round, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from fastcache_engines import Binding
from torch import Tensor

import fastcache
from fastcache.bundle import Bundle
from fastcache.compile.models import SourceModel, find_model
from fastcache.run.pipeline import FastCachePipeline
from fastcache.run.plan import CachePlan
from fastcache.run.sampler import make_scheduler
from fastcache.study.quality import psnr_db

Arm = Literal["eager", "deepcache", "compile", "engine", "engine+cache"]
ARMS: tuple[Arm, ...] = get_args(Arm)
PROMPT = "a large red circle at the left and a small blue square at the right on a white background"
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


@dataclass(frozen=True)
class ArmResult:
    """An arm's medians over the repeats; `skipped` says why there are none."""

    name: str
    backend: str | None = None
    dtype: str | None = None
    loop_ms_p50: float | None = None
    loop_ms_p90: float | None = None
    full_step_ms_p50: float | None = None
    shallow_step_ms_p50: float | None = None
    overhead_ms_per_step: float | None = None
    speedup_vs_eager: float | None = None
    psnr_db_vs_eager: float | None = None
    peak_bytes: int | None = None
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        if self.skipped is not None:
            return {"name": self.name, "skipped": self.skipped}
        return {name: value for name, value in asdict(self).items() if name != "skipped"}


class _Runner(Protocol):
    def __call__(self, arm: Arm) -> LoopTimes: ...


def run_bench(bundle: Bundle, settings: BenchSettings, say: Callable[[str], None]) -> list[ArmResult]:
    """Warm up and time every arm, one round after the other."""
    model = find_model(settings.model, random_weights=settings.random_weights)
    inputs = make_inputs(bundle, model, settings)
    runs: dict[Arm, list[LoopTimes]] = {arm: [] for arm in settings.arms}
    skipped: dict[Arm, str] = {arm: reason for arm in settings.arms if (reason := _missing(arm))}
    with _Workers(settings, inputs) as workers:
        for i in range(settings.warmup + settings.repeats):
            warm = i < settings.warmup
            say(f"{'warm-up' if warm else 'round'} {i + 1 if warm else i + 1 - settings.warmup}")
            for arm in (a for a in settings.arms if a not in skipped):
                try:
                    times = workers.run(arm)
                except ArmFailed as error:
                    skipped[arm] = str(error)
                    continue
                if not warm:
                    runs[arm].append(times)
    pictures = {} if model.random_weights else _decode(model, {arm: r[-1].latents for arm, r in runs.items() if r})
    results = [
        ArmResult(arm, skipped=skipped[arm]) if arm in skipped else _summary(arm, runs[arm], bundle, settings)
        for arm in settings.arms
    ]
    return [_against_eager(result, results, pictures) for result in results]


def make_inputs(bundle: Bundle, model: SourceModel, settings: BenchSettings) -> dict[str, Tensor]:
    """The conditioning and the noise that all arms share: a real prompt for a real model, else seeded random rows.

    Shapes: `encoder_hidden_states` and further conditioning (2N, ...), unconditional rows first; `latents` (N, C, h, w).
    """
    manifest, generator = bundle.manifest, torch.Generator().manual_seed(0)
    rows = 2 * settings.batch
    shape = (settings.batch, manifest.model.latent_channels)
    scale = manifest.model.vae_scale_factor
    inputs = {"latents": torch.randn(*shape, settings.height // scale, settings.width // scale, generator=generator)}
    for spec in manifest.engines["full"].inputs:
        if spec.name in ("encoder_hidden_states", "text_embeds"):
            inputs[spec.name] = torch.randn(rows, *(int(size) for size in spec.shape[1:]), generator=generator)
        elif spec.name == "time_ids":
            sizes = [settings.height, settings.width, 0, 0, settings.height, settings.width]
            inputs["time_ids"] = torch.tensor([sizes], dtype=torch.float32).repeat(rows, 1)
    if "text" in model.components:
        tokenizer, encoder = model.load_tokenizer(), model.load_text_encoder()
        texts = [""] * settings.batch + [PROMPT] * settings.batch
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            inputs["encoder_hidden_states"] = encoder(ids).last_hidden_state
    return inputs


def environment(threads: int) -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    packages = ("diffusers", "transformers", "onnxruntime", "DeepCache")
    versions = {"fastcache": fastcache.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in packages:
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def _commit() -> str | None:
    root = Path(fastcache.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _missing(arm: Arm) -> str | None:
    if arm == "deepcache" and importlib.util.find_spec("DeepCache") is None:
        return "the DeepCache package is not installed; run: pip install 'fastcache[bench]'"
    return None


def _summary(arm: Arm, runs: list[LoopTimes], bundle: Bundle, settings: BenchSettings) -> ArmResult:
    loops = [run.loop_ms for run in runs]
    full = [ms for run in runs for ms, is_full in zip(run.call_ms, run.full, strict=True) if is_full]
    shallow = [ms for run in runs for ms, is_full in zip(run.call_ms, run.full, strict=True) if not is_full]
    overheads = [(run.loop_ms - sum(run.call_ms)) / len(run.call_ms) for run in runs]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return ArmResult(
        name=arm,
        backend=bundle.manifest.backend if arm.startswith("engine") else "torch",
        dtype=settings.dtype,
        loop_ms_p50=round(statistics.median(loops), 3),
        loop_ms_p90=round(_percentile(loops, 0.9), 3),
        full_step_ms_p50=round(statistics.median(full), 3),
        shallow_step_ms_p50=round(statistics.median(shallow), 3) if shallow else None,
        overhead_ms_per_step=round(statistics.median(overheads), 4),
        peak_bytes=max(peaks, default=None),
    )


def _percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _against_eager(result: ArmResult, results: list[ArmResult], pictures: dict[Arm, Tensor]) -> ArmResult:
    eager = next((r for r in results if r.name == "eager" and r.loop_ms_p50 is not None), None)
    if eager is None or eager.loop_ms_p50 is None or result.loop_ms_p50 is None:
        return result
    ratio = round(eager.loop_ms_p50 / result.loop_ms_p50, 3)
    reference, own = pictures.get("eager"), pictures.get(result.name)  # type: ignore[call-overload]
    if reference is None or own is None or result.name == "eager":
        return replace(result, speedup_vs_eager=ratio)
    psnr = psnr_db(own, reference)
    return replace(result, speedup_vs_eager=ratio, psnr_db_vs_eager=round(min(psnr, 200.0), 2))


def _decode(model: SourceModel, latents: dict[Arm, Tensor]) -> dict[Arm, Tensor]:
    if "vae" not in model.components:
        return {}
    vae = model.load_vae()
    with torch.no_grad():
        return {
            arm: (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1) for arm, x in latents.items()
        }


class ArmFailed(RuntimeError):
    """An arm cannot run here; the message is the reason."""


class _Workers:
    """One process for the torch arms and one for the engine arms, each started when an arm first needs it."""

    def __init__(self, settings: BenchSettings, inputs: dict[str, Tensor]) -> None:
        self._arguments = settings, inputs
        self._started: dict[bool, tuple[Any, multiprocessing.connection.Connection]] = {}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._started.values():
            pipe.close()
            process.join(timeout=10)
            process.kill()

    def run(self, arm: Arm) -> LoopTimes:
        of_engines = arm.startswith("engine")
        if of_engines not in self._started:
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, of_engines, *self._arguments), daemon=True)
            process.start()
            there.close()
            self._started[of_engines] = process, here
        pipe = self._started[of_engines][1]
        try:
            pipe.send(arm)
            answer = pipe.recv()
        except (EOFError, BrokenPipeError):
            raise ArmFailed("its process ended, most likely for want of memory") from None
        if isinstance(answer, str):
            raise ArmFailed(answer)
        return answer


def _serve(pipe: multiprocessing.connection.Connection, of_engines: bool, settings: BenchSettings, inputs: Any) -> None:
    """A worker's life: load once, then run the arm named in each message."""
    torch.set_num_threads(settings.threads)
    runner: _Runner | None = None
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
        unet = model.load_unet()
        if unet.config.in_channels != unet.config.out_channels:
            raise ValueError(f"diffusers' text-to-image pipeline does not run a U-Net of {unet.config.in_channels} channels")
        scheduler = make_scheduler(settings.sampler, model.scheduler)
        parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": scheduler}
        if "text_embeds" in inputs:
            self.pipe: Any = StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
        else:
            self.pipe = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        self.pipe.set_progress_bar_config(disable=True)
        self.unets = {"eager": unet, "deepcache": unet}

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
        self.settings, self.inputs = settings, dict(inputs)
        self.latents = self.inputs.pop("latents")
        self.pipe = fastcache.load(settings.bundle, threads=settings.threads)

    def __call__(self, arm: Arm) -> LoopTimes:
        start = time.perf_counter()
        pipe: FastCachePipeline = self.pipe
        run = pipe.start(
            **self.inputs,
            guided=True,
            num_inference_steps=self.settings.steps,
            cache_interval=1 if arm == "engine" else self.settings.cache_interval,
            sampler=self.settings.sampler,
            generator=torch.Generator().manual_seed(1),
            latents=self.latents,
            guidance_scale=GUIDANCE_SCALE,
        )
        calls = list[float]()
        pool, bindings = run.pool, (run.pool.full, run.pool.shallow)
        pool.full, pool.shallow = (_Timed(binding, calls) for binding in bindings)
        try:
            for step in run.steps:
                latents = step.latents
        finally:
            pool.full, pool.shallow = bindings
        loop_ms = (time.perf_counter() - start) * 1e3
        plan: CachePlan = run.plan
        full = tuple(plan.is_full(i) for i in range(plan.num_steps))
        return LoopTimes(loop_ms, tuple(calls), full, None, latents.clone())


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
