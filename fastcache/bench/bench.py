"""Arms (PyTorch eager, the DeepCache package, torch.compile, engines with and without caching) -> times side by side.

The arms take turns, round by round, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcache.bench.arms import PROMPT, TORCH, Arm, BenchSettings
from fastcache.bench.eager import EagerParts, control_pattern
from fastcache.bench.lineup import BundleKey, Lineup, precision_of
from fastcache.bench.loops import Task, TimedRun
from fastcache.bench.machine import environment, gpus
from fastcache.bench.work import geometry
from fastcache.bench.workers import ArmFailed, Workers
from fastcache.bundle.bundle import Bundle
from fastcache.compile.models import SourceModel, find_model
from fastcache.evaluate.quality import psnr_db

_STEADY = 1.25  # p90 over p50; on a quiet machine it stays below 1.05
_BUSY = 0.25  # of the cores: load before anything of ours ran, which a quiet machine has near 0


@dataclass(frozen=True)
class ArmResult:
    """An arm's medians over the repeats; `skipped` says why there are none.

    `build_s` is what making an engine took, and for torch.compile its first U-Net call, in which it compiles.
    A loop that is one CUDA graph has no times of its U-Net calls, and so none of what is beside them.
    Speed-ups are over the reference in fp32, and over the arm of this one's own dtype; over the DeepCache arm that
    caches as this one does, where there is one. `latents_error_vs_eager` is the largest difference over the largest
    latent; none where a latent is not finite.
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
    speedup_vs_eager_same_dtype: float | None = None
    speedup_vs_deepcache_same_dtype: float | None = None
    psnr_db_vs_eager: float | None = None
    latents_error_vs_eager: float | None = None
    latents_finite: bool | None = None
    peak_bytes: int | None = None
    build_s: float | None = None
    skipped: str | None = None

    @property
    def unsteady(self) -> bool:
        """Whether some rounds took so much longer than others that the medians mean little."""
        times = self.loop_ms_p50, self.loop_ms_p90
        return times[0] is not None and times[1] is not None and times[1] > _STEADY * times[0]

    def to_json(self) -> dict[str, Any]:
        if self.skipped is not None:
            return {"name": self.name, "skipped": self.skipped}
        return {name: value for name, value in asdict(self).items() if name != "skipped"} | {"unsteady": self.unsteady}


@dataclass(frozen=True)
class BenchOutcome:
    """A benchmark's outcome: an arm's result each, and what the measuring itself did and met.

    `references` names the arms that speed-ups are over. `reloads` counts the processes that were ended for want of
    memory and started again. `machine` has the GPUs before and after.
    """

    results: tuple[ArmResult, ...]
    references: Mapping[str, str | None]
    reloads: int
    machine: Mapping[str, Any]


def run_bench(
    settings: BenchSettings, lineup: Lineup, bundles: Mapping[BundleKey, Bundle], say: Callable[[str], None]
) -> BenchOutcome:
    """Warm up and time every arm, one round after the other."""
    model = find_model(settings.model, random_weights=settings.random_weights)
    before = gpus() if settings.device == "cuda" else []
    tasks = _tasks(settings, model, lineup, bundles)
    # Arms of one process follow each other, so that a process is not ended and started again within a round.
    order = [arm for key in tasks for arm in lineup.arms if _worker_of(arm) == key and arm not in lineup.skipped]
    with Workers(tasks, _worker_of) as workers:
        runs, first, failed = _run_rounds(settings, order, workers, say)
    skipped = {**lineup.skipped, **failed}
    ran = {arm: own for arm, own in runs.items() if own and arm not in skipped}
    results = {arm: summary(arm, own, _build_s(arm, first[arm], bundles)) for arm, own in ran.items()}
    latents = {arm: own[-1].latents for arm, own in ran.items()}
    eager = usual_reference("eager", ran)
    compared = _quality(latents, {} if model.random_weights else _decode(model, latents), eager)
    return BenchOutcome(
        tuple(
            ArmResult(arm.name, skipped=skipped[arm])
            if arm in skipped
            else replace(results[arm], **compared[arm], **_speedups(arm, results))
            for arm in lineup.arms
        ),
        {kind: arm.name if (arm := usual_reference(kind, ran)) else None for kind in ("eager", "deepcache")},
        workers.reloads,
        {"gpus": {"before": before, "after": gpus()}} if settings.device == "cuda" else {},
    )


