"""`bench`: arms timed side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcache.commands.options import (
    Device,
    Height,
    RandomWeights,
    Sampler,
    Steps,
    Width,
    check_writable,
    existing_of,
    flags_of,
    named,
    read_plan,
)
from fastcache.console import figure, notes, print_json, print_table, progress

if TYPE_CHECKING:
    from fastcache.bench.arms import BenchSettings
    from fastcache.bench.bench import ArmResult
    from fastcache.bench.lineup import Wishes


def bench(  # as long as its flags are many
    ctx: typer.Context,
    engines: Annotated[
        Path | None, typer.Option(help="The folder of a bundle to time; or else give --model.", callback=existing_of)
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model to build (in the cache folder) and time.")] = None,
    random_weights: RandomWeights = False,
    arms: Annotated[
        str | None,
        typer.Option(
            help="What to time, by commas: eager, deepcache, compile, engine, engine+cache, engine+graph, "
            "engine+cache+graph; each may be followed by :BACKEND and :DTYPE."
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="The backend of engine arms that name none: auto, or a name that doctor lists.")
    ] = "auto",
    device: Device = None,
    cache_interval: Annotated[
        int, typer.Option(min=1, help="In the arms that cache, run the whole U-Net every N steps.")
    ] = 3,
    branch_id: Annotated[
        int | None, typer.Option(min=0, help="Where the U-Net is cut. If left out the bundle's own, or else 0.")
    ] = None,
    steps: Steps = 50,
    height: Height = None,
    width: Width = None,
    batch: Annotated[int, typer.Option(min=1, help="How many pictures to draw at once.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="The dtype of engine arms that name none; fp32 if left out.")
    ] = None,
    sampler: Sampler = None,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that are run but not timed.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that are timed.")] = 5,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Time prompt to PNG from a process's start, part by part.")
    ] = False,
    plan: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --end-to-end: a plan's file that cached engine arms draw by, instead of an interval. Give it "
            "again for more."
        ),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="Time eager, DeepCache and engines at --sizes and --batches: the table of diffusers' page."
        ),
    ] = False,
    sizes: Annotated[str, typer.Option(help="With --sweep: sides of square pictures, by commas.")] = "512,768,1024",
    batches: Annotated[str, typer.Option(help="With --sweep: pictures at once, by commas.")] = "1,4,8",
    kernels: Annotated[bool, typer.Option("--kernels", help="Time the GPU kernels alone, without a model.")] = False,
    chart: Annotated[Path | None, typer.Option(help="Draw a chart of the speed-ups into this PNG file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here ('-' for stdout).")] = None,
) -> None:
    """Time the loop of PyTorch eager, torch.compile, the DeepCache package and the engines, side by side.

    An arm is one of these ways to run the same loop. With +graph its loop is one CUDA graph. All arms run in turns, so
    that whatever else the machine does hits all alike.

    With --end-to-end each arm draws in a new process each round: start, text encoder, loop, VAE and PNG, and the total.
    With --plan engines cache as plans say, such as draft.json that `fastcache plan --frontier` wrote.

    With --sweep the arms are timed at several sizes and batches, with each cache interval and branch of the table on
    diffusers' page about DeepCache, beside the speed-ups published there.

    With --kernels, every GPU kernel is timed beside PyTorch eager, torch.compile and a copy of as many bytes.

    Example: fastcache bench --model demo --arms eager,deepcache,engine,engine+cache:openvino:bf16 --steps 20
    """
    _check_kind(ctx)
    check_writable(chart, None if str(json_file) == "-" else json_file)
    if kernels:
        _bench_kernels(batch, dtype, repeats, branch_id or 0, json_file)
        return
    if sweep:
        _sweep(ctx, json_file)
        return
    from fastcache.bench.chart import check_chartable, draw_chart
    from fastcache.bench.lineup import Wishes
    from fastcache.errors import BackendUnavailable

    if (engines is None) == (model is None):
        raise ValueError("expected either --engines or --model, got " + ("neither" if model is None else "both"))
    if chart is not None:
        check_chartable(arms)
    source = {"engines": engines} if model is None else {"model": model, "random_weights": random_weights}
    settings, results, result = _measure(
        Wishes(arms, backend, device, dtype, branch_id, height, width),
        source,
        cache_interval=cache_interval,
        steps=steps,
        batch=batch,
        sampler=sampler,
        warmup=warmup,
        repeats=repeats,
        end_to_end=end_to_end,
        plans=plan or (),
    )
    if not _write_json(result, json_file):
        if end_to_end:
            _show_end_to_end(settings, result["arms"])
        else:
            _show_bench(settings, results, result["doubts"])
    reasons = [arm.get("skipped") for arm in result["arms"]]
    if all(reasons):
        raise BackendUnavailable(f"expected an arm that runs on this machine, got none; the first: {reasons[0]}")
    if chart is not None:
        chart.parent.mkdir(parents=True, exist_ok=True)
        draw_chart(result, chart)
        notes.print(f"chart: {chart}", markup=False, soft_wrap=True)


# What a kind of benchmark says itself, or has no use for.
_NOT_WITH = {
    "kernels": (
        *("engines", "model", "random_weights", "arms", "backend", "device", "cache_interval", "steps", "height"),
        *("width", "sampler", "warmup", "end_to_end", "plan", "sweep", "chart"),
    ),
    "sweep": ("engines", "arms", "height", "width", "batch", "cache_interval", "branch_id", "chart", "end_to_end"),
    "end_to_end": ("chart",),
}


def _check_kind(ctx: typer.Context) -> None:
    """Refuse flags that a kind of benchmark would ignore. Raises: `ValueError`."""
    for kind, others in _NOT_WITH.items():
        if ctx.params[kind] and (clashing := named(ctx, *others)):
            raise ValueError(f"expected {flags_of(kind)} without {flags_of(clashing[0])}, got both; leave one out")
    for kind, own in (("sweep", ("sizes", "batches")), ("end_to_end", ("plan",))):
        if not ctx.params[kind] and (given := named(ctx, *own)):
            raise ValueError(f"expected {flags_of(given[0])} only with {flags_of(kind)}, got it without; leave it out")


def _sides(flag: str, text: str) -> list[int]:
    """Whole numbers by commas. Raises: `ValueError` naming the flag."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 8192 for part in parts):
        raise ValueError(f"expected {flag} as whole numbers from 1 to 8192 by commas, such as 512,768, got {text!r}")
    return [int(part) for part in parts]


