"""`plan`: which steps refresh the cached feature, written to a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastcache.commands.options import EnginesOption, Json, Sampler, read_prompts
from fastcache.console import print_json, progress

if TYPE_CHECKING:
    from fastcache.bundle.manifest import Manifest
    from fastcache.loop.plan import CachePlan
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.planning.calibration import Calibration
    from fastcache.planning.ways import LoopTimes


def plan(
    engines: EnginesOption,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")],
    output: Annotated[Path, typer.Option(help="The plan file to write (JSON).")],
    sampler: Sampler = None,
    uniform: Annotated[int | None, typer.Option(min=1, help="A refresh every N U-Net calls.")] = None,
    nonuniform: Annotated[int | None, typer.Option(min=1, help="As many, dense around --center.")] = None,
    center: Annotated[float | None, typer.Option(help="The densest step; 0.3 of all if left out.")] = None,
    power: Annotated[float | None, typer.Option(help="How fast refreshes thin out; 1.4 if left out.")] = None,
    as_shipped: Annotated[bool, typer.Option("--as-shipped", help="As DeepCache's code has it.")] = False,
    refreshes: Annotated[int | None, typer.Option(min=1, help="The best plan of K refreshes.")] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="The best plan whose loop takes no longer here, at the bundle's usual batch.")
    ] = None,
    choose_guidance: Annotated[
        bool, typer.Option("--choose-guidance", help="With --max-latency-ms: guidance may be left out where it pays.")
    ] = False,
    branch_id: Annotated[
        str | None,
        typer.Option(help="Of the bundle's branches those to use, by commas; its first, or for a latency all of them."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="A refresh when the feature's relative changes add up to more (Block Caching).")
    ] = None,
    guidance_steps: Annotated[
        str | None, typer.Option(help="Guidance at the steps A to B-1 only, written A:B; the others cost half.")
    ] = None,
    forecast: Annotated[
        int | None, typer.Option(min=1, max=2, help="Extrapolate the cached feature, linearly (1) or squared (2).")
    ] = None,
    forecast_by: Annotated[
        str,
        typer.Option(help="Over the step's number (step), or its noise level (sigma): better on the bundled model."),
    ] = "step",
    damping: Annotated[float | None, typer.Option(help="How much of it counts, 0 to 1; 1 if left out.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to calibrate on, one a line; the bundled model has its own.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many prompts to calibrate on, at most.")] = 16,
    guidance_scale: Annotated[float | None, typer.Option(help="While calibrating; the model's own.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Use this calibration; without it one is measured and kept.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write a plan: which steps refresh the cached feature.

    --uniform and --nonuniform follow a formula. --refreshes and --max-latency-ms find the plan of least error, and
    --threshold follows the feature, all three from a calibration: full runs on a few prompts, which take minutes, once.

    Example: fastcache plan --engines demo-output/engines --steps 50 --sampler ddim --refreshes 10 --output plan.json
    """
    from fastcache.bundle.bundle import open_bundle, read_manifest
    from fastcache.evaluate.evaluate import num_calls
    from fastcache.files import write_whole
    from fastcache.loop.features import check_reuse
    from fastcache.loop.scheduler import own_sampler
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.planning.planning import kept_calibration, latency_plan, measure_loop, optimal_plan, threshold_plan

    wishes: dict[str, float | None] = {
        "--uniform": uniform,
        "--nonuniform": nonuniform,
        "--refreshes": refreshes,
        "--max-latency-ms": max_latency_ms,
        "--threshold": threshold,
    }
    given = [name for name, wish in wishes.items() if wish is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of {', '.join(wishes)}, got {' and '.join(given) or 'none'}")
    if nonuniform is None and (center is not None or power is not None or as_shipped):
        raise ValueError(
            f"expected --center, --power and --as-shipped only with --nonuniform, got them with {given[0]}"
        )
    if choose_guidance and (max_latency_ms is None or guidance_steps is not None):
        raise ValueError("expected --choose-guidance with --max-latency-ms and without --guidance-steps, got otherwise")
    branches = _branches(read_manifest(engines), branch_id, several=max_latency_ms is not None)
    details: dict[str, Any] = {}
    sampler = sampler or own_sampler(read_manifest(engines).model.scheduler)
    if uniform is not None or nonuniform is not None:
        if prompts is not None or calibration is not None:
            raise ValueError(f"expected --prompts and --calibration only with a plan that is measured, got {given[0]}")
        formula = (uniform, nonuniform, center, power, as_shipped)
        made = _by_formula(read_manifest(engines), sampler, steps, branches[0], *formula)
    else:
        with progress() as say:
            pipe = FastCachePipeline(open_bundle(engines))
            times = None
            guidance = pipe.bundle.manifest.model.defaults.guidance_scale if guidance_scale is None else guidance_scale
            if max_latency_ms is not None:
                say("timing full and shallow steps")
                times = measure_loop(pipe, sampler, steps, guidance, branches, guidance=choose_guidance)
                times.check(max_latency_ms, num_calls(pipe, sampler, steps))
            measured = kept_calibration(
                pipe,
                _prompts(pipe, prompts, num_prompts) if calibration is None else [],
                sampler=sampler,
                num_steps=steps,
                guidance_scale=guidance,
                guidance=choose_guidance,
                file=calibration,
                say=say,
            )
        if threshold is not None:
            made = threshold_plan(measured, branches[0], threshold)
        elif times is not None and max_latency_ms is not None:
            made = latency_plan(measured, times, max_latency_ms, guidance=choose_guidance)
        else:
            made = optimal_plan(measured, branches[0], refreshes or 1)
        details = _conditions(pipe, made, measured, times)
    made = _extended(made, guidance_steps, forecast, forecast_by, damping)
    check_reuse(made, read_manifest(engines).passes)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (made.to_json() + "\n").encode())
    if json_:
        print_json(json.loads(made.to_json()) | details)
        return
    steps_said = ", ".join(map(str, made.refresh_steps))
    typer.echo(f"{output}: {len(made.refresh_steps)} of {made.num_steps} U-Net calls run in full: {steps_said}")
    for branch in made.branch_ids if len(made.branch_ids) > 1 else ():
        typer.echo(f"at branch {branch}: {', '.join(str(s) for s, b in enumerate(made.branches) if b == branch)}")
    if made.unguided_steps:
        typer.echo(f"without guidance: {', '.join(map(str, made.unguided_steps))}")
    for name, value in details.items():
        typer.echo(f"{name.replace('_', ' ')}: {value}")


