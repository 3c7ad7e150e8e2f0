"""Arms (PyTorch eager, the DeepCache package, torch.compile, engines with and without caching) -> times side by side.

The arms take turns, round by round, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastcache.bench.arms import GUIDANCE_SCALE, TORCH, Arm, BenchSettings
from fastcache.bench.lineup import BundleKey, Lineup
from fastcache.bench.loops import LoopTimes, Task
from fastcache.bench.machine import environment, gpus, load_average
from fastcache.bench.pattern import control_pattern
from fastcache.bench.work import geometry
from fastcache.bench.workers import ArmFailed, Job, Workers
from fastcache.bundle.bundle import Bundle
from fastcache.compile.models import SourceModel, find_model
from fastcache.evaluate.quality import psnr_db
from fastcache.pipeline.prompts import Sizes

PROMPT = "a large red circle at the left and a small blue square at the right on a white background"


@dataclass(frozen=True)
class ArmResult:
    """An arm's medians over the repeats; `skipped` says why there are none.

    `build_s` is what making an engine took, and for torch.compile its first U-Net call, in which it compiles.
    A loop that is one CUDA graph has no times of its U-Net calls, and so none of what is beside them.
    `latents_error_vs_eager` is the largest difference over the largest latent; none where a latent is not finite.
    """

    name: str
    backend: str | None = None
    dtype: str | None = None
    cache_interval: int | None = None
    branch_id: int | None = None
    loop_ms_p50: float | None = None
    loop_ms_p90: float | None = None
    full_step_ms_p50: float | None = None
    shallow_step_ms_p50: float | None = None
    overhead_ms_per_step: float | None = None
    speedup_vs_eager: float | None = None
    speedup_vs_deepcache: float | None = None
    psnr_db_vs_eager: float | None = None
    latents_error_vs_eager: float | None = None
    latents_finite: bool | None = None
    peak_bytes: int | None = None
    build_s: float | None = None
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        if self.skipped is not None:
            return {"name": self.name, "skipped": self.skipped}
        return {name: value for name, value in asdict(self).items() if name != "skipped"}


@dataclass(frozen=True)
class Measured:
    """A benchmark's outcome: an arm's result each, and what the measuring itself did and met.

    `references` names the arms that speed-ups are against. `reloads` counts the processes that were ended for want of
    memory and started again. `machine` is what it was like around the measuring: the load before it, which a quiet
    machine has near 0, and the GPUs before and after.
    """

    results: tuple[ArmResult, ...]
    references: Mapping[str, str | None]
    reloads: int
    machine: Mapping[str, Any]


def run_bench(
    settings: BenchSettings, lineup: Lineup, bundles: Mapping[BundleKey, Bundle], say: Callable[[str], None]
) -> Measured:
    """Warm up and time every arm, one round after the other."""
    model = find_model(settings.model, random_weights=settings.random_weights)
    on_gpu, machine = settings.device == "cuda", dict[str, Any](load_average_before=load_average())
    before = gpus() if on_gpu else []
    jobs = _jobs(settings, model, lineup, bundles)
    # Arms of one process follow each other, so that a process is not ended and started again within a round.
    order = [arm for key in jobs for arm in lineup.arms if _worker_of(arm) == key and arm not in lineup.skipped]
    with Workers(jobs, _worker_of) as workers:
        runs, first, failed = _run_rounds(settings, order, workers, say)
    skipped = {**lineup.skipped, **failed}
    ran = {arm: own for arm, own in runs.items() if own and arm not in skipped}
    results = {arm: summary(arm, own, _build_s(arm, first[arm], bundles)) for arm, own in ran.items()}
    latents = {arm: own[-1].latents for arm, own in ran.items()}
    pictures = {} if model.random_weights else _decode(model, latents)
    eager = next((a for a in ran if (a.kind, a.dtype) == ("eager", "fp32")), None) or _first(ran, "eager")
    return Measured(
        tuple(
            ArmResult(arm.name, skipped=skipped[arm])
            if arm in skipped
            else _compared(arm, results, (eager, _deepcache_of(arm, ran)), latents, pictures)
            for arm in lineup.arms
        ),
        {kind: arm.name if arm else None for kind, arm in (("eager", eager), ("deepcache", _first(ran, "deepcache")))},
        workers.reloads,
        machine | ({"gpus": {"before": before, "after": gpus()}} if on_gpu else {}),
    )


def _run_rounds(
    settings: BenchSettings, order: Sequence[Arm], workers: Workers, say: Callable[[str], None]
) -> tuple[dict[Arm, list[LoopTimes]], dict[Arm, LoopTimes], dict[Arm, str]]:
    """Each arm's timed runs, its first run, and why some arms failed."""
    runs: dict[Arm, list[LoopTimes]] = {arm: [] for arm in order}
    first: dict[Arm, LoopTimes] = {}
    failed: dict[Arm, str] = {}
    # torch.compile compiles and a CUDA graph is recorded in the first run, whatever the number of warm-up rounds.
    untimed = max(settings.warmup, int(any(arm.prepares for arm in order)))
    for i in range(-untimed, settings.repeats):
        say(f"warm-up {untimed + i + 1} of {untimed}" if i < 0 else f"round {i + 1} of {settings.repeats}")
        for arm in order:
            if arm in failed or (i < -settings.warmup and not arm.prepares):
                continue
            try:
                times = workers.run(arm, timed=i >= 0)
            except ArmFailed as error:
                failed[arm] = str(error)
                continue
            first.setdefault(arm, times)
            if i >= 0:
                runs[arm].append(times)
    return runs, first, failed