def _sweep(ctx: typer.Context, json_file: Path | None) -> None:
    """`bench --sweep`: one benchmark a size and batch, written as it comes, and their table.

    Raises: `ValueError` for flags that a sweep says itself.
    """
    import torch

    from fastcache.bench.lineup import Wishes, of_model
    from fastcache.bench.machine import environment, load_average
    from fastcache.bench.sweep import sweep
    from fastcache.errors import BackendUnavailable

    flags, load = ctx.params, load_average()
    if flags["model"] is None:
        raise ValueError("expected --sweep with --model, for its sizes are built one after another, got none")
    sizes, batches = _sides("--sizes", flags["sizes"]), _sides("--batches", flags["batches"])
    common = {name: flags[name] for name in ("cache_interval", "steps", "batch", "sampler", "warmup", "repeats")}
    wishes = Wishes(None, flags["backend"], flags["device"], flags["dtype"])
    settings, _ = of_model(
        flags["model"], flags["random_weights"], wishes, common | {"threads": torch.get_num_threads()}
    )
    machine, rows = {**environment(settings.threads), "load_average_before": load}, list[dict[str, Any]]()
    result = {"environment": machine, "settings": asdict(settings), "table": rows}
    only_json = str(json_file) == "-"
    with progress() as say:
        for cell in sweep(settings, flags["backend"], sizes, batches, say):
            rows += cell
            _write_json(result, None if only_json else json_file)  # as it is so far: a kill loses one cell
    if not only_json or not _write_json(result, json_file):
        _show_sweep(settings, rows)
    if all("skipped" in row for row in rows):
        raise BackendUnavailable(
            f"expected an arm that runs on this machine, got none; the first: {rows[0]['skipped']}"
        )


