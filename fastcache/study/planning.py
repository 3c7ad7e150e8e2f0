"""A bundle and a calibration -> plans: optimal for a number of refreshes or a time, or by a threshold on change.

Calibrations are kept on disk by what they hold for. Knows what a plan is made from; how the search goes is the business
of `search.py`, and how errors and gains are measured that of `calibrate.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastcache.bundle import write_whole
from fastcache.run.pipeline import FastCachePipeline
from fastcache.run.plan import CachePlan
from fastcache.study.calibrate import Calibration, calibrate_bundle
from fastcache.study.evaluate import num_calls, timed_loop
from fastcache.study.search import (
    descend,
    interval_costs,
    moved,
    optimal_choices,
    optimal_refreshes,
    threshold_refreshes,
)

Say = Callable[[str], None]
_TICKS = 20_000  # in which a latency is counted: rounding 50 steps up leaves at most 0.25% of it unused
_LEAST_MOVED = 1e-12  # mean square; 120 dB, for a plan in which every step runs in full


def optimal_plan(calibration: Calibration, branch_id: int, refreshes: int) -> CachePlan:
    """The plan that is expected to move the calibration's pictures least, of all with as many refreshes.

    Intervals are chosen by dynamic programming, exactly, for the sum of what each alone does. From there single
    refreshes are moved for as long as that lowers the whole plan's effect: the mean over samples of its logarithm,
    which PSNR is. None of it runs the model.
    Raises: `ValueError` for a number of refreshes that no plan has, or a calibration without gains.
    """
    _check_gains(calibration)
    errors, couplings = calibration.errors[:, calibration.branch(branch_id)], calibration.couplings
    start = optimal_refreshes(interval_costs(errors, couplings), refreshes)

    def decibels(steps: Sequence[int]) -> float:
        return float(10 * np.log10(moved(errors, couplings, steps) + _LEAST_MOVED).mean())

    steps = descend(start, calibration.num_calls, decibels)
    branches = CachePlan.from_refresh_steps(calibration.num_calls, steps, branch_id).branches
    return _plan(calibration, branches, f"optimal(refreshes={refreshes}")


def latency_plan(calibration: Calibration, times: LoopTimes, latency_ms: float) -> CachePlan:
    """The plan that is expected to move the pictures least, of all whose loop takes no longer.

    Every interval between refreshes runs at one depth, out of the branches that were calibrated and timed.
    Raises: `ValueError` where even the fastest plan takes longer, or for a calibration without gains.
    """
    _check_gains(calibration)
    times.check(latency_ms, calibration.num_calls)
    # couplings are measured with errors of the first branch: what the others' do is taken to point the same way
    costs = [
        interval_costs(calibration.errors[:, calibration.branch(branch)], calibration.couplings)
        for branch in times.shallow_ms
    ]
    prices = [math.ceil(_TICKS * ms / latency_ms) for ms in (times.full_ms, *times.shallow_ms.values())]
    fastest = prices[0] + (calibration.num_calls - 1) * min(prices)  # within the latency, but for rounding up
    choices = optimal_choices(np.stack(costs), prices[0], prices[1:], max(_TICKS, fastest))
    branches = list(times.shallow_ms)
    plan = tuple(None if choice is None else branches[choice] for choice in choices)
    return _plan(calibration, plan, f"optimal(max_latency_ms={latency_ms:g}")


def threshold_plan(calibration: Calibration, branch_id: int, threshold: float) -> CachePlan:
    """Block Caching's rule on the relative change of the cached feature from step to step."""
    steps = threshold_refreshes(calibration.change[calibration.branch(branch_id)], threshold)
    branches = CachePlan.from_refresh_steps(calibration.num_calls, steps, branch_id).branches
    return _plan(calibration, branches, f"threshold(threshold={threshold:g}")


def _check_gains(calibration: Calibration) -> None:
    if not calibration.has_gains:
        raise ValueError("expected a calibration with gains, got one without; measure it again with gains")


def _plan(calibration: Calibration, branches: tuple[int | None, ...], made_by: str) -> CachePlan:
    conditions = calibration.conditions
    made_by += f", guidance_scale={conditions.guidance_scale:g}, samples={len(calibration.samples)})"
    return CachePlan(branches, model=conditions.model, sampler=conditions.sampler, made_by=made_by)


