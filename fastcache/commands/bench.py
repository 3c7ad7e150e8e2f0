"""`bench`: arms timed side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcache.commands.options import RandomWeights, Sampler
from fastcache.console import figure, notes, print_json, print_table, progress

if TYPE_CHECKING:
    from fastcache.study.arms import BenchSettings
    from fastcache.study.bench import ArmResult


def bench(
    engines: Annotated[Path | None, typer.Option(help="A bundle to time, or else --model.")] = None,
    model: Annotated[str | None, typer.Option(help="A model to build, in the cache folder, and time.")] = None,
    random_weights: RandomWeights = False,
    arms: Annotated[
        str | None,
        typer.Option(help="By commas: eager, deepcache, compile, engine, engine+cache, each [:BACKEND][:DTYPE]."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Of engine arms that name none: auto, or one that doctor lists.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one if left out.")] = None,
    cache_interval: Annotated[int, typer.Option(min=1, help="Refresh every N steps in the caching arms.")] = 3,
    branch_id: Annotated[int | None, typer.Option(min=0, help="The cut; the bundle's own if left out, else 0.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    height: Annotated[int | None, typer.Option(help="Image height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Image width in pixels.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of engine arms that name none: fp32, fp16 or bf16; fp32 if left out.")
    ] = None,
    sampler: Sampler = "ddim",
    warmup: Annotated[int, typer.Option(min=0, help="Untimed rounds.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    chart: Annotated[Path | None, typer.Option(help="Draw the speed-ups into this PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here ('-' for stdout).")] = None,
) -> None:
    """Time the denoising loop of PyTorch eager, torch.compile, the DeepCache package and the engines, side by side.

    Example: fastcache bench --model demo --arms eager,deepcache,engine,engine+cache:openvino:bf16 --steps 20
    """
    import platformdirs
    import torch

    from fastcache.bundle import write_whole
    from fastcache.study.bench import document, run_bench
    from fastcache.study.chart import check_chartable, draw_chart
    from fastcache.study.lineup import Wishes, build_bundles, no_arm_ran, of_bundle, of_model

    if (engines is None) == (model is None):
        raise ValueError("expected either --engines or --model, got " + ("neither" if model is None else "both"))
    if chart is not None:
        check_chartable(arms)
    for file in (json_file, chart):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    wishes = Wishes(arms, backend, device, dtype, branch_id, height, width)
    common: dict[str, Any] = {
        "cache_interval": cache_interval,
        "steps": steps,
        "batch": batch,
        "sampler": sampler,
        "warmup": warmup,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }
    with progress() as say:
        if engines is not None:
            settings, lineup, bundles = of_bundle(engines, wishes, common)
        else:
            settings, lineup = of_model(str(model), random_weights, wishes, common)
            folder = Path(platformdirs.user_cache_dir("fastcache")) / "engines"
            bundles, lineup = build_bundles(lineup, settings, folder, say)
        measured = run_bench(settings, lineup, bundles, say)
    result = document(settings, bundles, measured)
    if str(json_file) == "-":
        print_json(result)
    else:
        if json_file is not None:
            write_whole(json_file, (json.dumps(result, indent=1) + "\n").encode())
        _show_bench(settings, measured.results)
    if all(arm.skipped is not None for arm in measured.results):
        raise no_arm_ran([arm.skipped or "" for arm in measured.results])
    if chart is not None:
        draw_chart(result, chart)
        notes.print(f"chart: {chart}", markup=False, soft_wrap=True)


def _show_bench(settings: BenchSettings, results: Sequence[ArmResult]) -> None:
    print_table(
        f"{settings.model} {settings.width}x{settings.height}, batch {settings.batch} under guidance, "
        f"{settings.steps} {settings.sampler} steps, N={settings.cache_interval}, branch {settings.branch_id}, "
        f"{settings.device}, {settings.threads} threads\n"
        "ms: the loop (median, p90), a U-Net call in full and shallow, the rest of a step; then times as fast",
        ["arm", "loop ms", "p90", "full", "shallow", "rest", "x eager", "x DeepCache", "PSNR", "GiB"],
        [_bench_row(arm) for arm in results if arm.skipped is None],
    )
    for arm in results:
        if arm.skipped is not None:
            typer.echo(f"{arm.name}: skipped, {arm.skipped}")


def _bench_row(arm: ArmResult) -> list[str]:
    return [
        arm.name,
        figure(arm.loop_ms_p50),
        figure(arm.loop_ms_p90),
        figure(arm.full_step_ms_p50),
        figure(arm.shallow_step_ms_p50),
        figure(arm.overhead_ms_per_step, ".3f"),
        figure(arm.speedup_vs_eager, ".2f", "x"),
        figure(arm.speedup_vs_deepcache, ".2f", "x"),
        figure(arm.psnr_db_vs_eager),
        figure(arm.peak_bytes / 2**30 if arm.peak_bytes else None, ".2f"),
    ]