def _run_rounds(
    settings: BenchSettings, order: Sequence[Arm], workers: Workers, say: Callable[[str], None]
) -> tuple[dict[Arm, list[TimedRun]], dict[Arm, TimedRun], dict[Arm, str]]:
    """Each arm's timed runs, its first run, and why some arms failed."""
    runs: dict[Arm, list[TimedRun]] = {arm: [] for arm in order}
    first: dict[Arm, TimedRun] = {}
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


def doubts(results: Sequence[ArmResult], load_before: float | None, cores: int) -> list[str]:
    """Why the figures may mean nothing, a sentence each."""
    found: list[str] = []
    if load_before is not None and load_before > _BUSY * cores:
        found.append(
            f"other programs were running: the load was {load_before:g} on {cores} cores before the benchmark began"
        )
    if shaken := [result.name for result in results if result.unsteady]:
        found.append(f"some rounds took over {_STEADY:g} times the median, marked (?): {', '.join(shaken)}")
    return found


def document(
    settings: BenchSettings,
    bundles: Mapping[BundleKey, Bundle],
    measured: BenchOutcome,
    load_before: float | None = None,
) -> dict[str, Any]:
    """A benchmark as JSON: the machine, what was asked for, each arm's figures, and what makes them doubtful.

    `load_before` is the machine's load before anything was built.
    """
    conditions = {
        "arms": [result.name for result in measured.results],
        "guidance_scale": settings.guidance_scale if settings.guided else None,
        "references": dict(measured.references),
        "reloads": measured.reloads,
        "bundles": [
            {
                "name": bundle.path.name,
                "backend": bundle.manifest.backend,
                "dtype": precision_of(bundle.manifest),
                "branch_id": bundle.manifest.branch_id,
                "bundle_sha256": bundle.manifest.bundle_sha256,
                "build_seconds": bundle.manifest.build_seconds,
            }
            for bundle in bundles.values()
        ],
        "quality": "random weights: no quality figure" if settings.random_weights else "PSNR of the decoded images",
    }
    machine = environment(settings.threads)
    return {
        "environment": {**machine, "load_average_before": load_before, **measured.machine},
        "settings": {**asdict(settings), **conditions},
        "doubts": doubts(measured.results, load_before, machine["cores"]),
        "arms": [result.to_json() for result in measured.results],
    }


def make_inputs(model: SourceModel, settings: BenchSettings) -> dict[str, Tensor]:
    """The conditioning and the noise that all arms share: a real prompt for a real model, else seeded random rows.

    Shapes: `encoder_hidden_states` and further conditioning (2N, ...), unconditional rows first, these twice for
    InstructPix2Pix, and no conditioning at all for a U-Net that takes none; `latents` (N, C, h, w); `control_image`
    (1, 3, H, W) where there are ControlNets.
    """
    shapes, generator = geometry(model), torch.Generator().manual_seed(0)
    size = settings.height // shapes.scale, settings.width // shapes.scale
    latents = torch.randn(settings.batch, shapes.latent_channels, *size, generator=generator)
    parts = EagerParts(model, shapes)
    inputs = {"latents": latents, **parts.conditioning([PROMPT] * settings.batch, settings.height, settings.width)}
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


def _tasks(
    settings: BenchSettings, model: SourceModel, lineup: Lineup, bundles: Mapping[BundleKey, Bundle]
) -> dict[str, Task]:
    """What each process is for, in the order in which their first arms come."""
    inputs, tasks = make_inputs(model, settings), dict[str, Task]()
    weights_bytes = geometry(model).weights_bytes
    for arm in lineup.arms:
        if arm in lineup.skipped or _worker_of(arm) in tasks:
            continue
        task = Task(settings, inputs, "fp32" if arm.dtype == "int8" else arm.dtype, weights_bytes=weights_bytes)
        if arm.is_engine:
            bundle = bundles[arm.bundle_key]
            own = bundle.manifest.weights_bytes
            task = replace(task, bundle=str(bundle.path), cuda_graph=arm.is_graph, weights_bytes=own)
        tasks[_worker_of(arm)] = task
    return tasks


