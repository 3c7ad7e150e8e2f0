"""The front door: commands and flags -> calls of the library; results on stdout, everything else on stderr.

Exit codes: 0 done; 2 wrong usage or bad input; 3 this machine or installation cannot do it; 4 a check failed; 5 a build
failed. Everything heavy is imported inside the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from fastcache.console import (
    CheckFailed,
    end,
    exit_code,
    figure,
    notes,
    print_json,
    print_table,
    progress,
    quiet_libraries,
)

if TYPE_CHECKING:
    from fastcache.bundle import Bundle, Manifest, Parity
    from fastcache.recipe import Recipe
    from fastcache.run.plan import CachePlan
    from fastcache.study.arms import BenchSettings
    from fastcache.study.bench import ArmResult

app = typer.Typer(
    name="fastcache",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
EnginesOption = Annotated[Path, typer.Option("--engines", help="A bundle, as build-engines makes it.")]
Sampler = Annotated[str, typer.Option(help="ddim, pndm, ddpm, euler, euler_a, dpm++_2m, unipc, heun, lms, lcm, ...")]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="A preset's shape, for speed only.")]
OutputFolder = Annotated[Path, typer.Option("--output", help="The folder to write.")]


def main() -> None:
    """Run the command line; an error is one line on stderr, with a traceback only under `--debug`."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = debug_asked()
    quiet_libraries()
    try:
        sys.exit(app(arguments, standalone_mode=False) or 0)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except TyperException as error:
        message = error.format_message()
        end(f"{message} (see --help)" if message else "", 2)
    except (typer.Abort, KeyboardInterrupt):
        end("stopped", 130)
    except Exception as error:
        if debug:
            raise
        end(str(error) or type(error).__name__, exit_code(error))


def debug_asked() -> bool:
    return "--debug" in sys.argv[1:]


