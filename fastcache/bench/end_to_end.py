"""Prompt to PNG, from the start of a process on: arms side by side, and where each one's time goes.

Each arm draws in a process of its own in every round, as a command does; `python -m fastcache.bench.end_to_end` is that
process. Knows pipelines; how their loops are timed alone is `bench.py`'s business.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcache.bench.arms import PROMPT, Arm, BenchSettings

if TYPE_CHECKING:
    from fastcache.bench.lineup import BundleKey, Lineup
    from fastcache.bundle.bundle import Bundle

PARTS = ("start_ms", "text_ms", "loop_ms", "vae_ms", "png_ms")


@dataclass(frozen=True)
class Order:
    """What one process is to draw. `began` is when it was started, in seconds since the epoch; `folder` the model's.

    `plan` is the file of the plan that engines draw by, or empty.
    """

    kind: str
    dtype: str
    bundle: str | None
    folder: str
    cache_interval: int
    branch_id: int
    settings: dict[str, Any]
    began: float
    output: str
    plan: str = ""


def run_end_to_end(
    settings: BenchSettings,
    lineup: Lineup,
    bundles: Mapping[BundleKey, Bundle],
    folder: Path,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Each arm's medians over the rounds, in milliseconds, by part; with its distance to the first arm's picture.

    `folder` is the model's. An arm that cannot run has `skipped`, the reason.
    """
    skipped, found = dict(lineup.skipped), dict[Arm, list[dict[str, float]]]()
    with tempfile.TemporaryDirectory() as kept:
        pictures = {arm: Path(kept) / f"{k}.png" for k, arm in enumerate(lineup.arms)}
        for i in range(-settings.warmup, settings.repeats):
            say(f"warm-up {i + settings.warmup + 1}" if i < 0 else f"round {i + 1} of {settings.repeats}")
            for arm in lineup.arms:
                if arm in skipped:
                    continue
                bundle = str(bundles[arm.bundle_key].path) if arm.is_engine else None
                times = _draw_apart(arm, settings, bundle, folder, pictures[arm])
                if isinstance(times, str):
                    skipped[arm] = times
                elif i >= 0:
                    found.setdefault(arm, []).append(times)
        ran = [arm for arm in lineup.arms if arm in found and arm not in skipped]
        distances = _distances(ran, pictures)
    rows = {arm: _medians(found[arm]) for arm in ran}
    eager = _eager(ran)
    first = None if eager is None else rows[eager]["total_ms"]
    return [
        {"name": arm.name, "skipped": skipped[arm]}
        if arm in skipped
        else {
            "name": arm.name,
            "backend": arm.backend,
            "dtype": arm.dtype,
            "cache_interval": None if arm.plan else arm.cache_interval,
            "plan": arm.plan or None,
            "branch_id": arm.branch_id,
            **rows[arm],
            "loop_ms_p50": rows[arm]["loop_ms"],
            "speedup_vs_eager": round(first / rows[arm]["total_ms"], 3) if first else None,
            "psnr_db_vs_eager": distances.get(arm),
        }
        for arm in lineup.arms
    ]


def whole_model(settings: BenchSettings) -> Path:
    """The folder of a model with all its parts. Raises: `ValueError` for one without text or VAE, or of one picture."""
    from fastcache.compile.models import find_model

    source = find_model(settings.model, random_weights=settings.random_weights)
    if source.folder is None or not {"unet", "vae", "text"} <= {*source.components} or settings.batch != 1:
        have = ", ".join(source.components)
        raise ValueError(
            f"expected a model with unet, vae and text, and --batch 1, for --end-to-end, got {settings.model} with "
            f"{have} and --batch {settings.batch}; give a model's folder"
        )
    if settings.guided_rows != 2 or settings.controlnets:
        raise ValueError(
            f"expected a text-to-image model without ControlNet for --end-to-end, got {settings.model} with "
            f"{len(settings.controlnets)} ControlNets and guidance of {settings.guided_rows}; time its loop alone"
        )
    return source.folder


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def _draw_apart(
    arm: Arm, settings: BenchSettings, bundle: str | None, folder: Path, output: Path
) -> dict[str, float] | str:
    """The times of one process, or why there are none."""
    order = Order(
        arm.kind,
        arm.dtype,
        bundle,
        str(folder),
        arm.cache_interval,
        arm.branch_id,
        asdict(settings),
        time.time(),
        str(output),
        arm.plan,
    )
    command = [sys.executable, "-P", "-m", "fastcache.bench.end_to_end", json.dumps(asdict(order))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def _eager(arms: Sequence[Arm]) -> Arm | None:
    """The eager arm that others are compared with: in fp32 where it is there, wherever it stands."""
    eager = [arm for arm in arms if arm.kind == "eager"]
    return min(eager, key=lambda arm: arm.dtype != "fp32", default=None)


def _distances(arms: Sequence[Arm], pictures: Mapping[Arm, Path]) -> dict[Arm, float]:
    """PSNR of each picture to eager's, in dB, at 8 bits."""
    import numpy as np
    import torch
    from PIL import Image

    from fastcache.evaluate.quality import psnr_db

    def read(arm: Arm) -> torch.Tensor:
        with Image.open(pictures[arm]) as picture:
            return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)

    eager = _eager(arms)
    if eager is None:
        return {}
    return {arm: round(min(psnr_db(read(arm), read(eager)), 200.0), 2) for arm in arms if arm != eager}


