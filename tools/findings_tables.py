"""What `findings.py draw` wrote -> tables and charts of docs/findings.md. Knows names of arms and their numbers only.

An arm is called by its kind and the number of refreshes of the plans that it is compared with: "optimal-10".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcache.evaluate.quality import mean_of

Rows = dict[str, Any]


def table(rows: Rows, baselines: Rows, baseline: str) -> str:
    """Markdown; each PSNR with its interval, and its gain over the baseline of as many refreshes, in pairs."""
    lines = [f"| arm | PSNR, dB | over {baseline}, dB | right | Fréchet |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        psnr = "-" if name == "uncached" else interval(row["means"]["psnr_db"])
        gain = gain_over(rows, name, baselines, baseline)
        right = f"{row['means']['scene_right']['value']:.1%}"
        said = interval(gain, sign=True) if gain else "-"
        lines.append(f"| {name} | {psnr} | {said} | {right} | {interval(row['frechet_distance'])} |")
    return "\n".join(lines)


def gains(rows: Rows, baselines: Rows, baseline: str) -> str:
    """Markdown; gains over the baseline in pairs, a line for each kind and a column for each number of refreshes."""
    kinds = dict.fromkeys(name.rpartition("-")[0] for name in rows if name != "uncached")
    counts = dict.fromkeys(name.rpartition("-")[2] for name in rows if name != "uncached")
    lines = [f"| over {baseline}, dB | {' | '.join(counts)} |", "|---" * (1 + len(counts)) + "|"]
    for kind in kinds:
        names = [f"{kind}-{count}" for count in counts]
        found = [gain_over(rows, name, baselines, baseline) if name in rows else {} for name in names]
        lines.append(f"| {kind} | {' | '.join(interval(gain, sign=True) if gain else '' for gain in found)} |")
    return "\n".join(lines)


def equal_time(cached: Rows, steps: Rows, pairs: Sequence[tuple[int, int]]) -> str:
    """Caching against fewer steps of at least the same time, on the pictures that both drew.

    `pairs` are numbers of refreshes and of steps.
    """
    lines = ["| caching | fewer steps | caching over fewer steps, dB |", "|---|---|---|"]
    for count, rival in pairs:
        for name in (name for name in cached if name.rpartition("-")[2] == str(count)):
            gain = interval(paired(cached[name], steps[f"steps-{rival}"]), sign=True)
            lines.append(f"| {name} | {rival} steps | {gain} |")
    return "\n".join(lines)


def gain_over(rows: Rows, name: str, baselines: Rows, baseline: str) -> dict[str, float]:
    """The mean gain over the baseline of as many refreshes; nothing where there is none."""
    rival = f"{baseline}-{name.rpartition('-')[2]}"
    return {} if rival == name or rival not in baselines else paired(rows[name], baselines[rival])


def paired(row: dict[str, Any], rival: dict[str, Any]) -> dict[str, float]:
    """The mean difference picture by picture, on those that both drew: all begin with the same prompts and seeds."""
    count = min(len(row["psnr_db"]), len(rival["psnr_db"]))
    return vars(mean_of(np.array(row["psnr_db"][:count]) - np.array(rival["psnr_db"][:count])))


def interval(estimate: dict[str, float], *, sign: bool = False) -> str:
    form = "+.2f" if sign else ".2f"
    return f"{estimate['value']:{form}} ({estimate['low']:{form}} to {estimate['high']:{form}})"


def draw_chart(rows: Rows, baselines: Rows, baseline: str, title: str, path: Path, xlabel: str) -> None:
    """PSNR, and the gain over the baseline where there is one, over the number in an arm's name, by kind of arm."""
    from matplotlib.figure import Figure

    names = [name for name in rows if name != "uncached"]
    psnr = {name: rows[name]["means"]["psnr_db"] for name in names}
    gain = {name: found for name in names if (found := gain_over(rows, name, baselines, baseline))}
    panels = [("PSNR to the uncached picture, dB", psnr)] + [(f"PSNR over {baseline}, dB", gain)] * bool(gain)
    figure = Figure(figsize=(6 * len(panels), 4.4), layout="constrained")
    kinds = list(dict.fromkeys(name.rpartition("-")[0] for name in names))
    ticks = list[int]()
    for number in sorted({int(name.rpartition("-")[2]) for name in names}):
        ticks += [number] if not ticks or number > 1.1 * ticks[-1] else []  # labels that do not overlap
    for axes, (label, estimates) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for k, kind in enumerate(kinds):
            own = {name: e for name, e in estimates.items() if name.rpartition("-")[0] == kind}
            aside = 1 + 0.004 * (k - len(kinds) / 2)
            if own:
                _draw_line(axes, [aside * int(name.rpartition("-")[2]) for name in own], [*own.values()], kind, f"C{k}")
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def draw_times(rows: Rows, batch: int, title: str, path: Path) -> None:
    """PSNR over the time of the loop, in milliseconds a picture of a batch, by kind of arm.

    An arm is called by its dtype, its kind and the number of full steps: "int8 fitted-10".
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    dtypes = list(dict.fromkeys(name.partition(" ")[0] for name in rows))
    for kind in dict.fromkeys(name.rpartition("-")[0] for name in rows if "-" in name):
        own = [row for name, row in rows.items() if name.rpartition("-")[0] == kind]
        colour, form = f"C{dtypes.index(kind.partition(' ')[0])}", "-o" if kind.endswith("fitted") else "--s"
        times = [row["loop_ms"] / batch for row in own]
        _draw_line(axes, times, [row["means"]["psnr_db"] for row in own], kind, colour, form)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("time of the loop, ms a picture")
    axes.set_ylabel("PSNR to the 50 steps in fp32, dB")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _draw_line(
    axes: Any, x: Sequence[float], estimates: Sequence[dict[str, float]], label: str, colour: str, form: str = "-o"
) -> None:
    """Estimates with their intervals, joined."""
    middle, low, high = (np.array([one[side] for one in estimates]) for side in ("value", "low", "high"))
    bars = [middle - low, high - middle]
    axes.errorbar(x, middle, yerr=bars, fmt=form, ms=4, capsize=2, lw=1.2, label=label, color=colour)
