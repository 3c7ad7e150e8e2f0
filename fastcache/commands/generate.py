"""`generate`: flags and files -> pictures from a bundle's engines, and how each was made, written into it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastcache.commands.options import (
    CacheInterval,
    EnginesOption,
    Guidance,
    Json,
    NegativePrompt,
    PlanFile,
    Sampler,
    TrustedKey,
    check_writable,
    existing_of,
    flags_of,
    read_plan,
)
from fastcache.commands.watched import preview_path, watching
from fastcache.console import next_step, print_json

if TYPE_CHECKING:
    from fastcache.pipeline.pipeline import FastCachePipeline, PipelineOutput, Watch

# Flags of the pipeline's arguments that a refiner is not given.
_FOR_BASE = {
    *("height", "width", "strength", "image_guidance_scale"),
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
    *("adapter_conditioning_scale", "ip_adapter_scale"),
}
_PICTURES = {
    "init_image": "image",
    "mask": "mask_image",
    "control_image": "control_image",
    "adapter_image": "adapter_image",
    "ip_adapter_image": "ip_adapter_image",
}
_REPEATED = ("image", "mask_image")  # so that each picture draws its own sample of what it begins with
_EMBEDS = (
    *("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "ip_adapter_image_embeds",
)
_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # which no folder is called after
_HAND_OVER = 0.8  # arXiv 2307.01952, section 2.5: the refiner is for the last fifth of the noise levels

_begin = partial(typer.Option, rich_help_panel="Begin with a picture")
_steer = partial(typer.Option, rich_help_panel="Steer by a picture")
_told = partial(typer.Option, rich_help_panel="SDXL")
_Count = Annotated[float | None, _steer(help="How much that picture counts; 1 if left out.")]
_Pair = Annotated[
    tuple[int, int] | None,
    _told(metavar="HEIGHT WIDTH", help="A size that the model is told; if left out that of the picture."),
]
_Corner = Annotated[
    tuple[int, int] | None, _told(metavar="TOP LEFT", help="A corner that the model is told; 0 0 if left out.")
]


def generate(  # as long as its flags are many
    ctx: typer.Context,
    engines: EnginesOption,
    output: Annotated[Path, typer.Option(help="A .png file, or a folder for several images.")],
    prompt: Annotated[str | None, typer.Option(help="What to draw; or else give --embeds.")] = None,
    negative_prompt: NegativePrompt = None,
    num_images: Annotated[int, typer.Option(min=1, max=10**6, help="How many images; seeds count up from --seed.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Denoising steps; if left out the plan's or the model's own.")
    ] = None,
    sampler: Sampler = None,
    eta: Annotated[
        float | None, typer.Option(help="How much new noise DDIM adds in each step, 0 to 1; none if left out.")
    ] = None,
    guidance_scale: Guidance = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="Against pictures that guidance makes too bright, 0 to 1; none if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The first image's seed.")] = 0,
    cache_interval: CacheInterval = None,
    plan: PlanFile = None,
    quality: Annotated[
        str | None,
        typer.Option(help="draft, standard or fine: one of the plans that `fastcache plan --frontier` wrote."),
    ] = None,
    plans: Annotated[Path | None, typer.Option(help="The folder that --frontier wrote them into.")] = None,
    height: Annotated[int | None, typer.Option(help="One of the bundle's heights, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="One of the bundle's widths, in pixels.")] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="How many of the text encoder's last layers to leave out.")
    ] = None,
    embeds: Annotated[
        Path | None,
        typer.Option(help="A .safetensors file with prompt_embeds and the like, one row each, instead of --prompt."),
    ] = None,
    init_image: Annotated[Path | None, _begin(help="A picture to begin with, or to edit.")] = None,
    strength: Annotated[float | None, _begin(help="How much of --init-image to draw anew, 0 to 1.")] = None,
    mask: Annotated[Path | None, _begin(help="A picture, white where to draw on --init-image.")] = None,
    image_guidance_scale: Annotated[
        float | None, _begin(help="InstructPix2Pix: how closely to follow --init-image.")
    ] = None,
    control_image: Annotated[
        list[Path] | None, _steer(help="A picture for the bundle's ControlNet; of several, once for each.")
    ] = None,
    controlnet_conditioning_scale: Annotated[
        list[float] | None, _steer(help="How much that picture counts; 1 if left out. Once for all, or each.")
    ] = None,
    control_guidance_start: Annotated[
        list[float] | None, _steer(help="The share of steps, 0 to 1, after which the ControlNet begins.")
    ] = None,
    control_guidance_end: Annotated[
        list[float] | None, _steer(help="The share of steps, 0 to 1, after which it ends.")
    ] = None,
    adapter_image: Annotated[Path | None, _steer(help="A picture for the bundle's T2I-Adapter.")] = None,
    adapter_conditioning_scale: _Count = None,
    ip_adapter_image: Annotated[Path | None, _steer(help="A picture for the bundle's IP-Adapter.")] = None,
    ip_adapter_scale: _Count = None,
    prompt_2: Annotated[str | None, _told(help="The prompt for the second text encoder; if left out --prompt.")] = None,
    negative_prompt_2: Annotated[str | None, _told(help="The same for what not to draw.")] = None,
    original_size: _Pair = None,
    target_size: _Pair = None,
    crops_coords_top_left: _Corner = None,
    negative_original_size: _Pair = None,
    negative_target_size: _Pair = None,
    negative_crops_coords_top_left: _Corner = None,
    refiner: Annotated[
        Path | None, _told(help="The bundle of a refiner, which draws the last steps.", callback=existing_of)
    ] = None,
    denoising_end: Annotated[
        float | None,
        _told(help="The share of the noise levels at which the refiner takes over, 0 to 1; 0.8 if left out."),
    ] = None,
    aesthetic_score: Annotated[
        float | None, _told(help="How good a picture the refiner is told to draw; 6 if left out.")
    ] = None,
    negative_aesthetic_score: Annotated[
        float | None, _told(help="And which it is told to keep away from; 2.5 if left out.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="While it draws, show the picture on its way in a file beside --output.")
    ] = False,
    trusted_key: TrustedKey = None,
    json_: Json = False,
) -> None:
    """Draw images with a bundle's engines.

    Nothing is cached unless --cache-interval, --plan or --quality says so.

    Example: fastcache generate --engines demo-output/engines --prompt "a large red circle at the left on a white
    background" --cache-interval 3 --output circle.png
    """
    given = {name: _unwrapped(value) for name, value in ctx.params.items() if value not in (None, (), [])}
    _choose_quality(given)
    _check(output, num_images, given)
    check_writable(output)
    start = time.perf_counter()
    images, used = _draw_all(engines, refiner, output, range(seed, seed + num_images), given)
    if json_:
        print_json(
            {
                "images": images,
                "plan": json.loads(str(used["plan"])),
                "bundle_sha256": used["bundle_sha256"],
                "time_ms": round((time.perf_counter() - start) * 1e3, 1),
            }
        )
    else:
        typer.echo("\n".join(image["path"] for image in images))
        if not given.keys() & {"plan", "cache_interval"}:
            next_step("nothing was cached; --cache-interval 3 draws faster, and changes the picture a little")


def _draw_all(
    engines: Path, refiner: Path | None, output: Path, seeds: range, given: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, object]]:
    """Draw and write a picture for each seed; returns their files, and what made them."""
    from fastcache.bundle.bundle import open_bundle
    from fastcache.files import write_whole
    from fastcache.pipeline.loading import begin

    bundle = open_bundle(engines, given.get("trusted_key"))
    begin(bundle.manifest)
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.pipeline.provenance import png_bytes

    arguments = _arguments(given)
    pictures = {name: _pictures(flag, given[flag]) for flag, name in _PICTURES.items() if flag in given}
    said = {flag: _each(lambda file: file.name, given[flag]) for flag in (*_PICTURES, "embeds") if flag in given}
    base = FastCachePipeline(bundle)
    _check_controls(base, pictures.get("control_image"))
    last = None if refiner is None else FastCachePipeline(open_bundle(refiner, given.get("trusted_key")))
    if last is not None:
        said["refiner"] = last.bundle.manifest.bundle_sha256
    images, used = list[dict[str, Any]](), dict[str, object]()
    most = min(pipe.bundle.manifest.profiles["batch"].max for pipe in (base, last) if pipe is not None)
    batches = -(-len(seeds) // most) if last is None else None  # how a refiner shares the steps, only a run tells
    with watching(batches, preview_path(output, _is_file(output)) if given["watch"] else None) as watch:
        for first in range(0, len(seeds), most):
            batch = seeds[first : first + most]
            own_batch = arguments | {"num_images_per_prompt": len(batch), "seed": list(batch)}
            result = _draw(base, last, own_batch, pictures, given.get("denoising_end", _HAND_OVER), watch)
            used = result.made | said
            for own, image in zip(batch, result.images, strict=True):
                path = output if _is_file(output) else output / f"{own:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, png_bytes(image, used | {"seed": own}))
                images.append({"path": str(path), "seed": own})
    return images, used


def _is_file(output: Path) -> bool:
    """Whether one picture is meant: a folder may have a dot in its name."""
    return output.suffix.lower() == ".png" and not output.is_dir()


def _choose_quality(given: dict[str, Any]) -> None:
    """Turn --quality and --plans into --plan. Raises: `ValueError` for one without the other, or another quality."""
    quality, plans = given.pop("quality", None), given.pop("plans", None)
    if (quality is None) != (plans is None):
        raise ValueError("expected --quality with --plans, got one of them; give both or neither")
    if quality is None:
        return
    if own := given.keys() & {"plan", "cache_interval"}:
        raise ValueError(
            f"expected --quality, which chooses the plan, without {flags_of(*own)}, got both; leave one out"
        )
    if quality not in ("draft", "standard", "fine"):
        raise ValueError(f"expected --quality draft, standard or fine, got {quality}")
    given["plan"] = Path(plans) / f"{quality}.json"


def _check(output: Path, num_images: int, given: Mapping[str, Any]) -> None:
    """Raises: `ValueError` for flags that do not go together."""
    if output.suffix.lower() in _OTHER_PICTURES and not output.is_dir():
        raise ValueError(f"expected --output to be a .png file or a folder, got {output}")
    if _is_file(output) and num_images > 1:
        raise ValueError(f"expected --output to be a folder for --num-images {num_images}, got {output}")
    if given["seed"] + num_images > 2**63:
        raise ValueError(
            f"expected --seed below 2**63 for each of {num_images} images, got {given['seed']} for the first"
        )
    if {"plan", "cache_interval"} <= given.keys():
        raise ValueError("expected --cache-interval or --plan, got both; leave one out")
    if {"plan", "refiner"} <= given.keys():
        raise ValueError(
            "expected --cache-interval with --refiner, for no plan counts its steps, got --plan; leave it out"
        )
    if "denoising_end" in given and "refiner" not in given:
        raise ValueError("expected --refiner with --denoising-end, got none; name the one that ends the picture")


def _unwrapped(value: Any) -> Any:
    """Of a flag that may be repeated, and was not, what was given."""
    return value[0] if isinstance(value, list | tuple) and len(cast("list[Any]", value)) == 1 else value


def _check_controls(pipe: FastCachePipeline, images: Any) -> None:
    """Raises: `ValueError` for more or fewer pictures than ControlNets; the pipeline would give one to each image."""
    count = sum(entry.kind == "controlnet" for entry in pipe.bundle.manifest.model.controls)
    if isinstance(images, list) and len(images) != count:
        raise ValueError(f"expected --control-image once for each of {count} ControlNets, got it {len(images)} times")


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments but for pictures, and for what each batch has of its own."""
    from fastcache.pipeline.request import Request

    apart = {"seed", "plan", "denoising_end", *_PICTURES}
    arguments = {field.name: given[field.name] for field in fields(Request) if field.name in given.keys() - apart}
    if "steps" in given:
        arguments["num_inference_steps"] = given["steps"]
    if "plan" in given:
        arguments["plan"] = read_plan(Path(given["plan"]))
    if "embeds" in given:
        arguments |= _read_embeds(given["embeds"])
    return arguments


