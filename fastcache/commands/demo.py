"""`demo`: the bundled model's engines, and what caching gains on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastcache.commands.options import (
    BUILD_SHARES,
    STARTING,
    Json,
    OutputFolder,
    Steps,
    check_writable,
    generate_with,
)
from fastcache.console import figure, next_step, print_json, print_table, progress


def demo(
    output: OutputFolder = Path("demo-output"),
    cache_interval: Annotated[
        int, typer.Option(min=1, help="Also draw with a full step every N, beside 2, 3 and 5.")
    ] = 3,
    steps: Steps = 50,
    json_: Json = False,
) -> None:
    """Build the bundled model's engines, draw cached beside uncached pictures, print the speed-up.

    Example: fastcache demo --output demo-output
    """
    check_writable(output)
    with progress(BUILD_SHARES) as say:
        say(STARTING)
        from fastcache.compile import hired

        if not (output / "engines").exists():
            hired.begin()
        import fastcache
        from fastcache.bench.demo import report, run_demo
        from fastcache.files import write_json
        from fastcache.pipeline.pipeline import FastCachePipeline

        bundle = fastcache.build_engines("demo", output / "engines", force=_is_stale(output / "engines"), progress=say)
    with progress() as say:
        pipe = FastCachePipeline(bundle)
        intervals = sorted({2, 3, 5, cache_interval} - {1})
        rows = run_demo(pipe, intervals, steps, output, say)
    result = report(pipe, rows, steps)
    write_json(output / "report.json", result)
    if json_:
        print_json(result)
        return
    print_table(
        f"The bundled model, {len(result['prompts'])} pictures at once, {steps} steps, {bundle.manifest.backend}",
        ["plan", "time", "speed-up", "PSNR to uncached"],
        [
            [
                row.plan,
                figure(row.time_ms, ".0f", " ms"),
                figure(row.speedup_vs_uncached, ".2f", "x"),
                figure(row.psnr_db, ".1f", " dB"),
            ]
            for row in rows
        ],
    )
    typer.echo(f"pictures: {output / 'grid.png'}\nreport:   {output / 'report.json'}\nengines:  {bundle.path}")
    next_step(generate_with(output / "engines", "demo", "--cache-interval 3"))


def _is_stale(folder: Path) -> bool:
    """Whether the demo's own folder holds an older version's bundle, which the demo may replace."""
    from fastcache.bundle.bundle import MANIFEST

    if not (folder / MANIFEST).is_file():
        return False
    from fastcache.bundle.bundle import read_manifest
    from fastcache.bundle.recipe import recipe_from
    from fastcache.compile.builder import resolve
    from fastcache.errors import BundleError

    try:
        return read_manifest(folder).key != resolve(recipe_from({})).key
    except BundleError:
        return True
