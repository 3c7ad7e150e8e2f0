"""`plan`: which steps refresh the cached feature, written to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastcache.commands.options import (
    EnginesOption,
    Json,
    Sampler,
    Steps,
    check_writable,
    generate_with,
    prompts_or_own,
)
from fastcache.console import next_step, print_json, progress
from fastcache.expect import number

if TYPE_CHECKING:
    from fastcache.bundle.manifest import Manifest
    from fastcache.loop.plan import CachePlan
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.planning.calibration import Calibration
    from fastcache.planning.ways import StepTimes


_FORMULAS = ("--uniform", "--nonuniform")
_CHOICES = ("--budget", "--max-latency-ms", "--frontier")
_WISHES = (*_FORMULAS, "--refreshes", *_CHOICES, "--threshold")


def plan(  # as long as its flags are many
    ctx: typer.Context,
    engines: EnginesOption,
    steps: Steps,
    output: Annotated[Path | None, typer.Option(help="The plan file to write (JSON).")] = None,
    sampler: Sampler = None,
    uniform: Annotated[int | None, typer.Option(min=1, help="A refresh every N U-Net calls.")] = None,
    nonuniform: Annotated[int | None, typer.Option(min=1, help="As many, dense around --center.")] = None,
    center: Annotated[float | None, typer.Option(help="The densest step; 0.3 of all if left out.")] = None,
    power: Annotated[float | None, typer.Option(help="How fast refreshes thin out; 1.4 if left out.")] = None,
    as_shipped: Annotated[bool, typer.Option("--as-shipped", help="As DeepCache's code has it.")] = False,
    refreshes: Annotated[int | None, typer.Option(min=1, help="The best plan of K refreshes.")] = None,
    budget: Annotated[float | None, typer.Option(help="The best fitted plan for so many full steps' time.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="The same for a loop's time here.")] = None,
    frontier: Annotated[Path | None, typer.Option(help="A folder for draft, standard, fine, and a chart.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Fit any other plan's rows, too.")] = False,
    reference_steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="To stay near; --steps if left out.")
    ] = None,
    reference_sampler: Annotated[str | None, typer.Option(help="To stay near; --sampler if left out.")] = None,
    calibration_images: Annotated[
        int, typer.Option(min=1, max=10**6, help="To fit on, a third of them left out.")
    ] = 12,
    choose_guidance: Annotated[
        bool, typer.Option("--choose-guidance", help="With --max-latency-ms: guidance may be left out where it pays.")
    ] = False,
    branch_id: Annotated[
        str | None,
        typer.Option(help="Of the bundle's branches those to use, by commas; its first, or for a latency all of them."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Refresh where changes add up to more (Block Caching).")
    ] = None,
    blocks: Annotated[
        bool,
        typer.Option("--blocks", help="With --threshold each by its own changes; else patterns may run."),
    ] = False,
    no_scale_shift: Annotated[
        bool, typer.Option("--no-scale-shift", help="With --blocks: reuse residuals as they are.")
    ] = False,
    chart: Annotated[Path | None, typer.Option(help="With --blocks: a picture of the schedule (PNG).")] = None,
    guidance_steps: Annotated[
        str | None, typer.Option(help="A:B, guidance at steps A to B-1; others cost half.")
    ] = None,
    forecast: Annotated[
        int | None, typer.Option(min=1, max=2, help="Extrapolate features: 1 linear, 2 squared.")
    ] = None,
    forecast_by: Annotated[str, typer.Option(help="Over the step, or the noise level (sigma).")] = "step",
    damping: Annotated[float | None, typer.Option(help="How much of it counts, 0 to 1; 1 if left out.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="To calibrate on, one a line; demo has its own.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, max=10**6, help="How many prompts to calibrate on, at most.")] = 8,
    guidance_scale: Annotated[float | None, typer.Option(help="While calibrating; the model's own.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="A kept one; else one is measured, and kept.")] = None,
    json_: Json = False,
) -> None:
    """Write a plan: which steps refresh the cached feature.

    --uniform and --nonuniform follow a formula; --refreshes finds the plan of least error, and --threshold follows the
    feature, both from a calibration, which takes minutes, once. --budget and --max-latency-ms choose which of the
    sampler's calls to visit at all, and fit the rows, so that the picture stays near that of --steps steps.

    Example: fastcache plan --engines demo-output/engines --steps 50 --sampler ddim --refreshes 10 --output plan.json
    """
    from fastcache.bundle.bundle import read_manifest
    from fastcache.commands.blocks import scheduled_blocks
    from fastcache.commands.fitted import fitted, show_frontier
    from fastcache.evaluate.evaluate import num_calls
    from fastcache.sampler.scheduler import own_sampler

    _check(wish := _wish(ctx.params), ctx.params)
    check_writable(output, frontier, chart)
    manifest = read_manifest(engines)
    branches = _branches(manifest, branch_id, several=wish in _CHOICES)
    sampler = ctx.params["sampler"] = sampler or own_sampler(manifest.model.scheduler)
    if frontier is not None:
        show_frontier(fitted(engines, branches, ctx.params)[1], frontier, as_json=json_)
        if not json_:
            next_step(generate_with(engines, manifest.model.name, f"--quality standard --plans {frontier}"))
        return
    if blocks and threshold is not None:
        made, details = scheduled_blocks(engines, ctx.params)
    elif wish in _CHOICES and not choose_guidance:
        made, details = fitted(engines, branches, ctx.params)
    elif wish in _FORMULAS:
        calls = num_calls(manifest, sampler, steps)
        made = _by_formula(calls, branches[0], uniform, nonuniform, center=center, power=power, as_shipped=as_shipped)
        made, details = replace(made, model=manifest.model.name, sampler=sampler), {}
    else:
        made, details = _by_measurement(engines, branches, ctx.params)
    made = _extended(made, manifest, guidance_steps, forecast, forecast_by, damping)
    if fit:
        made, told = fitted(engines, branches, ctx.params, made)
        details |= told
    if output is not None:
        _write(output, made, details, as_json=json_)
        if not json_:
            next_step(generate_with(engines, manifest.model.name, f"--plan {output}"))


def _write(output: Path, made: CachePlan, details: Mapping[str, Any], *, as_json: bool) -> None:
    from fastcache.files import write_whole

    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (made.to_json() + "\n").encode())
    if as_json:
        print_json(json.loads(made.to_json()) | details)
    else:
        _show(output, made, details)


def _wish(flags: Mapping[str, Any]) -> str:
    """The one flag that says which plan. Raises: `ValueError` for none or several."""
    given = [name for name in _WISHES if flags[name.removeprefix("--").replace("-", "_")] is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of {', '.join(_WISHES)}, got {' and '.join(given) or 'none'}")
    return given[0]


def _check(wish: str, flags: Mapping[str, Any]) -> None:
    """Raises: `ValueError` for flags that do not go together."""
    given = {name for name, value in flags.items() if value not in (None, False)}
    for name in given & {"threshold", "budget", "max_latency_ms"}:
        number(f"--{name.replace('_', '-')}", flags[name], 0)
    _check_blocks(wish, given)
    if wish != "--nonuniform" and given & {"center", "power", "as_shipped"}:
        raise ValueError(f"expected --center, --power and --as-shipped only with --nonuniform, got them with {wish}")
    if "choose_guidance" in given and (wish != "--max-latency-ms" or "guidance_steps" in given):
        raise ValueError("expected --choose-guidance with --max-latency-ms and without --guidance-steps, got otherwise")
    if flags["output"] is not None and flags["output"].is_dir():
        raise ValueError(f"expected --output to be a file, got the folder {flags['output']}; name a file in it")
    if ("output" in given) == (wish == "--frontier"):
        raise ValueError("expected --output with a file, or --frontier without one, got otherwise")
    if wish in _CHOICES and "choose_guidance" not in given and given & {"fit", "guidance_steps", "forecast"}:
        raise ValueError(f"expected {wish}, which fits its plan, without --fit, --guidance-steps and --forecast")
    if wish in _FORMULAS and ("calibration" in given or ("prompts" in given and "fit" not in given)):
        raise ValueError(f"expected --prompts and --calibration only with a plan that is measured, got {wish}")


def _check_blocks(wish: str, given: set[str]) -> None:
    """Raises: `ValueError` for flags that do not go with --blocks, or only with it."""
    scheduled = "blocks" in given and wish == "--threshold"
    if "blocks" in given and (wish not in (*_CHOICES, "--threshold") or "choose_guidance" in given):
        raise ValueError(
            f"expected --blocks with --threshold, {', '.join(_CHOICES)}, and without --choose-guidance, got otherwise"
        )
    if scheduled and given & {"branch_id", "calibration", "forecast"}:
        raise ValueError("expected --blocks --threshold without --branch-id, --calibration and --forecast, got both")
    if not scheduled and given & {"no_scale_shift", "chart"}:
        raise ValueError("expected --no-scale-shift and --chart only with --blocks --threshold, got them without")


def _by_measurement(
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


def _extended(
    made: CachePlan, manifest: Manifest, guidance_steps: str | None, order: int | None, by: str, damping: float | None
) -> CachePlan:
    """The plan with guidance in an interval and a forecast, where they are asked for, held against the bundle."""
    from fastcache.loop.features import check_reuse
    from fastcache.loop.plan import Forecast

    if order is None and (damping is not None or by != "step"):
        raise ValueError("expected --forecast-by and --damping only with --forecast, got one without")
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


def _show(output: Path, made: CachePlan, details: Mapping[str, Any]) -> None:
    from fastcache.cut.names import FULL, branch_of, is_pattern

    steps = ", ".join(map(str, made.refresh_steps))
    typer.echo(f"{output}: {len(made.refresh_steps)} of {made.num_steps} U-Net calls run in full: {steps}")
    shallow = [name for name in made.pass_names if name != FULL and not is_pattern(name)]
    for name in sorted(shallow) if len(shallow) > 1 else ():
        own = [str(step) for step, one in enumerate(made.passes) if one == name]
        typer.echo(f"at branch {branch_of(name)}: {', '.join(own)}")
    if made.unguided_steps:
        typer.echo(f"without guidance: {', '.join(map(str, made.unguided_steps))}")
    for name, value in details.items():
        typer.echo(f"{name.replace('_', ' ')}: {value}")
