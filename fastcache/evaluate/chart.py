"""The rows of an evaluation -> a chart of quality over speed, with the plans that no other beats drawn as a frontier.

matplotlib is imported where it draws.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcache.errors import BackendUnavailable
from fastcache.evaluate.evaluate import Score
from fastcache.evaluate.quality import MOST_DB
from fastcache_engines.extras import install

# what each panel shows, whether more is better, and the most that there can be; the least is 0
PANELS = {
    "psnr_db": ("PSNR to the uncached picture, dB", True, MOST_DB),
    "scene_right": ("pictures with all that was asked for", True, 1.0),
    "clip_score": ("CLIP score", True, 100.0),
    "frechet_distance": ("Fréchet distance to true pictures", False, math.inf),
}


def require_matplotlib() -> None:
    """Ask before long work whether its charts can be drawn. Raises: `BackendUnavailable` without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendUnavailable(f"matplotlib is not installed; run: {install('bench')}")


def frontier(points: Sequence[tuple[float, float]], *, higher: bool = True) -> list[int]:
    """The points (speed, quality) that no other point beats in both, by rising speed."""
    best: list[int] = []
    sign = 1 if higher else -1
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -sign * points[i][1])):
        if not best or sign * points[index][1] > sign * points[best[-1]][1]:
            best.append(index)
    return best[::-1]


def draw_frontier(rows: Sequence[Score], title: str, path: Path) -> None:
    """Draw a panel for each quality that was measured, the uncached row left out of the likeness to itself."""
    from matplotlib.figure import Figure

    shown = [name for name in PANELS if name in rows[-1].metrics]
    figure = Figure(figsize=(6.4 * len(shown), 5.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _panel(axes, [row for row in rows if name != "psnr_db" or row is not rows[0]], name)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def _panel(axes: Any, rows: Sequence[Score], name: str) -> None:
    label, higher, most = PANELS[name]
    estimates = [row.metrics[name] for row in rows]
    points = [(row.speedup.value, estimate.value) for row, estimate in zip(rows, estimates, strict=True)]
    edge = frontier(points, higher=higher)
    axes.plot(*zip(*(points[i] for i in edge), strict=True), color="tab:green", linewidth=1.2, zorder=1)
    for i, (row, (x, y), estimate) in enumerate(zip(rows, points, estimates, strict=True)):
        colour = "tab:green" if i in edge else "tab:gray"
        bars = [[max(0.0, y - estimate.low)], [max(0.0, estimate.high - y)]]  # 0 but for rounding
        axes.errorbar([x], [y], yerr=bars, fmt="o", color=colour, markersize=5, capsize=2, linewidth=0.8, zorder=2)
        axes.annotate(row.candidate.name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8, color=colour)
    axes.set_xlabel("times as fast as the uncached loop")
    axes.set_ylabel(label)
    axes.margins(x=0.12)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(most, high))
    axes.grid(alpha=0.25)
    axes.set_title("green: no other plan is faster and better", fontsize=8)