@dataclass(frozen=True)
class LoopTimes:
    """What a U-Net call and all that a step does besides take on this machine: in full, and shallow by branch id."""

    full_ms: float
    shallow_ms: dict[int, float]
    batch: int

    def loop_ms(self, plan: CachePlan) -> float:
        return sum(self.full_ms if branch is None else self.shallow_ms[branch] for branch in plan.branches)

    def check(self, latency_ms: float, calls: int) -> None:
        """Raises: `ValueError` where even the fastest plan takes longer."""
        least = self.full_ms + (calls - 1) * min(self.full_ms, *self.shallow_ms.values())
        if not least <= latency_ms:
            raise ValueError(
                f"expected --max-latency-ms of {least:.1f} or more, which {calls} U-Net calls with one refresh take at "
                f"batch {self.batch} on this machine, got {latency_ms:g}; take fewer steps"
            )


def measure_loop(
    pipe: FastCachePipeline, sampler: str, num_steps: int, guidance_scale: float, repeats: int = 5
) -> LoopTimes:
    """Times of full and shallow steps, from loops run in turn: all steps in full, and all but the first shallow."""
    manifest = pipe.bundle.manifest
    batch, calls = manifest.profiles["batch"].opt, num_calls(pipe, sampler, num_steps)
    plans = {None: CachePlan.all_full(calls)} | {b: CachePlan.uniform(calls, calls, b) for b in manifest.branches}
    times: dict[int | None, list[float]] = {branch: [] for branch in plans}
    for _ in range(1 + repeats):  # the first round warms up
        for branch, plan in plans.items():
            run = pipe.begin(
                [""] * batch,
                num_inference_steps=num_steps,
                plan=plan,
                sampler=sampler,
                generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
                guidance_scale=guidance_scale,
                whole=True,
            )
            times[branch].append(timed_loop(run)[1])
    loops = {branch: statistics.median(own[1:]) for branch, own in times.items()}
    full_ms = loops[None] / calls
    shallow_ms = {b: (loops[b] - full_ms) / (calls - 1) if calls > 1 else full_ms for b in manifest.branches}
    return LoopTimes(full_ms, shallow_ms, batch)


def kept_calibration(
    pipe: FastCachePipeline,
    prompts: Sequence[str],
    *,
    sampler: str,
    num_steps: int,
    guidance_scale: float,
    file: Path | None = None,
    say: Say = lambda _: None,
) -> Calibration:
    """The calibration in a file, or else one made before on this bundle, these prompts and this run, or a new one.

    Raises: `ValueError` for a file that is no calibration, or one of another model, sampler or number of steps.
    """
    if file is not None:
        return _read(file, pipe, sampler, num_steps, guidance_scale)
    import platformdirs

    manifest = pipe.bundle.manifest
    wish = [manifest.bundle_sha256, sampler, num_steps, guidance_scale, *prompts]
    key = hashlib.sha256(json.dumps(wish).encode()).hexdigest()
    kept = Path(platformdirs.user_cache_dir("fastcache")) / "calibrations" / f"{key[:32]}.json"
    if kept.is_file():
        say(f"calibration kept in {kept}")
        return _read(kept, pipe, sampler, num_steps, guidance_scale)
    made = calibrate_bundle(pipe, prompts, sampler=sampler, num_steps=num_steps, guidance_scale=guidance_scale, say=say)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, made.to_json().encode())
    say(f"calibration kept in {kept}")
    return made


def _read(file: Path, pipe: FastCachePipeline, sampler: str, num_steps: int, guidance_scale: float) -> Calibration:
    try:
        calibration = Calibration.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a calibration file, got {file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    own, manifest = calibration.conditions, pipe.bundle.manifest
    wanted = {
        "weights_sha256": manifest.weights_sha256,
        "sampler": sampler,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "height": manifest.height,
        "width": manifest.width,
    }
    for name, value in wanted.items():
        if getattr(own, name) != value:
            raise ValueError(
                f"expected a calibration for {name} {value}, got {file} for {getattr(own, name)}; measure another"
            )
    for branch_id in manifest.branches:
        calibration.branch(branch_id)
    return calibration