def _branches(manifest: Manifest, text: str | None, *, several: bool) -> list[int]:
    """The bundle's branches that the plan may use."""
    if text is None:
        return list(manifest.branches) if several else [manifest.branch_id]
    parts = text.split(",")
    named = sorted({int(part) for part in parts if part.strip().isdecimal()})
    if len(named) != len(parts) or not set(named) <= set(manifest.branches):
        built = ",".join(map(str, manifest.branches))
        raise ValueError(f"expected --branch-id out of {built}, which the bundle has, by commas, got {text!r}")
    if len(named) > 1 and not several:
        raise ValueError(f"expected several branches only with --max-latency-ms, got {text!r}; name one")
    return named


def _by_formula(
    manifest: Manifest,
    sampler: str,
    steps: int,
    branch_id: int,
    uniform: int | None,
    nonuniform: int | None,
    center: float | None,
    power: float | None,
    as_shipped: bool,
) -> CachePlan:
    from fastcache.loop.plan import CachePlan
    from fastcache.loop.scheduler import make_scheduler
    from fastcache.pipeline.schedule import Steps

    calls = len(Steps(steps).prepare(make_scheduler(sampler, manifest.model.scheduler)).timesteps)
    if uniform is not None:
        made = CachePlan.uniform(calls, uniform, branch_id)
    else:
        middle = 0.3 * calls if center is None else center
        made = CachePlan.nonuniform(calls, nonuniform or 1, middle, power or 1.4, branch_id, as_shipped)
    return replace(made, model=manifest.model.name, sampler=sampler)


def _extended(
    made: CachePlan, guidance_steps: str | None, order: int | None, by: str, damping: float | None
) -> CachePlan:
    """The plan with guidance in an interval and a forecast, where they are asked for."""
    from fastcache.loop.plan import Forecast

    if order is None and (damping is not None or by != "step"):
        raise ValueError("expected --forecast-by and --damping only with --forecast, got one without")
    if order is not None:
        made = replace(made, forecast=Forecast(order, 1.0 if damping is None else damping, cast(Any, by)))
    if guidance_steps is None:
        return made
    first, colon, end = guidance_steps.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal()):
        raise ValueError(f"expected --guidance-steps as A:B, two steps, got {guidance_steps!r}")
    return made.guided_within(int(first), int(end))


def _prompts(pipe: FastCachePipeline, file: Path | None, count: int) -> list[str]:
    from fastcache.evaluate.judges import calibration_prompts

    if file is not None:
        return read_prompts(file)[:count]
    if pipe.bundle.manifest.model.name != "demo":
        raise ValueError("expected --prompts with a model other than the bundled one, got none")
    return calibration_prompts(count)


def _conditions(
    pipe: FastCachePipeline, made: CachePlan, measured: Calibration, times: LoopTimes | None
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
