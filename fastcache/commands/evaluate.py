"""`evaluate`: what plans cost in quality and gain in time, on the same prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcache.commands.options import (
    EnginesOption,
    Guidance,
    Json,
    OutputFolder,
    Sampler,
    check_writable,
    generate_with,
    prompts_or_own,
    read_plan,
)
from fastcache.console import figure, next_step, print_json, print_table, progress

if TYPE_CHECKING:
    from fastcache.evaluate.evaluate import Evaluation, Judge, Score
    from fastcache.evaluate.quality import Estimate
    from fastcache.loop.plan import CachePlan
    from fastcache.pipeline.pipeline import FastCachePipeline

# as a table has room for
_HEADERS = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "scene_right": "all right",
    "attribute_accuracy": "attributes",
    "lpips": "LPIPS",
    "clip_score": "CLIP",
    "frechet_distance": "Fréchet",
}


def evaluate(
    engines: EnginesOption,
    plan: Annotated[list[Path], typer.Option(help="A plan file, made by `fastcache plan`. Give it again for more.")],
    output: OutputFolder,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, one prompt a line. The bundled model has its own.")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(min=2, max=10**6, help="How many pictures to draw; if left out one for each prompt, or 32."),
    ] = None,
    sampler: Sampler = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="The steps of the run without caching; if left out the plans' own."),
    ] = None,
    guidance_scale: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="The first picture's seed.")] = 0,
    lpips: Annotated[Path | None, typer.Option(help="torchvision's alexnet in safetensors, for LPIPS.")] = None,
    clip: Annotated[Path | None, typer.Option(help="A folder with a CLIP model, for the CLIP score.")] = None,
    inception: Annotated[Path | None, typer.Option(help="torch-fidelity's Inception in safetensors, for FID.")] = None,
    reference_images: Annotated[Path | None, typer.Option(help="A folder of true pictures, for FID.")] = None,
    json_: Json = False,
) -> None:
    """Draw the same prompts and seeds with every plan and without caching; compare likeness, quality and time.

    Beside each plan stands a run without caching, of as many steps as take the same time. Writes results.json,
    chart.png and grid.png. Every figure comes with its 95% interval (bootstrap over the pictures).

    Example: fastcache evaluate --engines demo-output/engines --plan plan.json --num-images 32 --output evaluation
    """
    from fastcache.bundle.bundle import open_bundle
    from fastcache.evaluate.chart import require_matplotlib
    from fastcache.evaluate.evaluate import candidates_of, fewer_steps, warn_of_few_calls
    from fastcache.evaluate.evaluate import evaluate as run
    from fastcache.pipeline.pipeline import FastCachePipeline

    require_matplotlib()
    check_writable(output)
    plans = _read_plans(plan)
    if (inception is None) != (reference_images is None):
        raise ValueError("expected --inception and --reference-images together, got one of them; give both or neither")
    pipe = FastCachePipeline(open_bundle(engines))
    chosen = _prompts(pipe, prompts, num_images)
    guidance = pipe.bundle.manifest.model.defaults.guidance_scale if guidance_scale is None else guidance_scale
    candidates = candidates_of(pipe, plans, sampler, steps)
    judging = _judges(chosen, lpips, clip, inception, reference_images)
    warn_of_few_calls(candidates)
    with progress() as say:
        say("timing each plan, for runs of fewer steps that take as long")
        candidates += fewer_steps(pipe, candidates, chosen, guidance)
        found = run(pipe, candidates, chosen, **judging, first_seed=seed, guidance_scale=guidance, say=say)
    result = _document(pipe, found, {"guidance_scale": guidance, "first_seed": seed, "prompts": chosen})
    title = _write(result, found, output)
    if json_:
        print_json(result)
        return
    _show(found.rows, title)
    typer.echo(f"chart:   {output / 'chart.png'}\npictures: {output / 'grid.png'}\nresults: {output / 'results.json'}")
    next_step(generate_with(engines, pipe.bundle.manifest.model.name, f"--plan {plan[0]}"))


def _write(result: dict[str, Any], found: Evaluation, output: Path) -> str:
    """Write the results, the chart and the grid; returns what they are headed with."""
    from fastcache.bench.demo import grid
    from fastcache.evaluate.chart import draw_frontier
    from fastcache.files import write_json

    write_json(output / "results.json", result)
    conditions = result["conditions"]
    title = (
        f"{conditions['model']} {conditions['size'][0]}x{conditions['size'][1]}, {found.images} pictures, "
        f"{conditions['backend']} {conditions['dtype']} on {conditions['device']}, {conditions['threads']} threads"
    )
    draw_frontier(found.rows, title, output / "chart.png")
    labels = [_label(row) for row in found.rows]
    grid(list(zip(labels, map(list, found.samples), strict=True))).save(output / "grid.png")
    return title


def _read_plans(files: Sequence[Path]) -> dict[str, CachePlan]:
    """The plans by their files' names."""
    names = [file.stem for file in files]
    twice = {name for name in names if names.count(name) > 1} | ({"uncached"} & set(names))
    if twice:
        raise ValueError(f"expected plan files of different names, none of them uncached, got {', '.join(twice)}")
    return {name: read_plan(file) for name, file in zip(names, files, strict=True)}


