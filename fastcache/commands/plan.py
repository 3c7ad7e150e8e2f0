"""`plan`: which steps refresh the cached feature, written to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcache.commands.options import (
    EnginesOption,
    Json,
    Sampler,
    Steps,
    check_writable,
    flags_of,
    generate_with,
)
from fastcache.console import next_step, print_json
from fastcache.expect import number

if TYPE_CHECKING:
    from fastcache.bundle.manifest import Manifest
    from fastcache.loop.plan import CachePlan


_FORMULAS = ("--uniform", "--nonuniform")
_CHOICES = ("--budget", "--max-latency-ms", "--frontier")
_WISHES = (*_FORMULAS, "--refreshes", *_CHOICES, "--threshold")


def plan(  # as long as its flags are many
    ctx: typer.Context,
    engines: EnginesOption,
    steps: Steps,
    output: Annotated[Path | None, typer.Option(help="The plan file to write (JSON).")] = None,
    sampler: Sampler = None,
    uniform: Annotated[int | None, typer.Option(min=1, help="A full step every N U-Net calls.")] = None,
    nonuniform: Annotated[
        int | None, typer.Option(min=1, help="As many full steps as --uniform N, dense around --center.")
    ] = None,
    center: Annotated[
        float | None, typer.Option(help="The step around which full steps are densest; 0.3 of all steps if left out.")
    ] = None,
    power: Annotated[
        float | None, typer.Option(help="How fast full steps thin out away from it; 1.4 if left out.")
    ] = None,
    as_shipped: Annotated[
        bool, typer.Option("--as-shipped", help="The formula of DeepCache's code, which differs from its paper's.")
    ] = False,
    refreshes: Annotated[int | None, typer.Option(min=1, help="The plan of K full steps with the least error.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="The best fitted plan that takes the time of X full steps.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="The best fitted plan whose loop takes so many ms on this machine.")
    ] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="A folder to write draft.json, standard.json, fine.json and a chart into.")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Also fit the weights of any other plan's updates.")] = False,
    reference_steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="The steps of the run that a fitted plan stays near; --steps if left out."),
    ] = None,
    reference_sampler: Annotated[
        str | None, typer.Option(help="The sampler of that run; --sampler if left out.")
    ] = None,
    calibration_images: Annotated[
        int,
        typer.Option(min=1, max=10**6, help="How many pictures to draw; two thirds fit, a third chooses and checks."),
    ] = 20,
    choose_guidance: Annotated[
        bool,
        typer.Option("--choose-guidance", help="With --max-latency-ms: guidance may be off in steps where that pays."),
    ] = False,
    branch_id: Annotated[
        str | None,
        typer.Option(help="Which of the bundle's cuts to use, by commas. If left out its first, or for a latency all."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="A full step wherever the feature's changes add up to more than D.")
    ] = None,
    blocks: Annotated[
        bool,
        typer.Option(
            "--blocks", help="With --threshold, each block by its own changes; with the others, blocks may be left out."
        ),
    ] = False,
    no_scale_shift: Annotated[
        bool,
        typer.Option("--no-scale-shift", help="With --blocks --threshold: reuse what blocks add as it is, unscaled."),
    ] = False,
    chart: Annotated[
        Path | None, typer.Option(help="With --blocks --threshold: draw the schedule into this PNG file.")
    ] = None,
    guidance_steps: Annotated[
        str | None, typer.Option(help="A:B, guidance in steps A to B-1 only; the other steps cost half.")
    ] = None,
    forecast: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2,
            help="Foretell features from earlier ones instead of reusing them: 1 by a line, 2 by a parabola.",
        ),
    ] = None,
    forecast_by: Annotated[
        str, typer.Option(help="What the line is drawn over: step, or sigma (the noise level).")
    ] = "step",
    damping: Annotated[
        float | None, typer.Option(help="How much of the forecast counts, 0 to 1; 1 if left out.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file of prompts to measure on, one a line. The bundled model has its own."),
    ] = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, max=10**6, help="How many of these prompts to measure on, at most.")
    ] = 8,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The guidance to measure at; if left out the model's own.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A measurement that was kept. If left out, one is made and kept in the cache folder."),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a plan: in which steps the whole U-Net runs (a full step), and in which only its shallow layers.

    --uniform and --nonuniform follow a formula. --refreshes finds the plan of least error, and --threshold follows the
    feature; both need a measurement, which takes minutes, once. --budget and --max-latency-ms make a fitted plan: they
    choose which of the sampler's U-Net calls to make at all, and fit the weights of each update, so that the picture
    stays near that of --steps steps.

    Example: fastcache plan --engines demo-output/engines --steps 50 --sampler ddim --refreshes 10 --output plan.json
    """
    from fastcache.bundle.bundle import read_manifest
    from fastcache.commands.blocks import scheduled_blocks
    from fastcache.commands.fitted import fitted, show_frontier
    from fastcache.commands.wished import by_formula, by_measurement, extended
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
        made = by_formula(calls, branches[0], uniform, nonuniform, center=center, power=power, as_shipped=as_shipped)
        made, details = replace(made, model=manifest.model.name, sampler=sampler), {}
    else:
        made, details = by_measurement(engines, branches, ctx.params)
    made = extended(made, manifest, guidance_steps, forecast, forecast_by, damping)
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
        number(flags_of(name), flags[name], 0)
    _check_blocks(wish, given)
    if wish != "--nonuniform" and given & {"center", "power", "as_shipped"}:
        raise ValueError(f"expected --center, --power and --as-shipped only with --nonuniform, got them with {wish}")
    if "choose_guidance" in given and (wish != "--max-latency-ms" or "guidance_steps" in given):
        got = flags_of(wish[2:], *given & {"guidance_steps"})
        raise ValueError(
            f"expected --choose-guidance with --max-latency-ms and without --guidance-steps, got it with {got}; "
            "leave it out"
        )
    if flags["output"] is not None and flags["output"].is_dir():
        raise ValueError(f"expected --output to be a file, got the folder {flags['output']}; name a file in it")
    if wish == "--frontier" and "output" in given:
        raise ValueError("expected --frontier, which names its folder, without --output, got both; leave one out")
    if wish != "--frontier" and "output" not in given:
        raise ValueError("expected --output with a file for the plan, got none; add --output plan.json")
    own = given & {"fit", "guidance_steps", "forecast"}
    if wish in _CHOICES and "choose_guidance" not in given and own:
        got = flags_of(*own)
        raise ValueError(f"expected {wish}, which fits its plan itself, without {got}, got both; leave {got} out")
    if wish in _FORMULAS and ("calibration" in given or ("prompts" in given and "fit" not in given)):
        got = flags_of(*given & {"calibration", "prompts"})
        raise ValueError(f"expected {wish}, which measures nothing, without {got}, got both; leave {got} out")


def _check_blocks(wish: str, given: set[str]) -> None:
    """Raises: `ValueError` for flags that do not go with --blocks, or only with it."""
    scheduled = "blocks" in given and wish == "--threshold"
    if "blocks" in given and (wish not in (*_CHOICES, "--threshold") or "choose_guidance" in given):
        got = flags_of(wish[2:], *given & {"choose_guidance"})
        raise ValueError(
            f"expected --blocks with one of {', '.join(('--threshold', *_CHOICES))} alone, got it with {got}; "
            "take one of these"
        )
    if scheduled and (strange := given & {"branch_id", "calibration", "forecast"}):
        got = flags_of(*strange)
        raise ValueError(f"expected --blocks --threshold without {got}, got both; leave {got} out")
    if not scheduled and (strange := given & {"no_scale_shift", "chart"}):
        got = flags_of(*strange)
        raise ValueError(f"expected {got} only with --blocks --threshold, got it with {wish}; leave it out")


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