def _build_s(arm: Arm, first: TimedRun, bundles: Mapping[BundleKey, Bundle]) -> float | None:
    if arm.is_engine:
        return bundles[arm.bundle_key].manifest.build_seconds
    return round(first.call_ms[0] / 1e3, 2) if arm.kind == "compile" else None


def summary(arm: Arm, runs: Sequence[TimedRun], build_s: float | None = None) -> ArmResult:
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
        loop_ms_p90=round(float(np.quantile(loops, 0.9, method="inverted_cdf")), 3),  # of few rounds, one of them
        full_step_ms_p50=round(statistics.median(full), 3) if full else None,
        shallow_step_ms_p50=round(statistics.median(shallow), 3) if shallow else None,
        overhead_ms_per_step=round(statistics.median(overheads), 4) if overheads else None,
        peak_bytes=max(peaks, default=None),
        build_s=build_s,
    )


def usual_reference(kind: str, arms: Iterable[Arm]) -> Arm | None:
    """The first arm of a kind in fp32, or else the first of all."""
    own = [arm for arm in arms if arm.kind == kind]
    return next((arm for arm in own if arm.dtype == "fp32"), next(iter(own), None))


def reference_like(arm: Arm, kind: str, arms: Iterable[Arm]) -> Arm | None:
    """The arm of a kind in an arm's own dtype; of several the one that caches as it does."""
    own = [other for other in arms if (other.kind, other.dtype) == (kind, arm.dtype)]
    alike = (o for o in own if (o.cache_interval, o.branch_id) == (arm.cache_interval, arm.branch_id))
    return next(alike, next(iter(own), None))


def _speedups(arm: Arm, results: Mapping[Arm, ArmResult]) -> dict[str, float | None]:
    """How much faster the arm's loop is than PyTorch's, plain and with the DeepCache package."""
    found: dict[str, float | None] = {}
    for kind in ("eager", "deepcache"):
        usual = reference_like(replace(arm, dtype="fp32"), kind, results) or usual_reference(kind, results)
        for name, other in (("", usual), ("_same_dtype", reference_like(arm, kind, results))):
            found[f"speedup_vs_{kind}{name}"] = _speedup(results[arm], results[other] if other else None)
    return found


def _speedup(own: ArmResult, reference: ArmResult | None) -> float | None:
    if reference is None or reference.loop_ms_p50 is None or own.loop_ms_p50 is None:
        return None
    return round(reference.loop_ms_p50 / own.loop_ms_p50, 3)


def _quality(
    latents: Mapping[Arm, Tensor], pictures: Mapping[Arm, Tensor], eager: Arm | None
) -> dict[Arm, dict[str, Any]]:
    """How far what each arm draws is from what eager draws."""
    found = {arm: dict[str, Any](latents_finite=bool(torch.isfinite(own).all())) for arm, own in latents.items()}
    for arm in found:
        if eager is None or arm == eager:
            continue
        if {eager, arm} <= pictures.keys():
            found[arm]["psnr_db_vs_eager"] = _finite(min(psnr_db(pictures[arm], pictures[eager]), 200.0), 2)
        difference = (latents[arm] - latents[eager]).abs().max() / latents[eager].abs().max()
        found[arm]["latents_error_vs_eager"] = _finite(difference.item(), 8)
    return found


def _finite(value: float, digits: int) -> float | None:
    """A figure that JSON can hold."""
    return round(value, digits) if math.isfinite(value) else None


def _decode(model: SourceModel, latents: Mapping[Arm, Tensor]) -> dict[Arm, Tensor]:
    if "vae" not in model.components:
        return {}
    parts = EagerParts(model, geometry(model))
    return {arm: parts.decode(own) for arm, own in latents.items()}
