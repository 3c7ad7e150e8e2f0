"""What an analysis measured -> matplotlib figures, one function each.

Lines differ in lightness as well as in hue; maps use viridis, which reads the same in grey. Knows arrays and labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
ALIKE_COLOUR = "#d62728"
_AGES = (1, 2, 3, 5, 10)


def _figure(rows: int, columns: int, width: float, height: float, **axes: Any) -> tuple[Figure, list[list[Axes]]]:
    """A grid of axes, each cell of this size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **axes).tolist()


def _panels(count: int, width: float, height: float, **axes: Any) -> tuple[Figure, list[Axes]]:
    """Up to three panels a row; the cells that are left over are blank."""
    columns = min(3, count)
    figure, grid = _figure(math.ceil(count / columns), columns, width, height, **axes)
    cells = [cell for row in grid for cell in row]
    for cell in cells[count:]:
        cell.set_axis_off()
    return figure, cells[:count]


def _legend_below(figure: Figure, axes: Axes, most: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(most, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _shades(count: int) -> list[Any]:
    """As many colours along viridis, without its palest end."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * k / max(1, count - 1)) for k in range(count)]


def _tidy(axes: Axes, x: str, y: str, title: str = "") -> None:
    """A plot over the steps, which are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel=x, ylabel=y, axisbelow=True)
    axes.set_title(title, fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.6)


def _map(axes: Axes, pairs: Array, x: str, y: str, title: str, **colours: Any) -> Any:
    """A heat map of pairs of steps. Shapes: `pairs` (T, T)."""
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10.5)
    return axes.imshow(pairs, cmap="viridis", origin="lower", interpolation="nearest", **colours)


def _lines(axes: Axes, means: Mapping[str, Array], stds: Mapping[str, Array] | None = None) -> None:
    """A line by name, with a band of one standard deviation to each side."""
    for (name, mean), colour in zip(means.items(), _shades(len(means)), strict=True):
        steps = np.arange(len(mean))
        axes.plot(steps, mean, color=colour, label=name, linewidth=1.5)
        if stds is not None:
            axes.fill_between(steps, mean - stds[name], mean + stds[name], color=colour, alpha=0.15, linewidth=0)


def _log_scale(axes: Axes) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")


def similarity_maps(similarity: Mapping[str, Array]) -> Figure:
    """A heat map of all pairs of steps by feature. Shapes: each (T, T)."""
    figure, cells = _panels(len(similarity), 3.6, 3.3)
    least = min(float(matrix.min()) for matrix in similarity.values())
    low = math.floor(10 * max(least, -1.0)) / 10
    image: Any = None
    for axes, (name, matrix) in zip(cells, similarity.items(), strict=True):
        image = _map(axes, matrix, "step", "step", name, vmin=low, vmax=1)
        if matrix.min() < 0.95 < matrix[~np.eye(len(matrix), dtype=bool)].max():
            beside = matrix.copy()  # the diagonal's ones would be ringed one by one
            np.fill_diagonal(beside, np.pad(np.diagonal(matrix, 1), (1, 0), mode="edge"))
            axes.contour(beside, levels=[0.95], colors=ALIKE_COLOUR, linewidths=1.2)
    figure.colorbar(image, ax=cells, shrink=0.85, label="cosine similarity (red line: 0.95)")
    return figure


def similarity_curves(adjacent: Mapping[str, Array], shares: Mapping[str, Array]) -> Figure:
    """Likeness to the step before, and the share of all steps that are alike, by feature. Shapes: each (T,)."""
    figure, [[left, right]] = _figure(1, 2, 5.4, 3.6)
    _lines(left, adjacent)
    for (_, curve), colour in zip(adjacent.items(), _shades(len(adjacent)), strict=True):
        dip = int(np.nanargmin(curve))
        left.plot(dip, curve[dip], marker="v", color=colour, markersize=7, markeredgecolor="white")
    left.axhline(0.95, color=ALIKE_COLOUR, linewidth=0.9, linestyle=(0, (4, 3)))
    _tidy(left, "step", "cosine similarity to the step before", "step to step (triangle: the dip; red: 0.95)")
    _lines(right, {name: 100 * share for name, share in shares.items()})
    right.set_ylim(0, 102)
    _tidy(right, "step", "other steps above 0.95, %", "steps that are alike")
    _legend_below(figure, left, 4)
    return figure


def change_curves(panels: Mapping[str, Mapping[str, tuple[Array, Array]]]) -> Figure:
    """Relative L1 change by block, a panel for each group of blocks. Shapes: mean and deviation (T,) each."""
    figure, cells = _panels(len(panels), 4.4, 3.9, sharex=True, sharey=True)
    for axes, (title, blocks) in zip(cells, panels.items(), strict=True):
        _lines(axes, {name: mean for name, (mean, _) in blocks.items()}, {n: std for n, (_, std) in blocks.items()})
        _log_scale(axes)
        axes.legend(fontsize=7.5, ncols=4, loc="upper center", columnspacing=1, framealpha=0.8, edgecolor="none")
        _tidy(axes, "step", "relative L1 change", title)
    return figure


