"""A bundle and a calibration -> plans: optimal for a number of refreshes or a time, or by a threshold on change.

Calibrations are kept on disk by what they hold for. Knows what a plan is made from; how the search goes is the business
of `search.py`, and how errors and gains are measured that of `calibrate.py`.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcache.evaluate.evaluate import num_calls, timed_loop
from fastcache.files import write_whole
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.request import Request
from fastcache.planning.calibrate import calibrate_bundle
from fastcache.planning.calibration import Calibration
from fastcache.planning.search import (
    Intervals,
    descend,
    interval_moves,
    least_price,
    moved,
    optimal_intervals,
    optimal_refreshes,
    refresh_moves,
    threshold_refreshes,
)
from fastcache.planning.ways import StepTimes, Way, expected_moves, plan_of, prices, way_costs, ways_of

Say = Callable[[str], None]
_TICKS = 20_000  # in which a latency is counted: rounding 50 intervals up leaves at most 0.25% of it unused
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
    start = optimal_refreshes(way_costs(calibration, Way((branch_id,))), refreshes)
    calls = calibration.num_calls
    steps = descend(
        start, lambda steps: refresh_moves(steps, calls), lambda steps: _decibels(moved(errors, couplings, steps))
    )
    made = CachePlan.from_refresh_steps(calls, steps, branch_id)
    return _named(made, calibration, f"optimal(refreshes={refreshes}")


def latency_plan(calibration: Calibration, times: StepTimes, latency_ms: float, *, guidance: bool = False) -> CachePlan:
    """The plan that is expected to move the pictures least, of all whose loop takes no longer.

    Every interval between refreshes runs in its own way: at one depth out of the branches that were timed, or at the
    shallowest with a deeper step now and then; with `guidance` also without guidance, throughout or but for its
    refresh. The search is that of `optimal_plan`: exact over intervals, then from the whole plan's effect.
    Raises: `ValueError` where even the fastest plan takes longer, or for a calibration without gains or, with
    `guidance`, without what leaving it out does.
    """
    _check_gains(calibration)
    if guidance and not (calibration.has_unguided and times.unguided_ms):
        raise ValueError("expected a calibration and times of steps without guidance, got none; measure them again")
    calls = calibration.num_calls
    times.check(latency_ms, calls)
    # couplings are measured with errors of the first branch: what the others' do is taken to point the same way
    ways = ways_of(list(times.shallow_ms), guidance=guidance)
    costs = np.stack([way_costs(calibration, way) for way in ways])
    ticks = prices(times, ways, calls, latency_ms / _TICKS)
    budget = max(_TICKS, least_price(ticks))  # the fastest plan is within the latency, but for rounding up
    found = optimal_intervals(costs, ticks, budget)

    def moves(intervals: Intervals) -> Iterator[Intervals]:
        for candidate in interval_moves(intervals, calls, len(ways)):
            if times.loop_ms(plan_of(candidate, ways, calls)) <= latency_ms:
                yield candidate

    best = descend(
        found, moves, lambda intervals: _decibels(expected_moves(calibration, plan_of(intervals, ways, calls)))
    )
    return _named(plan_of(best, ways, calls), calibration, f"optimal(max_latency_ms={latency_ms:g}")


def _decibels(mean_squares: npt.NDArray[np.floating]) -> float:
    return float(10 * np.log10(mean_squares + _LEAST_MOVED).mean())


def threshold_plan(calibration: Calibration, branch_id: int, threshold: float) -> CachePlan:
    """Block Caching's rule on the relative change of the cached feature from step to step."""
    steps = threshold_refreshes(calibration.change[calibration.branch(branch_id)], threshold)
    made = CachePlan.from_refresh_steps(calibration.num_calls, steps, branch_id)
    return _named(made, calibration, f"threshold(threshold={threshold:g}")


def _check_gains(calibration: Calibration) -> None:
    if not calibration.has_gains:
        raise ValueError("expected a calibration with gains, got one without; measure it again with gains")


def _named(made: CachePlan, calibration: Calibration, made_by: str) -> CachePlan:
    conditions = calibration.conditions
    made_by += f", guidance_scale={conditions.guidance_scale:g}, samples={len(calibration.samples)})"
    return replace(made, model=conditions.model, sampler=conditions.sampler, made_by=made_by)


def measure_loop(
    pipe: FastCachePipeline,
    sampler: str,
    num_steps: int,
    guidance_scale: float,
    branch_ids: Sequence[int] | None = None,
    *,
    guidance: bool = False,
    repeats: int = 5,
) -> StepTimes:
    """Times of full and shallow steps, from loops run in turn: all steps in full, and all but the first shallow.

    With `guidance` also of such loops without it.
    """
    manifest = pipe.bundle.manifest
    branches = branch_ids or manifest.branches
    batch, calls = manifest.profiles["batch"].opt, num_calls(manifest, sampler, num_steps)
    guided = {None: CachePlan.all_full(calls)} | {b: CachePlan.uniform(calls, calls, b) for b in branches}
    plans = {(True, branch): plan for branch, plan in guided.items()}
    if guidance:
        plans |= {(False, b): replace(plan, unguided_steps=tuple(range(calls))) for b, plan in guided.items()}
    times: dict[tuple[bool, int | None], list[float]] = {key: [] for key in plans}
    for _ in range(1 + repeats):  # the first round warms up
        for key, plan in plans.items():
            request = Request(
                [""] * batch,
                num_inference_steps=num_steps,
                plan=plan,
                sampler=sampler,
                seed=0,
                guidance_scale=guidance_scale,
            )
            run = pipe.begin(request, whole=True)
            times[key].append(timed_loop(run)[1])
    loops = {key: statistics.median(own[1:]) for key, own in times.items()}
    each = {on: _step_times({b: ms for (own, b), ms in loops.items() if own == on}, calls) for on in (True, False)}
    full_ms = each[True].pop(None)
    return StepTimes(full_ms, {b: ms for b, ms in each[True].items() if b is not None}, batch, each[False])


def _step_times(loops: dict[int | None, float], calls: int) -> dict[int | None, float]:
    """What a step takes at each branch, from the loop in full, and those with one step in full."""
    if not loops:
        return {}
    full_ms = loops[None] / calls
    return {b: (ms - full_ms) / (calls - 1) if b is not None and calls > 1 else full_ms for b, ms in loops.items()}


def kept_calibration(
    pipe: FastCachePipeline,
    prompts: Sequence[str],
    *,
    sampler: str,
    num_steps: int,
    guidance_scale: float,
    guidance: bool = False,
    file: Path | None = None,
    say: Say = lambda _: None,
) -> Calibration:
    """The calibration in a file, or else one made before on this bundle, these prompts and this run, or a new one.

    With `guidance` it also has what leaving out guidance does.
    Raises: `ValueError` for a file that is no calibration, or one of another model, sampler or number of steps.
    """
    if file is not None:
        return _read(file, pipe, sampler, num_steps, guidance_scale)
    import platformdirs

    manifest = pipe.bundle.manifest
    wish = [manifest.bundle_sha256, sampler, num_steps, guidance_scale, *["guidance"] * guidance, *prompts]
    key = hashlib.sha256(json.dumps(wish).encode()).hexdigest()
    kept = Path(platformdirs.user_cache_dir("fastcache")) / "calibrations" / f"{key[:32]}.json"
    if kept.is_file():
        say(f"calibration kept in {kept}")
        return _read(kept, pipe, sampler, num_steps, guidance_scale)
    made = calibrate_bundle(
        pipe,
        prompts,
        sampler=sampler,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        guidance=guidance,
        say=say,
    )
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