def _show_sweep(settings: BenchSettings, rows: Sequence[dict[str, Any]]) -> None:
    ratios = ("speedup_vs_eager", "speedup_vs_uncached", "ceiling_vs_uncached", "published")
    print_table(
        f"{settings.model}, {settings.steps} {settings.sampler} steps, {settings.dtype}, {settings.device}, "
        f"{settings.threads} threads\nms: the loop, median; then times as fast, the most that multiply-adds allow, and "
        "what diffusers' page has for DeepCache on an RTX A5000",
        ["size", "batch", "arm", "I", "B", "loop ms", "x eager", "x uncached", "at most", "published"],
        [
            [
                *(str(row[name]) for name in ("size", "batch", "arm", "cache_interval", "branch_id")),
                figure(row["loop_ms_p50"]),
                *(figure(row[name], ".2f", "x") for name in ratios),
            ]
            for row in rows
            if "skipped" not in row
        ],
    )
    if shaken := sum(row.get("unsteady", False) for row in rows):
        typer.echo(f"warning: {shaken} of these figures are not to be relied on: their rounds differed too much")
    for row in rows:
        if "skipped" in row:
            typer.echo(f"{row['size']} batch {row['batch']}, {row['arm']}: skipped, {row['skipped']}")


def _measure(
    wishes: Wishes, source: dict[str, Any], *, end_to_end: bool, plans: Sequence[Path], **common: Any
) -> tuple[BenchSettings, Sequence[ArmResult], dict[str, Any]]:
    """Build what is missing and time every arm: the settings, the results, and all of it as JSON.

    Raises: `ValueError` for a file that is no plan.
    """
    import platformdirs
    import torch

    from fastcache.bench.bench import document, run_bench
    from fastcache.bench.end_to_end import run_end_to_end, whole_model
    from fastcache.bench.lineup import build_bundles, by_plans, of_bundle, of_model
    from fastcache.bench.machine import environment, load_average

    for file in plans:
        read_plan(file)
    load_before = load_average()  # ours counts as soon as something is built
    common["threads"] = torch.get_num_threads()
    with progress() as say:
        if "engines" in source:
            settings, lineup, bundles = of_bundle(source["engines"], wishes, common)
            lineup = by_plans(lineup, plans)
        else:
            settings, lineup = of_model(source["model"], source["random_weights"], wishes, common)
            lineup = by_plans(lineup, plans)
            folder = Path(platformdirs.user_cache_dir("fastcache")) / "engines"
            bundles, lineup = build_bundles(lineup, settings, folder, say, whole=end_to_end)
        if end_to_end:
            arms = run_end_to_end(settings, lineup, bundles, whole_model(settings), say)
            machine = {**environment(settings.threads), "load_average_before": load_before}
            return settings, (), {"environment": machine, "settings": asdict(settings), "arms": arms}
        measured = run_bench(settings, lineup, bundles, say)
    return settings, measured.results, document(settings, bundles, measured, load_before)


def _write_json(result: dict[str, Any], file: Path | None) -> bool:
    """Write a result where it was asked for. Returns whether that was stdout, which then takes nothing else."""
    from fastcache.files import write_json

    if str(file) == "-":
        print_json(result)
        return True
    if file is not None:
        write_json(file, result)
    return False


