"""Arms (PyTorch eager, the DeepCache package, torch.compile, engines with and without caching) -> times side by side.

The torch arms run in one process and the engine arms in another, so that each has its own memory and threads; the arms
take turns, round by round, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcache
from fastcache.bundle import Bundle
from fastcache.compile.models import SourceModel, find_model
from fastcache.study.arms import GUIDANCE_SCALE, Arm, BenchSettings, LoopTimes, serve
from fastcache.study.quality import psnr_db

PROMPT = "a large red circle at the left and a small blue square at the right on a white background"


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
            for arm in settings.arms:
                if arm in skipped:
                    continue
                try:
                    times = workers.run(arm)
                except ArmFailed as error:
                    skipped[arm] = str(error)
                    continue
                if not warm:
                    runs[arm].append(times)
    pictures: Mapping[str, Tensor] = (
        {} if model.random_weights else _decode(model, {arm: r[-1].latents for arm, r in runs.items() if r})
    )
    results = [
        ArmResult(arm, skipped=skipped[arm]) if arm in skipped else _summary(arm, runs[arm], bundle, settings)
        for arm in settings.arms
    ]
    return [_against_eager(result, results, pictures) for result in results]


def document(bundle: Bundle, settings: BenchSettings, results: Sequence[ArmResult]) -> dict[str, Any]:
    """A benchmark as JSON: the machine, what was asked for, and each arm's figures."""
    random = bundle.manifest.model.random_weights
    conditions = {
        "guidance_scale": GUIDANCE_SCALE,
        "build_seconds": bundle.manifest.build_seconds,
        "bundle_sha256": bundle.manifest.bundle_sha256,
        "quality": "random weights: no quality figure" if random else "PSNR of the decoded images",
    }
    return {
        "environment": environment(settings.threads),
        "settings": {**asdict(settings), **conditions},
        "arms": [result.to_json() for result in results],
    }


def make_inputs(bundle: Bundle, model: SourceModel, settings: BenchSettings) -> dict[str, Tensor]:
    """The conditioning and the noise that all arms share: a real prompt for a real model, else seeded random rows.

    Shapes: `encoder_hidden_states` and further conditioning (2N, ...), unconditional rows first; `latents`
    (N, C, h, w).
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
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    root = Path(fastcache.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
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


def _against_eager(result: ArmResult, results: list[ArmResult], pictures: Mapping[str, Tensor]) -> ArmResult:
    eager = next((r for r in results if r.name == "eager" and r.loop_ms_p50 is not None), None)
    if eager is None or eager.loop_ms_p50 is None or result.loop_ms_p50 is None:
        return result
    ratio = round(eager.loop_ms_p50 / result.loop_ms_p50, 3)
    reference, own = pictures.get("eager"), pictures.get(result.name)
    if reference is None or own is None or result.name == "eager":
        return replace(result, speedup_vs_eager=ratio)
    psnr = psnr_db(own, reference)
    return replace(result, speedup_vs_eager=ratio, psnr_db_vs_eager=round(min(psnr, 200.0), 2))


def _decode(model: SourceModel, latents: Mapping[Arm, Tensor]) -> dict[str, Tensor]:
    if "vae" not in model.components:
        return {}
    vae: Any = model.load_vae()
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
        self._started: dict[bool, tuple[Any, Connection]] = {}

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
            process = context.Process(target=serve, args=(there, of_engines, *self._arguments), daemon=True)
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
