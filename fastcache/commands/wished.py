"""What `plan` makes of a wish that needs no fitting: by a formula, or by a calibration, and then extended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastcache.commands.options import prompts_or_own
from fastcache.console import progress

if TYPE_CHECKING:
    from fastcache.bundle.manifest import Manifest
    from fastcache.loop.plan import CachePlan
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.planning.calibration import Calibration
    from fastcache.planning.ways import StepTimes


def by_formula(
    calls: int,
    branch_id: int,
    uniform: int | None,
    nonuniform: int | None,
    *,
    center: float | None,
    power: float | None,
    as_shipped: bool,
) -> CachePlan:
    from fastcache.loop.plan import CachePlan

    if uniform is not None:
        return CachePlan.uniform(calls, uniform, branch_id)
    middle = 0.3 * calls if center is None else center
    return CachePlan.nonuniform(calls, nonuniform or 1, middle, 1.4 if power is None else power, branch_id, as_shipped)


def extended(
    made: CachePlan, manifest: Manifest, guidance_steps: str | None, order: int | None, by: str, damping: float | None
) -> CachePlan:
    """The plan with guidance in an interval and a forecast, where they are asked for, held against the bundle."""
    from fastcache.loop.features import check_reuse
    from fastcache.loop.plan import Forecast

    if order is None and (damping is not None or by != "step"):
        raise ValueError("expected --forecast-by and --damping only with --forecast, got one without; add --forecast 1")
    if order is not None:
        made = replace(made, forecast=Forecast(order, 1.0 if damping is None else damping, cast(Any, by)))
    if guidance_steps is None:
        check_reuse(made, manifest.passes)
        return made
    first, colon, end = guidance_steps.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal()):
        raise ValueError(f"expected --guidance-steps as A:B, two steps, got {guidance_steps!r}")
    try:
        made = made.guided_within(int(first), int(end))
        check_reuse(made, manifest.passes)
    except ValueError as error:
        raise ValueError(f"--guidance-steps: {error}") from None
    return made


def by_measurement(
    engines: Path, branches: Sequence[int], flags: Mapping[str, Any]
) -> tuple[CachePlan, dict[str, Any]]:
    """The plan that the flags wish for, from a calibration, and what it was made from."""
    from fastcache.bundle.bundle import open_bundle
    from fastcache.evaluate.evaluate import num_calls
    from fastcache.evaluate.judges import calibration_prompts
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.planning.planning import kept_calibration, latency_plan, measure_loop, optimal_plan, threshold_plan

    sampler, steps, choosing = flags["sampler"], flags["steps"], flags["choose_guidance"]
    latency_ms: float | None = flags["max_latency_ms"]
    given, kept = (None if flags[name] is None else Path(flags[name]) for name in ("prompts", "calibration"))
    with progress() as say:
        pipe, prompts, most = FastCachePipeline(open_bundle(engines)), list[str](), flags["num_prompts"]
        usual, wanted = pipe.bundle.manifest.model.defaults.guidance_scale, flags["guidance_scale"]
        guidance = usual if wanted is None else wanted
        times = None
        if latency_ms is not None:
            say("timing full and shallow steps")
            times = measure_loop(pipe, sampler, steps, guidance, branches, guidance=choosing)
            times.check(latency_ms, num_calls(pipe.bundle.manifest, sampler, steps))
        if kept is None:
            prompts = prompts_or_own(given, pipe.bundle.manifest, lambda: calibration_prompts(most))[:most]
        measured = kept_calibration(
            pipe,
            prompts,
            sampler=sampler,
            num_steps=steps,
            guidance_scale=guidance,
            guidance=choosing,
            file=kept,
            say=say,
        )
    if times is not None and latency_ms is not None:
        made = latency_plan(measured, times, latency_ms, guidance=choosing)
    elif flags["threshold"] is not None:
        made = threshold_plan(measured, branches[0], flags["threshold"])
    else:
        made = optimal_plan(measured, branches[0], flags["refreshes"])
    return made, _conditions(pipe, measured, made, times)


def _conditions(
    pipe: FastCachePipeline, measured: Calibration, made: CachePlan, times: StepTimes | None
) -> dict[str, Any]:
    """What the plan was made from, and for a latency what was timed."""
    found: dict[str, Any] = {"calibration_samples": len(measured.samples)}
    if times is not None:
        manifest = pipe.bundle.manifest
        found |= {
            "expected_loop_ms": round(times.loop_ms(made), 1),
            "full_step_ms": round(times.full_ms, 3),
            "shallow_step_ms": {str(branch): round(ms, 3) for branch, ms in times.shallow_ms.items()},
            "unguided_step_ms": {"full" if b is None else str(b): round(ms, 3) for b, ms in times.unguided_ms.items()},
            "timed_at": f"batch {times.batch}, {manifest.backend} {manifest.dtype} on {manifest.device}",
        }
    return found
