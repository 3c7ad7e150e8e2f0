"""A benchmark at several sizes and batches -> the table of diffusers' page on DeepCache, as this machine has it.

Every cell is a benchmark of its own: eager, and each caching by the DeepCache package and by engines, in turns. Cells
come smallest first. Knows the published figures; how arms are timed is the business of `bench.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fastcache.bench.arms import Arm, BenchSettings, Defaults, parse_arm
from fastcache.bench.bench import ArmResult, run_bench
from fastcache.bench.lineup import build_bundles, line_up_arms
from fastcache.bench.work import unet_work
from fastcache.compile.models import find_model

CACHINGS: Final = ((3, 0), (5, 0), (5, 1))  # the table's columns: cache interval I and branch B
SIZES: Final = (512, 768, 1024)
BATCHES: Final = (1, 4, 8)
# DeepCache's speed-ups on an RTX A5000 by size and batch, for each of CACHINGS; of whole pipelines, 50 steps, SD2.1.
# Source: diffusers' documentation, optimization/deepcache.
PUBLISHED: Final[Mapping[tuple[int, int], tuple[float, ...]]] = {
    (512, 8): (2.32, 3.18, 2.20),
    (512, 4): (2.33, 3.21, 2.24),
    (512, 1): (2.33, 3.24, 2.35),
    (768, 8): (2.29, 3.12, 2.05),
    (768, 4): (2.30, 3.13, 2.07),
    (768, 1): (2.33, 3.21, 2.12),
    (1024, 8): (2.24, 3.02, 1.92),
    (1024, 4): (2.25, 3.04, 1.91),
    (1024, 1): (2.28, 3.12, 1.93),
}


def sweep(
    settings: BenchSettings, backend: str, sizes: Sequence[int], batches: Sequence[int], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The table's rows. A cell's bundles are gone when it is done, for those of one alone take gigabytes.

    Shapes: `sizes` are the sides of square pictures, in pixels.
    """
    cells = sorted(((size, batch) for size in sizes for batch in batches), key=lambda cell: cell[0] ** 2 * cell[1])
    rows = list[dict[str, Any]]()
    for size, batch in cells:
        own = replace(settings, height=size, width=size, batch=batch)
        say(f"{size}x{size}, batch {batch}")
        with tempfile.TemporaryDirectory(prefix="fastcache-sweep-") as folder:
            bundles, lineup = build_bundles(line_up_arms(arms_of(own, backend), own.device), own, Path(folder), say)
            rows += rows_of(own, run_bench(own, lineup, bundles, say).results)
    return rows


def arms_of(settings: BenchSettings, backend: str) -> list[Arm]:
    """Eager, the engines uncached, and each caching by the DeepCache package and by engines."""
    dtype = settings.dtype
    torchs = "fp32" if dtype == "int8" else dtype
    plain = [f"eager:{torchs}", f"engine:{backend}:{dtype}"]
    caching = [f"deepcache:{torchs}", f"engine+cache:{backend}:{dtype}"]
    found = [parse_arm(name, Defaults()) for name in plain]
    for interval, branch in CACHINGS:
        arms = [parse_arm(name, Defaults(cache_interval=interval, branch_id=branch)) for name in caching]
        found += [replace(arm, name=f"{arm.name} I={interval} B={branch}") for arm in arms]
    return found


def rows_of(settings: BenchSettings, results: Sequence[ArmResult]) -> list[dict[str, Any]]:
    """A cell's arms as rows of the table.

    Beside what was measured stand the ceiling that the multiply-adds set to caching on one backend, and the speed-up
    that was published for DeepCache.
    """
    model = find_model(settings.model, random_weights=settings.random_weights)
    work = unet_work(model, settings.height, settings.width)
    cell = settings.height, settings.batch
    published = dict(zip(CACHINGS, PUBLISHED.get(cell, ()), strict=False))
    uncached = {arm.backend: arm.loop_ms_p50 for arm in results if arm.cache_interval == 1}

    def ceiling(interval: int, branch: int) -> float:
        full = -(-settings.steps // interval)
        rest = (settings.steps - full) * work.shallow[branch].total / work.full.total
        return round(settings.steps / (full + rest), 3)

    def row(arm: ArmResult) -> dict[str, Any]:
        common = {"size": cell[0], "batch": cell[1], "arm": arm.name.split(" ")[0]}
        if arm.skipped is not None:
            return common | {"skipped": arm.skipped}
        interval, branch = arm.cache_interval or 1, arm.branch_id or 0
        own = uncached.get(arm.backend)
        return common | {
            "cache_interval": interval,
            "branch_id": branch,
            "loop_ms_p50": arm.loop_ms_p50,
            "speedup_vs_eager": arm.speedup_vs_eager_same_dtype or arm.speedup_vs_eager,
            "speedup_vs_uncached": round(own / arm.loop_ms_p50, 3) if own and arm.loop_ms_p50 else None,
            "ceiling_vs_uncached": ceiling(interval, branch),
            "published": published.get((interval, branch)),
            "unsteady": arm.unsteady,
        }

    return [row(arm) for arm in results]
