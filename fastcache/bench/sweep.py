"""A benchmark at several sizes and batches -> the table of diffusers' page on DeepCache, as this machine has it.

Every cell is a benchmark of its own: eager, and each caching by the DeepCache package and by engines, in turns. Cells
come smallest first. Knows the published figures; how arms are timed is the business of `bench.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fastcache.bench.arms import Arm, BenchSettings, cached_arm
from fastcache.bench.bench import ArmResult, run_bench
from fastcache.bench.lineup import build_bundles, line_up_arms
from fastcache.bench.work import geometry, unet_work
from fastcache.compile.models import find_model
from fastcache.cut.work import uniform_cost

CACHINGS: Final = ((3, 0), (5, 0), (5, 1))  # the table's columns: cache interval I and branch B
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
) -> Iterator[list[dict[str, Any]]]:
    """The table's rows, a cell at a time. A cell's bundles are gone when it is done, for they take gigabytes.

    Shapes: `sizes` are the sides of square pictures, in pixels.

    Raises: `ValueError`, before anything is timed, for a size that the model does not draw.
    """
    shapes = geometry(find_model(settings.model, random_weights=settings.random_weights))
    for size in sizes:
        shapes.size(size, size)
    cells = [replace(settings, height=size, width=size, batch=batch) for size in sizes for batch in batches]
    return _cells(sorted(cells, key=lambda cell: cell.height**2 * cell.batch), backend, say)


def _cells(cells: Sequence[BenchSettings], backend: str, say: Callable[[str], None]) -> Iterator[list[dict[str, Any]]]:
    for own in cells:
        say(f"{own.width}x{own.height}, batch {own.batch}")
        with tempfile.TemporaryDirectory(prefix="fastcache-sweep-") as folder:
            bundles, lineup = build_bundles(line_up_arms(arms_of(own, backend), own.device), own, Path(folder), say)
            yield rows_of(own, run_bench(own, lineup, bundles, say).results)


def arms_of(settings: BenchSettings, backend: str) -> list[Arm]:
    """Eager, the engines uncached, and each caching by the DeepCache package and by engines."""
    own = settings.dtype
    torchs = "fp32" if own == "int8" else own
    plain = [(f"eager:{torchs}", 1, 0), (f"engine:{backend}:{own}", 1, 0)]
    cached = [
        (name, *caching) for caching in CACHINGS for name in (f"deepcache:{torchs}", f"engine+cache:{backend}:{own}")
    ]
    return [cached_arm(name, own, interval, branch_id) for name, interval, branch_id in (*plain, *cached)]


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
        full, shallow = work.full.total, work.shallow[branch].total
        return round(full / uniform_cost(full, shallow, settings.steps, interval), 3)

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
