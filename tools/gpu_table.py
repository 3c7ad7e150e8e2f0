"""The table of diffusers' page on DeepCache, measured on the machine at hand: arms of one task -> rows."""

from __future__ import annotations

from typing import Any

from gpu_task import Task
from macs import MultiplyAdds, multiply_adds

from fastcache_engines import DType

CACHINGS = ((3, 0), (5, 0), (5, 1))  # the table's columns: cache interval I and branch B
# DeepCache's speed-ups on an RTX A5000 by size and batch, for each of CACHINGS; of whole pipelines, 50 steps, SD2.1.
# Source: diffusers' documentation, optimization/deepcache.
PUBLISHED = {
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


def table_task(
    model: str, size: int, batch: int, steps: int, repeats: int, backend: str, dtype: DType, device: str
) -> Task:
    """One row of the table: eager, and every caching by the DeepCache package and by engines."""
    arms = [(f"eager:{dtype}", 1, 0), *((f"deepcache:{dtype}", n, branch) for n, branch in CACHINGS)]
    if backend != "none":
        arms += [(f"engine:{backend}:{dtype}", 1, 0)]
        arms += [(f"engine+cache:{backend}:{dtype}", n, branch) for n, branch in CACHINGS]
    return Task("bench", model, size, batch, steps, repeats, dtype, device, tuple(arms), keeps=False)


def table_rows(task: Task, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A piece's arms as rows of the table.

    Beside what was measured stand the ceiling that the multiply-adds set to caching on one backend, and the speed-up
    that was published for DeepCache.
    """
    work: dict[int, MultiplyAdds] = {b: multiply_adds(task.model, b, task.size, task.size) for _, b in CACHINGS}
    published = dict(zip(CACHINGS, PUBLISHED.get((task.size, task.batch), ()), strict=False))
    arms = [arm for arm in found.get("arms", []) if "skipped" not in arm]
    uncached = {arm["backend"]: arm["loop_ms_p50"] for arm in arms if arm["cache_interval"] == 1}

    def row(arm: dict[str, Any]) -> dict[str, Any]:
        kind, loop_ms = arm["name"].split(" ")[0].split(":")[0], arm["loop_ms_p50"]
        interval, branch = arm["cache_interval"], arm["branch_id"]
        own = uncached.get(arm["backend"])
        return {
            "size": task.size,
            "batch": task.batch,
            "arm": f"{kind}:{arm['backend']}" if kind.startswith("engine") else kind,
            "cache_interval": interval,
            "branch_id": branch,
            "seconds": loop_ms / 1e3,
            "speedup_vs_eager": arm["speedup_vs_eager"],
            "speedup_vs_uncached": round(own / loop_ms, 3) if own else None,
            "ceiling_vs_uncached": round(work[branch].ceiling(task.steps, interval), 3),
            "published": published.get((interval, branch)),
        }

    return [row(arm) for arm in arms]