def document(settings: BenchSettings, bundles: Mapping[BundleKey, Bundle], measured: Measured) -> dict[str, Any]:
    """A benchmark as JSON: the machine, what was asked for, and each arm's figures."""
    conditions = {
        "arms": [result.name for result in measured.results],
        "guidance_scale": GUIDANCE_SCALE if settings.guided else None,
        "references": dict(measured.references),
        "reloads": measured.reloads,
        "bundles": [
            {
                "name": bundle.path.name,
                "backend": bundle.manifest.backend,
                "dtype": bundle.manifest.dtype,
                "branch_id": bundle.manifest.branch_id,
                "bundle_sha256": bundle.manifest.bundle_sha256,
                "build_seconds": bundle.manifest.build_seconds,
            }
            for bundle in bundles.values()
        ],
        "quality": "random weights: no quality figure" if settings.random_weights else "PSNR of the decoded images",
    }
    return {
        "environment": {**environment(settings.threads), **measured.machine},
        "settings": {**asdict(settings), **conditions},
        "arms": [result.to_json() for result in measured.results],
    }


def make_inputs(model: SourceModel, settings: BenchSettings) -> dict[str, Tensor]:
    """The conditioning and the noise that all arms share: a real prompt for a real model, else seeded random rows.

    Shapes: `encoder_hidden_states` and further conditioning (2N, ...), unconditional rows first, these twice for
    InstructPix2Pix, and no conditioning at all for a U-Net without text; `latents` (N, C, h, w); `control_image`
    (1, 3, H, W) where there are ControlNets.
    """
    shapes, generator, rows = geometry(model), torch.Generator().manual_seed(0), 2 * settings.batch
    size = settings.height // shapes.scale, settings.width // shapes.scale
    inputs = {"latents": torch.randn(settings.batch, shapes.latent_channels, *size, generator=generator)}
    if "text" in model.components:
        tokenizer, encoder = model.load_tokenizer(), model.load_text_encoder()
        texts = [""] * settings.batch + [PROMPT] * settings.batch
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            inputs["encoder_hidden_states"] = encoder(ids).last_hidden_state
    elif shapes.tokens:
        text = torch.randn(rows, shapes.tokens, shapes.text_width, generator=generator)
        inputs["encoder_hidden_states"] = text
    if shapes.pooled_width is not None and shapes.time_ids is not None:
        inputs["text_embeds"] = torch.randn(rows, shapes.pooled_width, generator=generator)
        told = (settings.height, settings.width)
        inputs["time_ids"] = Sizes().time_ids(told, num_ids=shapes.time_ids, rows=rows, guided=True, from_image=False)
    if settings.guided_rows == 3:
        text = inputs["encoder_hidden_states"]
        inputs["encoder_hidden_states"] = torch.cat([text[: settings.batch], text])
    if settings.controlnets:
        inputs["control_image"] = control_pattern(settings.height, settings.width)
    return inputs


def _worker_of(arm: Arm) -> str:
    """Which process an arm runs in: for the torch arms of each dtype, for each bundle, and for its graphs."""
    graph = " in a graph" if arm.is_graph else ""
    return f"{arm.backend} {arm.dtype}" + (f" branch {arm.branch_id}{graph}" if arm.is_engine else "")