def error_maps(errors: Mapping[int, Array]) -> Figure:
    """The relative error e(j, s) by branch, as a map and by the feature's age. Shapes: each (T, T), nan above."""
    from matplotlib.colors import LogNorm

    figure, grid = _figure(len(errors), 2, 5.4, 4.0)
    below = [matrix[np.tril_indices(len(matrix), -1)] for matrix in errors.values()]
    found = np.concatenate(below)
    found = found[found > 0]
    norm = LogNorm(float(found.min()), float(found.max())) if found.size else None
    for [left, right], (branch_id, matrix) in zip(grid, errors.items(), strict=True):
        shown = np.where(np.tri(len(matrix), k=-1) > 0, matrix, np.nan)
        names = "step s that stored the feature", "step j that reuses it", f"branch {branch_id}"
        figure.colorbar(_map(left, shown, *names, norm=norm), ax=left, label="relative error")
        ages = [age for age in _AGES if age < len(matrix)]
        curves = {}
        for age in ages:
            curve = np.full(len(matrix), np.nan)
            curve[age:] = np.diagonal(matrix, -age)
            curves[f"{age} step{'s' if age > 1 else ''} old"] = curve
        _lines(right, curves)
        _log_scale(right)
        right.legend(fontsize=8.5, loc="upper center", framealpha=0.8, edgecolor="none")
        _tidy(right, "step j", "relative error", f"branch {branch_id}, by the feature's age")
    return figure


def gain_curve(mean: Array, std: Array) -> Figure:
    """The closed-loop gain by step. Shapes: (T,) each; the first step has none."""
    figure, [[axes]] = _figure(1, 1, 7.0, 3.4)
    steps = np.arange(1, len(mean))
    axes.plot(steps, mean[1:], color="#123f66", linewidth=1.6)
    axes.fill_between(steps, (mean - std)[1:], (mean + std)[1:], color="#4f86b5", alpha=0.25, linewidth=0)
    axes.set_ylim(bottom=0)
    _tidy(axes, "step that the error is put into", "final displacement per unit of error")
    return figure


def switch_curves(switches: Mapping[int, Mapping[str, Array]]) -> Figure:
    """How far each feature has followed the switched prompt, a panel for each switch. Shapes: each (T,)."""
    figure, cells = _panels(len(switches), 4.6, 3.5, sharey=True)
    for axes, (step, curves) in zip(cells, switches.items(), strict=True):
        _lines(axes, {name: curve for name, curve in curves.items() if name != "latents"})
        if "latents" in curves:
            axes.plot(curves["latents"], color="#d62728", linewidth=1.5, linestyle=(0, (4, 2)), label="latents")
        axes.axvline(step, color="#888888", linewidth=1)
        axes.set_ylim(-0.1, 1.25)
        _tidy(axes, "step", "followed (0: as A, 1: as B)", f"prompt switched at step {step}")
    _legend_below(figure, cells[0], 6)
    return figure


def probe_curves(
    steps: Sequence[int], accuracy: Mapping[str, Mapping[str, Array]], chance: Mapping[str, float]
) -> Figure:
    """Held-out accuracy by step and depth, a panel for each attribute. Shapes: each (S,)."""
    figure, cells = _panels(len(accuracy), 4.2, 3.2, sharex=True, sharey=True)
    for axes, (attribute, features) in zip(cells, accuracy.items(), strict=True):
        names = [name for name in features if name != "latents"]
        for name, colour in zip(names, _shades(len(names)), strict=True):
            axes.plot(steps, 100 * features[name], color=colour, linewidth=1.6, label=name)
        axes.plot(steps, 100 * features["latents"], color="#d62728", linestyle=(0, (4, 2)), label="latents")
        axes.axhline(100 * chance[attribute], color="#888888", linewidth=1, linestyle=":", label="commonest value")
        axes.set_ylim(0, 103)
        _tidy(axes, "step", "held-out accuracy, %", attribute)
    _legend_below(figure, cells[0], 7)
    return figure


def picture_rows(rows: Mapping[str, Array]) -> Figure:
    """A row of pictures by name. Shapes: each (N, H, W, 3) in [0, 1]."""
    count = max(len(pictures) for pictures in rows.values())
    figure, grid = _figure(len(rows), count, 1.15, 1.25)
    for cells, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes in cells:
            axes.set_axis_off()
        for axes, picture in zip(cells, pictures, strict=False):
            axes.imshow(picture, interpolation="nearest")
        cells[0].set_title(name, fontsize=9, loc="left")
    return figure