def _version(asked: bool) -> None:
    if asked:
        import fastcache

        typer.echo(fastcache.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """The fastest way to run a diffusion U-Net: full and shallow engines, switched step by step."""


@app.command()
def demo(
    output: OutputFolder = Path("demo-output"),
    cache_interval: Annotated[int, typer.Option(min=1, help="A further interval beside 2, 3 and 5.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    json_: Json = False,
) -> None:
    """Build the bundled model's engines, draw cached beside uncached pictures, print the speed-up.

    Example: fastcache demo --output demo-output
    """
    import fastcache
    from fastcache.bundle import write_whole
    from fastcache.run.pipeline import FastCachePipeline
    from fastcache.study.demo import report, run_demo

    output.mkdir(parents=True, exist_ok=True)
    with progress() as say:
        bundle = fastcache.build_engines("demo", output / "engines", force=_is_stale(output / "engines"), progress=say)
        pipe = FastCachePipeline(bundle)
        intervals = sorted({2, 3, 5, cache_interval} - {1})
        rows = run_demo(pipe, intervals, steps, output, say)
    result = report(pipe, rows, steps)
    write_whole(output / "report.json", json.dumps(result, indent=1).encode())
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


def _is_stale(folder: Path) -> bool:
    """Whether the demo's own folder holds an older version's bundle, which the demo may replace."""
    from fastcache.bundle import MANIFEST

    if not (folder / MANIFEST).is_file():
        return False
    from fastcache.bundle import read_manifest
    from fastcache.compile.builder import resolve
    from fastcache.errors import BundleError
    from fastcache.recipe import recipe_from

    try:
        return read_manifest(folder).key != resolve(recipe_from({})).key
    except BundleError:
        return True


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what this machine can build and what it can run, and why not.

    Example: fastcache doctor
    """
    from fastcache.study.doctor import examine

    result = examine()
    if json_:
        print_json(result)
        return
    print_table(
        f"Python {result['python']}, {result['device']}, {result['threads']} threads",
        ["backend", "device", "builds", "runs", "version", "dtypes", "what to know"],
        [
            [
                b["name"],
                b["device"],
                _yes(b["can_build"]),
                _yes(b["can_run"]),
                b["version"] or "-",
                " ".join(b["dtypes"]),
                b["reason"],
            ]
            for b in result["backends"]
        ],
    )
    typer.echo(f"auto picks {result['auto']['backend']} on the {result['auto']['device']}: {result['auto']['reason']}")
    typer.echo(f"kernels: {result['kernels']['used']} in the loop; {result['kernels']['reason']}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@app.command()
def build_engines(
    output: OutputFolder,
    model: Annotated[str | None, typer.Option(help="A folder, a hub id, demo, or a preset.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A TOML recipe, by path or name.")] = None,
    revision: Annotated[str | None, typer.Option(help="Pin a hub id to this revision.")] = None,
    backend: Annotated[str, typer.Option(help="auto or a name that doctor lists.")] = "auto",
    branch_id: Annotated[int, typer.Option(help="The skip connection to cut at, 0 the shallowest.")] = 0,
    cut: Annotated[str, typer.Option(help="auto, plain or projected.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one if left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Image height in pixels; the model's own if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Image width in pixels; the model's own if left out.")] = None,
    batch: Annotated[str, typer.Option(help="Images at once: N, or MIN:OPT:MAX.")] = "1:1:4",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    components: Annotated[str | None, typer.Option(help="Any of unet,vae,text; all if left out.")] = None,
    random_weights: RandomWeights = False,
    compute_capability: Annotated[
        str | None, typer.Option(help="GPUs to build for, by commas: 8.6,8.9 (tensorrt-rtx).")
    ] = None,
    onnx_only: Annotated[bool, typer.Option("--onnx-only", help="Stop at the backend's ONNX graphs.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build anyway; replace another bundle.")] = False,
    json_: Json = False,
) -> None:
    """Build a bundle of engines from a model.

    Example: fastcache build-engines --model demo --output engines/demo
    """
    import fastcache
    from fastcache.recipe import find_recipe, recipe_from, recipe_from_toml

    if (model is None) == (recipe is None):
        raise ValueError("expected either --model or --recipe, got " + ("neither" if model is None else "both"))
    chosen: Recipe
    if recipe is not None:
        chosen = recipe_from_toml(find_recipe(recipe))
    else:
        flags: dict[str, object] = {
            "model": model,
            "revision": revision,
            "backend": backend,
            "branch_id": branch_id,
            "cut": cut,
            "device": device,
            "height": height,
            "width": width,
            "batch": batch,
            "dtype": dtype,
            "random_weights": random_weights,
            "components": tuple(components.split(",")) if components is not None else None,
            "compute_capability": tuple(compute_capability.split(",")) if compute_capability is not None else (),
            "onnx_only": onnx_only,
        }
        chosen = recipe_from(flags)
    with progress() as say:
        bundle = fastcache.build_engines(chosen, output, force=force, progress=say)
    _show_bundle(bundle, json_)


def _show_bundle(bundle: Bundle, as_json: bool) -> None:
    manifest = bundle.manifest
    if as_json:
        print_json({"path": str(bundle.path), **manifest.to_json()})
        return
    typer.echo(
        f"{bundle.path}: {manifest.model.name}, branch {manifest.branch_id} of {manifest.num_branches}, "
        f"{manifest.cut} cut, {manifest.width}x{manifest.height}, {manifest.profiles['batch']} images, "
        f"{manifest.dtype}, {manifest.backend} {manifest.versions[manifest.backend]} on {manifest.device}\n"
        f"built in {manifest.build_seconds:.0f} s; on {manifest.parity.measured_on}: {_figures(manifest.parity)}"
    )


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle.")], json_: Json = False) -> None:
    """Show a bundle's inputs, outputs, weights, versions, device and provenance, without loading it.

    Example: fastcache inspect demo-output/engines
    """
    from fastcache.bundle import Bundle, read_manifest

    manifest = read_manifest(folder)
    facts = _engine_facts(folder, manifest)
    if json_:
        print_json({**manifest.to_json(), "engine_facts": facts})
        return
    _show_bundle(Bundle(folder, manifest), False)
    rows: list[list[str]] = []
    for role, engine in manifest.engines.items():
        for kind, specs in (("in", engine.inputs), ("out", engine.outputs)):
            rows += [[f"{role} {kind}", s.name, s.dtype, "x".join(map(str, s.shape))] for s in specs]
    print_table("Engines", ["engine", "tensor", "dtype", "shape"], rows)
    print_table(
        "What the files say of themselves",
        ["engine", "file", "arithmetic", "facts"],
        [[role, e.file, e.dtype, _facts_text(facts[role])] for role, e in manifest.engines.items()],
    )
    files = [[file.name, f"{file.bytes:,}", file.sha256[:16]] for file in manifest.files]
    print_table("Files", ["file", "bytes", "SHA-256"], files)
    typer.echo(
        f"weights {manifest.weights_bytes:,} bytes, of which full and shallow share {manifest.duplicated_bytes:,}\n"
        f"model weights SHA-256 {manifest.weights_sha256}\nbundle SHA-256        {manifest.bundle_sha256}\n"
        f"built {manifest.created} with {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}"
    )


def _engine_facts(folder: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """For each engine, what its backend can tell of the file without loading it, or why it cannot."""
    import dataclasses

    from fastcache.errors import BackendUnavailable
    from fastcache_engines import backend, onnx_files

    describe = onnx_files.describe if manifest.recipe.onnx_only else backend(manifest.backend).describe
    facts: dict[str, dict[str, Any]] = {}
    for role, engine in manifest.engines.items():
        try:
            facts[role] = dataclasses.asdict(describe(folder / engine.file))
        except (BackendUnavailable, ValueError, OSError) as error:
            facts[role] = {"unknown": str(error)}
    return facts


def _facts_text(facts: dict[str, Any]) -> str:
    """The facts in one cell; tensors have a table of their own."""
    shown = {key: value for key, value in facts.items() if key not in ("inputs", "outputs", "sha256", "operators")}
    if "operators" in facts:
        shown["most"] = " ".join(f"{name}:{count}" for name, count in list(facts["operators"].items())[:4])
    return ", ".join(
        f"{key} {value if isinstance(value, str | int) else json.dumps(value)}" for key, value in shown.items()
    )


@app.command()
def verify(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle.")], json_: Json = False) -> None:
    """Check every hash of a bundle, and that its engines compute what the model does.

    Engines that were built here for another machine are checked as far as they can be, and the result says so.

    Example: fastcache verify demo-output/engines
    """
    import fastcache_engines
    from fastcache.bundle import check_files, read_manifest
    from fastcache.run.runtime import check_here, measure_here

    manifest = read_manifest(folder)
    checks = check_files(folder, manifest)
    problems = [c for c in checks if c.problem is not None]
    parity, not_run = None, None
    if not problems:
        support = fastcache_engines.backend(manifest.backend).support(manifest.device_type)
        if support.can_build and not support.can_run:
            not_run = support.reason
        else:
            check_here(manifest)
            parity = measure_here(folder, manifest)
    worst = max(parity.full_vs_model, parity.shallow_vs_full) if parity else None
    tolerance = manifest.parity.tolerance
    result = {
        "ok": not problems and (not_run is not None or (worst is not None and worst <= tolerance)),
        "files": [{"name": c.name, "ok": c.problem is None, "problem": c.problem} for c in checks],
        "full_vs_model": parity.full_vs_model if parity else None,
        "shallow_vs_full": parity.shallow_vs_full if parity else None,
        "tolerance": tolerance,
        "not_run": not_run,
        "at_build": manifest.parity.model_dump(),
    }
    if json_:
        print_json(result)
    elif result["ok"]:
        typer.echo(f"{folder}: {len(checks)} files as built; {_parity_text(manifest, parity, not_run)}")
    if problems:
        wrong = "; ".join(f"{check.name} {check.problem}" for check in problems)
        raise CheckFailed(f"{wrong} in {folder}; build the bundle again")
    if not result["ok"]:
        if debug_asked():
            _show_layers(folder, manifest)
        raise CheckFailed(f"expected errors up to {tolerance:g}, got {worst:.1e}; build the bundle again here")


def _show_layers(folder: Path, manifest: Manifest) -> None:
    """On stderr: the first tensors that leave the tolerance, in the order in which they are computed."""
    from fastcache.study.layers import compare_layers

    wrong = [layer for layer in compare_layers(folder, manifest) if not layer.error <= manifest.parity.tolerance]
    rows = [[layer.role, layer.operator, layer.tensor, f"{layer.error:.1e}"] for layer in wrong[:20]]
    title = f"{len(wrong)} tensors beyond {manifest.parity.tolerance:g}, the first {len(rows)}"
    print_table(title, ["engine", "operator", "tensor", "error"], rows, console=notes)


def _figures(parity: Parity) -> str:
    return (
        f"full vs model {parity.full_vs_model:.1e}, shallow vs full {parity.shallow_vs_full:.1e} "
        f"(tolerance {parity.tolerance:g})"
    )


def _parity_text(manifest: Manifest, measured: Parity | None, not_run: str | None) -> str:
    """What was measured now, or that nothing was, and what the build measured instead."""
    if measured is not None:
        return _figures(measured)
    built = manifest.parity
    return f"the engines were NOT run: {not_run}. At the build, on {built.measured_on}: {_figures(built)}"


@app.command()
def generate(
    engines: EnginesOption,
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    output: Annotated[Path, typer.Option(help="A .png file, or a folder for several images.")],
    negative_prompt: Annotated[str, typer.Option(help="What not to draw.")] = "",
    num_images: Annotated[int, typer.Option(min=1, help="How many images; seeds count up from --seed.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    sampler: Sampler = "ddim",
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 or less switches it off.")] = 7.5,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The first image's seed.")] = 0,
    cache_interval: Annotated[int | None, typer.Option(min=1, help="Refresh the cached feature every N steps.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file instead of an interval.")] = None,
    json_: Json = False,
) -> None:
    """Draw images with a bundle's engines.

    Example: fastcache generate --engines demo-output/engines --prompt "a red circle" --output out.png
    """
    import torch
    from rich.progress import Progress

    from fastcache.bundle import open_bundle, write_whole
    from fastcache.run.pipeline import FastCachePipeline, png_bytes

    if plan is not None and cache_interval is not None:
        raise ValueError("expected --cache-interval or --plan, got both")
    if output.suffix and output.suffix.lower() != ".png":
        raise ValueError(f"expected --output to be a .png file or a folder, got {output}")
    if output.suffix and num_images > 1:
        raise ValueError(f"expected --output to be a folder for {num_images} images, got {output}")
    chosen = _read_plan(plan) if plan is not None else None
    pipe = FastCachePipeline(open_bundle(engines))
    said = {"prompt": prompt, "negative_prompt": negative_prompt, "sampler": sampler, "steps": steps}
    start, images, used = time.perf_counter(), list[dict[str, Any]](), chosen
    (output.parent if output.suffix else output).mkdir(parents=True, exist_ok=True)
    most = pipe.bundle.manifest.profiles["batch"].max
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("drawing", total=None)
        for first in range(0, num_images, most):
            seeds = [seed + k for k in range(first, min(first + most, num_images))]
            result = pipe(
                [prompt] * len(seeds),
                negative_prompt=negative_prompt,
                sampler=sampler,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                cache_interval=cache_interval or 1,
                plan=chosen,
                generator=[torch.Generator().manual_seed(own) for own in seeds],
                callback_on_step_end=lambda *_: bar.advance(task),
            )
            used = result.plan
            for own, image in zip(seeds, result.images, strict=True):
                path = output if output.suffix else output / f"{own:05d}.png"
                made = pipe.provenance(result.plan) | said | {"guidance_scale": guidance_scale, "seed": own}
                write_whole(path, png_bytes(image, made))
                images.append({"path": str(path), "seed": own})
    if json_:
        print_json(
            {
                "images": images,
                "plan": json.loads(used.to_json()) if used else None,
                "bundle_sha256": pipe.bundle.manifest.bundle_sha256,
                "time_ms": round((time.perf_counter() - start) * 1e3, 1),
            }
        )
    else:
        typer.echo("\n".join(image["path"] for image in images))


@app.command()
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


@app.command()
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


def _read_plan(path: Path) -> CachePlan:
    from fastcache.run.plan import CachePlan

    try:
        return CachePlan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a plan file, got {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


if __name__ == "__main__":
    main()