def _prompts(pipe: FastCachePipeline, file: Path | None, count: int | None) -> list[str]:
    """As many prompts as pictures; those of a file are taken again, with further seeds, where they are fewer."""
    from fastcache.evaluate.judges import held_out_prompts

    own = prompts_or_own(file, pipe.bundle.manifest, lambda: held_out_prompts(count or 32))
    return [own[k % len(own)] for k in range(count or len(own))]


def _judges(
    prompts: Sequence[str], lpips: Path | None, clip: Path | None, inception: Path | None, pictures: Path | None
) -> dict[str, Any]:
    """What these prompts and files allow to judge, and for a distance the features and those of true pictures."""
    from fastcache.evaluate import judges as known

    judges: dict[str, Judge] = {"psnr_db": known.psnr_db, "ssim": known.ssim}
    look: Callable[..., Any] | None = None
    truth = None
    if all(known.scene_of(prompt) is not None for prompt in prompts):
        judges |= {"scene_right": known.scene_right, "attribute_accuracy": known.attribute_accuracy}
        look, truth = known.demo_features, known.true_features(prompts)
    if lpips is not None:
        judges["lpips"] = known.lpips_judge(lpips)
    if clip is not None:
        judges["clip_score"] = known.clip_judge(clip)
    if inception is not None and pictures is not None:
        look = known.inception_features(inception)
        truth = known.features_of_folder(pictures, look)
    return {"judges": judges, "features_of": look, "truth": truth}


def _document(pipe: FastCachePipeline, found: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from fastcache.evaluate.evaluate import UNCACHED

    manifest = pipe.bundle.manifest
    return {
        "schema": "fastcache.evaluation/1",
        "conditions": {
            "model": manifest.model.name,
            "bundle_sha256": manifest.bundle_sha256,
            "size": [manifest.width, manifest.height],
            "backend": manifest.backend,
            "dtype": manifest.dtype,
            "device": manifest.device,
            "versions": manifest.versions,
            "threads": torch.get_num_threads(),
            "images": found.images,
            "reference": UNCACHED,
            "intervals": "95%, bootstrap over pictures, and over batches for speed",
            "times": "median U-Net loop of a batch, all plans in turn on each batch",
        },
        "settings": settings,
        "rows": [row.to_json() for row in found.rows],
    }


def _label(row: Score) -> str:
    if row.candidate.name == "uncached":
        return f"uncached\n{row.loop_ms:.0f} ms (1.00x)"
    return f"{row.candidate.name}\n{row.speedup.value:.2f}x faster\nPSNR {row.metrics['psnr_db'].value:.1f} dB"


def _show(rows: Sequence[Score], title: str) -> None:
    names = list(rows[0].metrics)
    print_table(
        f"{title}\nmeans over pictures, with the half width of their 95% intervals; times side by side",
        ["plan", "refreshes", "loop", "speed", *(_HEADERS.get(name, name) for name in names)],
        [
            [
                row.candidate.name,
                f"{len(row.candidate.plan.refresh_steps)}/{row.candidate.plan.num_steps}",
                figure(row.loop_ms, ".0f", " ms"),
                figure(row.speedup.value, ".2f", "x"),
                *(_cell(name, row.metrics[name]) for name in names),
            ]
            for row in rows
        ],
    )


def _cell(name: str, estimate: Estimate) -> str:
    """A mean to the place of its half width's first digit; what holds for every picture alike has none."""
    from fastcache.evaluate.quality import MOST_DB

    if name == "psnr_db" and estimate.low >= MOST_DB:
        return "equal"
    if estimate.half_width < 5e-4:
        return f"{estimate.value:.3g}"
    places = max(0, -math.floor(math.log10(estimate.half_width)))
    return f"{estimate.value:.{places}f} ± {estimate.half_width:.{places}f}"
