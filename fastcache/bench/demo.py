"""The bundled model's engines -> cached pictures beside uncached ones, and what caching gained and cost.

Times are medians over rounds in which every plan runs once, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastcache.evaluate.quality import psnr_db
from fastcache.files import write_whole
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.provenance import png_bytes
from fastcache.sampler.scheduler import own_sampler

PROMPTS = (
    "a large red circle at the left and a small blue square at the right on a white background",
    "a large yellow ring at the top and a large purple triangle at the bottom on a black background",
    "a small green cross at the left on a gray background",
    "a large cyan square at the top and a small orange circle at the bottom on a white background",
)
_CELL, _MARGIN, _HEADER = 160, 8, 64


@dataclass(frozen=True)
class DemoRow:
    """One plan's pictures: time of the whole call and likeness to the uncached pictures."""

    plan: str
    interval: int
    time_ms: float
    speedup_vs_uncached: float
    psnr_db: float | None


def run_demo(
    pipe: FastCachePipeline, intervals: list[int], steps: int, output: Path, say: Callable[[str], None], rounds: int = 5
) -> list[DemoRow]:
    """Draw `PROMPTS` without caching and at each interval, save pictures and grid, and return the rows."""

    def draw(interval: int) -> Tensor:
        return pipe(PROMPTS, num_inference_steps=steps, cache_interval=interval, seed=0, output_type="pt").images

    every = [1, *(n for n in intervals if n != 1)]
    say("drawing once with each plan")
    pictures = {interval: draw(interval) for interval in every}
    for interval, drawn in pictures.items():
        name = "uncached" if interval == 1 else f"N{interval}"
        for k, picture in enumerate(drawn):
            write_whole(output / f"{name}-{k}.png", png_bytes(_to_pil(picture), {}))
    times: dict[int, list[float]] = {interval: [] for interval in every}
    for i in range(rounds):
        say(f"timing, round {i + 1} of {rounds}")
        for interval in every:
            start = time.perf_counter()
            draw(interval)
            times[interval].append((time.perf_counter() - start) * 1e3)
    uncached = statistics.median(times[1])
    rows = [
        DemoRow(
            plan="uncached" if interval == 1 else f"every {interval} steps",
            interval=interval,
            time_ms=round(statistics.median(times[interval]), 1),
            speedup_vs_uncached=round(uncached / statistics.median(times[interval]), 3),
            psnr_db=None if interval == 1 else round(psnr_db(pictures[interval], pictures[1]), 2),
        )
        for interval in every
    ]
    sheet = grid([(_label(row), list(pictures[row.interval])) for row in rows])
    write_whole(output / "grid.png", png_bytes(sheet, {}))
    return rows


def report(pipe: FastCachePipeline, rows: list[DemoRow], steps: int) -> dict[str, Any]:
    """What `report.json` holds: the rows, their conditions and where the engines lie."""
    manifest = pipe.bundle.manifest
    return {
        "rows": [asdict(row) for row in rows],
        "engines": str(pipe.bundle.path),
        "bundle_sha256": manifest.bundle_sha256,
        "conditions": {
            "model": manifest.model.name,
            "backend": manifest.backend,
            "dtype": manifest.dtype,
            "versions": manifest.versions,
            "device": manifest.device,
            "threads": torch.get_num_threads(),
            "steps": steps,
            "sampler": own_sampler(manifest.model.scheduler),
            "guidance_scale": manifest.model.defaults.guidance_scale,
            "images": len(PROMPTS),
            "size": [manifest.height, manifest.width],
            "time": "median of whole calls: text encoder, U-Net loop, VAE decoder",
        },
        "prompts": PROMPTS,
    }


def grid(rows: list[tuple[str, list[Tensor]]]) -> Image.Image:
    """A labelled row of pictures for each entry. Shapes: pictures (3, H, W) in [0, 1]."""
    columns = max(len(pictures) for _, pictures in rows)
    label_width = 210
    size = (label_width + columns * (_CELL + _MARGIN), _HEADER + len(rows) * (_CELL + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(20)
    pen.text((_MARGIN, 18), "fastcache: same seeds, fewer full U-Net steps", "black", font=large)
    for r, (label, pictures) in enumerate(rows):
        y = _HEADER + r * (_CELL + _MARGIN)
        pen.multiline_text((_MARGIN, y + _CELL // 3), label, "black", font=small, spacing=6)
        for c, picture in enumerate(pictures):
            x = label_width + c * (_CELL + _MARGIN)
            sheet.paste(_to_pil(picture).resize((_CELL, _CELL), Image.Resampling.LANCZOS), (x, y))
            pen.rectangle((x, y, x + _CELL, y + _CELL), outline="gray")
    return sheet


def _label(row: DemoRow) -> str:
    if row.psnr_db is None:
        return f"uncached\n{row.time_ms:.0f} ms (1.00x)"
    return f"N={row.interval}\n{row.speedup_vs_uncached:.2f}x faster\nPSNR {row.psnr_db:.1f} dB"


def _to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