def draw(order: Order) -> dict[str, float]:
    """Draw one picture and write it. Returns the milliseconds of each part, and of all."""
    marks = [order.began]

    def mark() -> None:
        if order.settings["device"] == "cuda":
            import torch

            torch.cuda.synchronize()
        marks.append(time.time())

    picture = (_draw_by_engines if order.bundle is not None else _draw_by_diffusers)(order, mark)
    content = io.BytesIO()
    picture.save(content, "PNG")
    mark()
    Path(order.output).write_bytes(content.getvalue())
    parts = [round(1e3 * (end - start), 3) for start, end in itertools.pairwise(marks)]
    return dict(zip(PARTS, parts, strict=True)) | {"total_ms": round(1e3 * (marks[-1] - marks[0]), 3)}


def _draw_by_engines(order: Order, mark: Callable[[], None]) -> Any:
    from fastcache.pipeline.loading import load

    asked = order.settings
    graph = order.kind.endswith("+graph")
    pipe = load(str(order.bundle), threads=asked["threads"], cuda_graph=graph)
    import torch

    from fastcache.loop.plan import CachePlan

    torch.set_num_threads(asked["threads"])
    mark()
    embeds = pipe.encode_prompt(["", PROMPT])
    mark()
    steps: dict[str, Any] = {"num_inference_steps": asked["steps"], "cache_interval": order.cache_interval}
    sampler = asked["sampler"]
    if order.plan:
        plan = CachePlan.from_json(Path(order.plan).read_text(encoding="utf-8"))
        steps, sampler = {"plan": plan}, None if plan.sampler else sampler
    latents = pipe(
        **steps,
        prompt_embeds=embeds[1:],
        negative_prompt_embeds=embeds[:1],
        sampler=sampler,
        guidance_scale=asked["guidance_scale"],
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    mark()
    picture = pipe.decode(latents)[0]
    mark()
    return picture


def _draw_by_diffusers(order: Order, mark: Callable[[], None]) -> Any:
    import diffusers
    import torch

    from fastcache.sampler.scheduler import make_scheduler
    from fastcache_engines.dtypes import torch_dtype

    asked, dtype = order.settings, torch_dtype(order.dtype)  # type: ignore[arg-type]
    torch.set_num_threads(asked["threads"])
    load: Any = diffusers.DiffusionPipeline.from_pretrained
    pipe: Any = load(order.folder, dtype=dtype, safety_checker=None, local_files_only=True).to(asked["device"])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(asked["sampler"], pipe.scheduler.config)
    if order.kind == "compile":
        pipe.unet = torch.compile(pipe.unet)
    elif order.kind == "deepcache":
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=order.cache_interval, cache_branch_id=order.branch_id)
        helper.enable()
    mark()
    with torch.no_grad():
        positive, negative, *pooled = pipe.encode_prompt(PROMPT, asked["device"], 1, True)
        mark()
        told = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        if pooled:
            told |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
        latents = pipe(
            **told,
            num_inference_steps=asked["steps"],
            guidance_scale=asked["guidance_scale"],
            height=asked["height"],
            width=asked["width"],
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        mark()
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        picture = pipe.image_processor.postprocess(decoded.float(), output_type="pil")[0]
    mark()
    return picture


if __name__ == "__main__":
    sys.stdout.write(json.dumps(draw(Order(**json.loads(sys.argv[1])))) + "\n")
