"""`batch`: a file of prompts becomes a folder of pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fastcache.commands.options import (
    CacheInterval,
    Guidance,
    Json,
    NegativePrompt,
    OutputFolder,
    PlanFile,
    Sampler,
    check_writable,
    read_plan,
)
from fastcache.console import print_json, progress


def batch(
    engines: Annotated[
        list[str],
        typer.Option(
            envvar="FASTCACHE_ENGINES",
            metavar="DIR",
            help="A bundle, or NAME=DIR; again for each further one. Rows that name no model are drawn with the first.",
        ),
    ],
    prompts: Annotated[
        Path, typer.Option(help="A text file with a prompt a line, or a .jsonl file with a JSON object a line.")
    ],
    output: OutputFolder,
    negative_prompt: NegativePrompt = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Denoising steps; if left out the model's own.")
    ] = None,
    sampler: Sampler = None,
    guidance_scale: Guidance = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Rows without a seed of their own get one from this number and their id.")
    ] = 0,
    cache_interval: CacheInterval = None,
    plan: PlanFile = None,
    plans: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder of `plan --frontier`, for rows with a quality; again for others."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that draw, each with engines of its own.")] = 1,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Cores for each worker; if left out they share this machine's.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs for each worker; if left out 1 where the bundle needs one.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster, or auto. If left out RAY_ADDRESS, or else this machine alone."),
    ] = None,
    json_: Json = False,
) -> None:
    """Draw a file of prompts, on this machine or on a Ray cluster; started again, it draws what is left.

    Rows of a .jsonl file may have id, model, prompt, negative_prompt, num_inference_steps, guidance_scale, sampler,
    cache_interval, plan, quality (low, medium, high, with --plans), size, seed, and image, mask, strength,
    control_image, adapter_image, ip_adapter_image and their scales; pictures are files, named from the rows' file on.
    A row's seed is the first 63 bits of SHA-256 of "SEED:ID"; its id, if it has none, the number of its line, as
    000001. Each picture is OUTPUT/ID.png, and index.jsonl lists all.

    Example: fastcache batch --engines demo-output/engines --prompts prompts.txt --output pictures --workers 2
    """
    from fastcache.serve.cluster.batch import INDEX, Cluster, draw_file
    from fastcache.serve.cluster.lines import models_of, read_rows
    from fastcache.serve.models.listed import listed
    from fastcache.serve.models.quality import read_plans

    if plan is not None and cache_interval is not None:
        raise ValueError("expected --cache-interval or --plan, got both; leave one out")
    defaults: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "sampler": sampler,
        "guidance_scale": guidance_scale,
        "cache_interval": cache_interval,
        "plan": None if plan is None else json.loads(read_plan(plan).to_json()),
    }
    check_writable(output)
    models = models_of([listed(one) for one in engines], [read_plans(folder) for folder in plans or ()])
    rows = read_rows(prompts, seed, defaults, models)
    cluster = Cluster(workers, cpus, gpus, address or os.environ.get("RAY_ADDRESS"))
    with progress() as say:
        report = draw_file(models, rows, output, cluster, say=say)
    if json_:
        counts = {"drawn": report.drawn, "skipped": report.skipped, "failed": len(report.failed)}
        print_json({**counts, "index": str(output / INDEX), "rows": report.entries})
    else:
        typer.echo(f"{output / INDEX}: {report.drawn} drawn, {report.skipped} before, {len(report.failed)} failed")
    if report.failed:
        first = report.failed[0]
        raise ValueError(
            f"expected every row to fit the bundle, {len(report.failed)} did not; {first['id']}: {first['error']}"
        )