def _each(act: Callable[[Path], Any], files: Any) -> Any:
    """What is made of a flag's file, or a list of what is made of each of its files."""
    return [act(Path(file)) for file in files] if isinstance(files, list | tuple) else act(Path(files))


def _pictures(flag: str, files: Any) -> Any:
    from fastcache.pipeline.images import read_image

    try:
        return _each(read_image, files)
    except ValueError as error:
        raise ValueError(f"{flags_of(flag)}: {error}") from None


def _read_embeds(file: str) -> dict[str, Any]:
    """Embeddings, by the pipeline's names. Raises: `ValueError` for a file of something else, or of several prompts."""
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except Exception as error:  # safetensors' own, which says too little
        raise ValueError(f"expected --embeds to be a .safetensors file of embeddings, got {file}: {error}") from None
    if others := sorted(found.keys() - _EMBEDS):
        raise ValueError(f"expected {', '.join(_EMBEDS)} in {file}, got {', '.join(others)}")
    shown = {name: [rows] for name, rows in found.items() if name.startswith("ip_adapter")}
    for name in found.keys() - shown.keys():
        if len(found[name]) != 1:
            raise ValueError(f"expected one row in {name} of {file}, got {len(found[name])}; draw them one by one")
    return found | shown


def _draw(
    base: FastCachePipeline,
    refiner: FastCachePipeline | None,
    arguments: Mapping[str, Any],
    pictures: Mapping[str, Any],
    hand_over: float,
    watch: Watch | None,
) -> PipelineOutput:
    """A batch of pictures, which the refiner finishes where there is one; the plan is the base's."""
    from fastcache.pipeline.request import Request

    count = arguments["num_images_per_prompt"]
    shown = {name: [picture] * count if name in _REPEATED else picture for name, picture in pictures.items()}
    if refiner is None:
        return base.draw(Request(**arguments, **shown), watch)
    begun = base.draw(Request(**arguments, **shown, denoising_end=hand_over, output_type="latent"), watch)
    shared = {name: value for name, value in arguments.items() if name not in (*_FOR_BASE, *_EMBEDS)}
    ended = refiner.draw(Request(**shared, image=begun.images, denoising_start=hand_over), watch)
    return replace(ended, plan=begun.plan)