def _bench_kernels(batch: int, dtype: str | None, repeats: int, branch_id: int, json_file: Path | None) -> None:
    """`bench --kernels`, in fp16 where no dtype is named: what GPUs run these models in."""
    from fastcache.bench.arms import parse_dtype
    from fastcache.bench.kernels import bench_kernels, kernel_table

    with progress() as say:
        result, rows = bench_kernels(batch, parse_dtype(dtype or "fp16"), repeats, branch_id, say)
    if _write_json(result, json_file):
        return
    print_table(*kernel_table(result["settings"], rows))
    for row in rows:
        if row.compile_skipped is not None:
            typer.echo(f"{row.kernel} {'x'.join(map(str, row.shape))}: torch.compile skipped, {row.compile_skipped}")


def _show_end_to_end(settings: BenchSettings, arms: Sequence[dict[str, Any]]) -> None:
    ran = [arm for arm in arms if "skipped" not in arm]
    parts = ("start_ms", "text_ms", "loop_ms", "vae_ms", "png_ms", "total_ms")
    print_table(
        f"{settings.model} {settings.width}x{settings.height}, {settings.steps} {settings.sampler} steps, "
        f"N={settings.cache_interval}, {settings.device}, {settings.threads} threads: one picture, prompt to PNG\n"
        "ms, medians: the process and its imports, the text encoder, the loop, the VAE, the PNG, and all of it",
        ["arm", *(name.removesuffix("_ms") for name in parts), "x eager", "PSNR"],
        [
            [
                arm["name"],
                *(figure(arm[name]) for name in parts),
                figure(arm["speedup_vs_eager"], ".2f", "x"),
                figure(arm["psnr_db_vs_eager"]),
            ]
            for arm in ran
        ],
    )
    for arm in arms:
        if "skipped" in arm:
            typer.echo(f"{arm['name']}: skipped, {arm['skipped']}")


def _show_bench(settings: BenchSettings, results: Sequence[ArmResult], doubts: Sequence[str]) -> None:
    ran = [arm for arm in results if arm.skipped is None]
    several = len({arm.dtype for arm in ran}) > 1  # then the references of the arm's own dtype say more
    print_table(
        f"{settings.model} {settings.width}x{settings.height}, "
        f"batch {settings.batch} {'under' if settings.guided else 'without'} guidance, "
        f"{settings.steps} {settings.sampler} steps, N={settings.cache_interval}, branch {settings.branch_id}, "
        f"{settings.device}, {settings.threads} threads\n"
        "ms: the loop (median, p90), a U-Net call in full and shallow, the rest of a step; then times as fast"
        + (" as in fp32, / as in its own dtype" if several else ""),
        ["arm", "loop ms", "p90", "full", "shallow", "rest", "x eager", "x DeepCache", "PSNR", "GiB"],
        [_bench_row(arm, several) for arm in ran],
    )
    for arm in results:
        if arm.skipped is not None:
            typer.echo(f"{arm.name}: skipped, {arm.skipped}")
    for doubt in doubts:
        typer.echo(f"warning: these figures are not to be relied on: {doubt}")


def _bench_row(arm: ArmResult, several: bool) -> list[str]:
    def times(usual: float | None, alike: float | None) -> str:
        return figure(usual, ".2f", "x") + (f" / {figure(alike, '.2f', 'x')}" if several else "")

    return [
        f"{arm.name} (?)" if arm.unsteady else arm.name,
        figure(arm.loop_ms_p50),
        figure(arm.loop_ms_p90),
        figure(arm.full_step_ms_p50),
        figure(arm.shallow_step_ms_p50),
        figure(arm.overhead_ms_per_step, ".3f"),
        times(arm.speedup_vs_eager, arm.speedup_vs_eager_same_dtype),
        times(arm.speedup_vs_deepcache, arm.speedup_vs_deepcache_same_dtype),
        figure(arm.psnr_db_vs_eager),
        figure(arm.peak_bytes / 2**30 if arm.peak_bytes else None, ".2f"),
    ]
