"""`plan`: which steps refresh the cached feature, written to a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastcache.commands.options import EnginesOption, Json, Sampler
from fastcache.console import print_json


def plan(
    engines: EnginesOption,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")],
    output: Annotated[Path, typer.Option(help="The plan file to write (JSON).")],
    sampler: Sampler = "ddim",
    uniform: Annotated[int | None, typer.Option(min=1, help="A refresh every N U-Net calls.")] = None,
    nonuniform: Annotated[int | None, typer.Option(min=1, help="As many, dense around --center.")] = None,
    center: Annotated[float | None, typer.Option(help="The densest step; 0.3 of all if left out.")] = None,
    power: Annotated[float | None, typer.Option(help="How fast refreshes thin out; 1.4 if left out.")] = None,
    as_shipped: Annotated[bool, typer.Option("--as-shipped", help="As DeepCache's code has it.")] = False,
    json_: Json = False,
) -> None:
    """Write a plan: which steps refresh the cached feature.

    Example: fastcache plan --engines demo-output/engines --steps 50 --sampler ddim --nonuniform 5 --output plan.json
    """
    from fastcache.bundle import read_manifest, write_whole
    from fastcache.run.plan import CachePlan
    from fastcache.run.sampler import compile_sampler, make_scheduler

    if (uniform is None) == (nonuniform is None):
        got = "neither" if uniform is None else "both"
        raise ValueError(f"expected one of --uniform and --nonuniform, got {got}")
    if uniform is not None and (center is not None or power is not None or as_shipped):
        raise ValueError("expected --center, --power and --as-shipped only with --nonuniform, got them with --uniform")
    manifest = read_manifest(engines)
    calls = compile_sampler(make_scheduler(sampler, manifest.model.scheduler), steps).num_calls
    if uniform is not None:
        made = CachePlan.uniform(calls, uniform, manifest.branch_id)
    else:
        middle = 0.3 * calls if center is None else center
        made = CachePlan.nonuniform(calls, nonuniform or 1, middle, power or 1.4, manifest.branch_id, as_shipped)
    made = replace(made, model=manifest.model.name, sampler=sampler)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (made.to_json() + "\n").encode())
    if json_:
        print_json(json.loads(made.to_json()))
    else:
        refreshes = ", ".join(map(str, made.refresh_steps))
        typer.echo(f"{output}: {len(made.refresh_steps)} of {made.num_steps} U-Net calls run in full: {refreshes}")
