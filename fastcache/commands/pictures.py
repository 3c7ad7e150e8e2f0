"""`demo` and `generate`: pictures from engines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastcache.commands.options import EnginesOption, Json, OutputFolder, Sampler, Scale, read_plan
from fastcache.console import figure, notes, print_json, print_table, progress


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


def _pictures(**files: Path | None) -> dict[str, Any]:
    """The pictures in those of the files that are given."""
    from fastcache.run.images import read_image

    return {name: read_image(file) for name, file in files.items() if file is not None}


def generate(
    engines: EnginesOption,
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    output: Annotated[Path, typer.Option(help="A .png file, or a folder for several images.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="How many images; seeds count up from --seed.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    sampler: Sampler = "ddim",
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 or less switches it off.")] = 7.5,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The first image's seed.")] = 0,
    cache_interval: Annotated[int | None, typer.Option(min=1, help="Refresh the cached feature every N steps.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file instead of an interval.")] = None,
    init_image: Annotated[Path | None, typer.Option(help="A picture to begin with.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --init-image to draw anew, 0 to 1.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture, white where to draw on --init-image.")] = None,
    control_image: Annotated[Path | None, typer.Option(help="A picture for the bundle's ControlNet.")] = None,
    controlnet_conditioning_scale: Scale = None,
    adapter_image: Annotated[Path | None, typer.Option(help="A picture for the bundle's T2I-Adapter.")] = None,
    adapter_conditioning_scale: Scale = None,
    ip_adapter_image: Annotated[Path | None, typer.Option(help="A picture for the bundle's IP-Adapter.")] = None,
    ip_adapter_scale: Scale = None,
    height: Annotated[int | None, typer.Option(help="One of the bundle's heights, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="One of the bundle's widths, in pixels.")] = None,
    clip_skip: Annotated[int | None, typer.Option(help="Leave out the text encoder's last layers.")] = None,
    json_: Json = False,
) -> None:
    """Draw images with a bundle's engines.

    Example: fastcache generate --engines demo-output/engines --prompt "a red circle" --output out.png
    """
    import torch
    from rich.progress import Progress

    from fastcache.bundle import open_bundle, write_whole
    from fastcache.run.images import png_bytes
    from fastcache.run.pipeline import FastCachePipeline

    if plan is not None and cache_interval is not None:
        raise ValueError("expected --cache-interval or --plan, got both")
    if output.suffix and output.suffix.lower() != ".png":
        raise ValueError(f"expected --output to be a .png file or a folder, got {output}")
    if output.suffix and num_images > 1:
        raise ValueError(f"expected --output to be a folder for {num_images} images, got {output}")
    chosen = read_plan(plan) if plan is not None else None
    given = _pictures(image=init_image, mask_image=mask)
    shown = {"control_image": control_image, "adapter_image": adapter_image, "ip_adapter_image": ip_adapter_image}
    scales = {
        "controlnet_conditioning_scale": controlnet_conditioning_scale,
        "adapter_conditioning_scale": adapter_conditioning_scale,
        "ip_adapter_scale": ip_adapter_scale,
    }
    steering: dict[str, Any] = _pictures(**shown) | scales
    pipe = FastCachePipeline(open_bundle(engines))
    said = {"prompt": prompt, "negative_prompt": negative_prompt or "", "sampler": sampler, "steps": steps}
    if init_image is not None:
        said |= {"init_image": init_image.name, "strength": strength, "mask": mask.name if mask is not None else None}
    said |= {name: file.name for name, file in shown.items() if file is not None}
    said |= {name: scale for name, scale in scales.items() if scale is not None}
    start, images, used = time.perf_counter(), list[dict[str, Any]](), chosen
    (output.parent if output.suffix else output).mkdir(parents=True, exist_ok=True)
    most = pipe.bundle.manifest.profiles["batch"].max
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("drawing", total=None)
        for first in range(0, num_images, most):
            seeds = [seed + k for k in range(first, min(first + most, num_images))]
            repeated: dict[str, Any] = {name: [picture] * len(seeds) for name, picture in given.items()}
            result = pipe(
                [prompt] * len(seeds),
                negative_prompt=negative_prompt,
                sampler=sampler,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                clip_skip=clip_skip,
                strength=strength,
                **repeated,
                **steering,
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
