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
    from fastcache.bench.arms import BenchSettings
    from fastcache.bench.bench import ArmResult
    from fastcache.bench.kernels import KernelResult


def bench(
    engines: Annotated[Path | None, typer.Option(help="A bundle to time, or else --model.")] = None,
    model: Annotated[str | None, typer.Option(help="A model to build, in the cache folder, and time.")] = None,
    random_weights: RandomWeights = False,
    arms: Annotated[
        str | None,
        typer.Option(
            help="By commas: eager, deepcache, compile, engine, engine+cache, engine+graph, engine+cache+graph, "
            "each [:BACKEND][:DTYPE]."
        ),
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
    sampler: Sampler = None,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed rounds.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time the GPU kernels alone, against PyTorch's operations.")
    ] = False,
    chart: Annotated[Path | None, typer.Option(help="Draw the speed-ups into this PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here ('-' for stdout).")] = None,
) -> None:
    """Time the denoising loop of PyTorch eager, torch.compile, the DeepCache package and the engines, side by side.

    With +graph an engine arm's loop is one CUDA graph.

    With --kernels: every kernel against PyTorch eager, torch.compile and a copy of as many bytes, on a GPU.

    Example: fastcache bench --model demo --arms eager,deepcache,engine,engine+cache:openvino:bf16 --steps 20
    """
    if kernels:
        if engines is not None or model is not None or arms is not None:
            raise ValueError("expected --kernels without --engines, --model and --arms, got both; time them apart")
        _bench_kernels(batch, dtype, repeats, branch_id or 0, json_file)
        return
    import platformdirs
    import torch

    from fastcache.bench.bench import document, run_bench
    from fastcache.bench.chart import check_chartable, draw_chart
    from fastcache.bench.lineup import Wishes, build_bundles, no_arm_ran, of_bundle, of_model

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
    if not _write_json(result, json_file):
        _show_bench(settings, measured.results)
    if all(arm.skipped is not None for arm in measured.results):
        raise no_arm_ran([arm.skipped or "" for arm in measured.results])
    if chart is not None:
        draw_chart(result, chart)
        notes.print(f"chart: {chart}", markup=False, soft_wrap=True)


def _write_json(result: dict[str, Any], file: Path | None) -> bool:
    """Write a result where it was asked for. Returns whether that was stdout, which then takes nothing else."""
    from fastcache.files import write_whole

    if str(file) == "-":
        print_json(result)
        return True
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps(result, indent=1) + "\n").encode())
    return False


def _bench_kernels(batch: int, dtype: str | None, repeats: int, branch_id: int, json_file: Path | None) -> None:
    """`bench --kernels`, in fp16 where no dtype is named: what GPUs run these models in."""
    from fastcache.bench.arms import parse_dtype
    from fastcache.bench.kernels import bench_kernels

    with progress() as say:
        result, rows = bench_kernels(batch, parse_dtype(dtype or "fp16"), repeats, branch_id, say)
    if not _write_json(result, json_file):
        show_kernels(result["settings"], rows)


def show_kernels(settings: dict[str, Any], rows: Sequence[KernelResult]) -> None:
    """The kernels' times as a table; what could not be compiled is said below it."""
    print_table(
        f"kernels in {settings['dtype']}, batch {settings['batch']} under guidance, branch {settings['branch_id']}, "
        "microseconds a call\ncopy: of as many bytes on the same device; share: the copy's time over the kernel's",
        [
            "kernel",
            "models",
            "shape",
            "MB",
            "kernel",
            "eager",
            "compile",
            "copy",
            "GB/s",
            "share",
            "x eager",
            "x compile",
        ],
        [_kernel_row(row) for row in rows],
    )
    for row in rows:
        if row.compile_skipped is not None:
            typer.echo(f"{row.kernel} {'x'.join(map(str, row.shape))}: torch.compile skipped, {row.compile_skipped}")


def _kernel_row(row: KernelResult) -> list[str]:
    return [
        row.kernel,
        ", ".join(row.models),
        "x".join(map(str, row.shape)),
        f"{row.num_bytes / 1e6:.2f}",
        *(figure(us, ".2f") for us in (row.kernel_us, row.eager_us, row.compile_us, row.copy_us)),
        f"{row.gb_per_s:.0f}",
        f"{row.share_of_copy:.0%}",
        figure(row.speedup_vs_eager, ".2f", "x"),
        figure(row.speedup_vs_compile, ".2f", "x"),
    ]


def _show_bench(settings: BenchSettings, results: Sequence[ArmResult]) -> None:
    print_table(
        f"{settings.model} {settings.width}x{settings.height}, "
        f"batch {settings.batch} {'under' if settings.guided else 'without'} guidance, "
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