def _jobs(
    settings: BenchSettings, model: SourceModel, lineup: Lineup, bundles: Mapping[BundleKey, Bundle]
) -> dict[str, Job]:
    """What each process loads, in the order in which their first arms come."""
    inputs, jobs = make_inputs(model, settings), dict[str, Job]()
    weights_bytes = geometry(model).weights_bytes
    for arm in lineup.arms:
        if arm in lineup.skipped or _worker_of(arm) in jobs:
            continue
        if arm.is_engine:
            bundle = bundles[arm.bundle_key]
            task = Task(settings, inputs, arm.dtype, str(bundle.path), arm.is_graph)
            jobs[_worker_of(arm)] = Job(task, bundle.manifest.weights_bytes)
        else:
            jobs[_worker_of(arm)] = Job(Task(settings, inputs, arm.dtype, None), weights_bytes)
    return jobs


def _build_s(arm: Arm, first: LoopTimes, bundles: Mapping[BundleKey, Bundle]) -> float | None:
    if arm.is_engine:
        return bundles[arm.bundle_key].manifest.build_seconds
    return round(first.call_ms[0] / 1e3, 2) if arm.kind == "compile" else None


def summary(arm: Arm, runs: Sequence[LoopTimes], build_s: float | None = None) -> ArmResult:
    """An arm's medians over its runs, as yet compared with nothing."""
    loops = [run.loop_ms for run in runs]
    full = [ms for run in runs for ms, is_full in zip(run.call_ms, run.full, strict=True) if is_full]
    shallow = [ms for run in runs for ms, is_full in zip(run.call_ms, run.full, strict=True) if not is_full]
    overheads = [(run.loop_ms - sum(run.call_ms)) / len(run.call_ms) for run in runs if run.call_ms]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return ArmResult(
        name=arm.name,
        backend=arm.backend if arm.is_engine else TORCH,
        dtype=arm.dtype,
        cache_interval=arm.cache_interval,
        branch_id=arm.branch_id,
        loop_ms_p50=round(statistics.median(loops), 3),
        loop_ms_p90=round(_percentile(loops, 0.9), 3),
        full_step_ms_p50=round(statistics.median(full), 3) if full else None,
        shallow_step_ms_p50=round(statistics.median(shallow), 3) if shallow else None,
        overhead_ms_per_step=round(statistics.median(overheads), 4) if overheads else None,
        peak_bytes=max(peaks, default=None),
        build_s=build_s,
    )


def _percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _first(arms: Mapping[Arm, Any], kind: str) -> Arm | None:
    return next((arm for arm in arms if arm.kind == kind), None)


def _deepcache_of(arm: Arm, ran: Mapping[Arm, Any]) -> Arm | None:
    """The DeepCache arm to compare with: one that caches as this arm does, or else the first."""
    theirs = [other for other in ran if other.kind == "deepcache"]
    alike = [o for o in theirs if (o.cache_interval, o.branch_id) == (arm.cache_interval, arm.branch_id)]
    return next(iter(alike or theirs), None)


def _compared(
    arm: Arm,
    results: Mapping[Arm, ArmResult],
    references: tuple[Arm | None, Arm | None],
    latents: Mapping[Arm, Tensor],
    pictures: Mapping[Arm, Tensor],
) -> ArmResult:
    """The arm's result with what it gains over eager and DeepCache, and how far what it draws is from eager's."""
    eager, deepcache = references
    own, psnr, error = results[arm], None, None
    if eager is not None and eager != arm:
        if {eager, arm} <= pictures.keys():
            psnr = _finite(min(psnr_db(pictures[arm], pictures[eager]), 200.0), 2)
        difference = (latents[arm] - latents[eager]).abs().max() / latents[eager].abs().max()
        error = _finite(difference.item(), 8)
    return replace(
        own,
        speedup_vs_eager=_speedup(own, results.get(eager) if eager else None),
        speedup_vs_deepcache=_speedup(own, results.get(deepcache) if deepcache else None),
        psnr_db_vs_eager=psnr,
        latents_error_vs_eager=error,
        latents_finite=bool(torch.isfinite(latents[arm]).all()),
    )


def _finite(value: float, digits: int) -> float | None:
    """A figure that JSON can hold."""
    return round(value, digits) if math.isfinite(value) else None


def _speedup(own: ArmResult, reference: ArmResult | None) -> float | None:
    if reference is None or reference.loop_ms_p50 is None or own.loop_ms_p50 is None:
        return None
    return round(reference.loop_ms_p50 / own.loop_ms_p50, 3)


def _decode(model: SourceModel, latents: Mapping[Arm, Tensor]) -> dict[Arm, Tensor]:
    if "vae" not in model.components:
        return {}
    vae: Any = model.load_vae()
    with torch.no_grad():
        return {
            arm: (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1) for arm, x in latents.items()
        }
