"""A benchmark's JSON document -> a chart of its arms' speed-ups, as a PNG.

Bars differ in lightness as well as in hue, so that the chart reads the same in grey.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcache.evaluate.chart import require_matplotlib

# Torch arms in greys, engines in blues, the darker with caching: lightness 89, 70, 54 and 25 of 100.
_PYTORCH, _DEEPCACHE, _FULL, _CACHED = "#e0e0e0", "#ababab", "#4f86b5", "#123f66"
_COLOURS = {
    "eager": _PYTORCH,
    "compile": _PYTORCH,
    "deepcache": _DEEPCACHE,
    "engine": _FULL,
    "engine+cache": _CACHED,
    "engine+graph": _FULL,
    "engine+cache+graph": _CACHED,
}
_WARNING = "#b00020"
_LEGEND = {
    _PYTORCH: "PyTorch",
    _DEEPCACHE: "PyTorch with the DeepCache package",
    _FULL: "engine, every step in full",
    _CACHED: "engines, full and shallow",
}


def check_chartable(arms: str | None) -> None:
    """Ask before a long benchmark whether its arms, named with commas between, can be charted.

    Raises: `BackendUnavailable` without matplotlib; `ValueError` without an eager arm.
    """
    require_matplotlib()
    if arms is not None and not any(name.strip().split(":")[0] == "eager" for name in arms.split(",")):
        raise ValueError(f"expected an eager arm for a chart, which shows speed-ups over it, got {arms}")


def draw_chart(document: Mapping[str, Any], file: Path) -> None:
    """Draw the arms that ran, the slowest first, one bar each with its step times beside it.

    Raises: `ValueError` where no arm has a speed-up.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    arms = sorted((a for a in document["arms"] if a.get("speedup_vs_eager")), key=lambda a: a["speedup_vs_eager"])
    if not arms:
        raise ValueError("expected arms with a speed-up over eager to chart, got none; run the eager arm as well")
    reference = document["settings"]["references"]["eager"]
    figure = Figure(figsize=(10, 1.9 + 0.36 * len(arms)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    speedups = [arm["speedup_vs_eager"] for arm in arms]
    colours = [_COLOURS[arm["name"].split(" ")[0].split(":")[0]] for arm in arms]
    axes.barh(range(len(arms)), speedups, color=colours, edgecolor="#333333", linewidth=0.6, height=0.72)
    for i, arm in enumerate(arms):
        axes.annotate(_label(arm), (speedups[i], i), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(arms)), [_name(arm) for arm in arms])
    axes.invert_yaxis()
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, max(speedups) * 1.28)  # room for the longest label
    axes.set_xlabel(f"speed-up of the denoising loop over {reference}, median (times: full / shallow step, ms)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(_title(document)), fontsize=10, x=0.01, ha="left")
    if document["doubts"]:
        told = textwrap.fill(f"Not to be relied on: {'; '.join(document['doubts'])}.", 110)
        axes.set_title(told, fontsize=9, color=_WARNING, loc="left")
    present = [colour for colour in _LEGEND if colour in colours]
    handles = [Patch(facecolor=colour, edgecolor="#333333", label=_LEGEND[colour]) for colour in present]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8.5, frameon=False)
    figure.savefig(file, format="png")


def _name(arm: Mapping[str, Any]) -> str:
    """The arm's name, what it leaves out, and whether its rounds differ."""
    own = [part for part in (arm["backend"], arm["dtype"]) if part not in ("torch", *arm["name"].split(":"))]
    named = f"{arm['name']} ({', '.join(own)})" if own else arm["name"]
    return f"{named} (?)" if arm["unsteady"] else named


def _label(arm: Mapping[str, Any]) -> str:
    times = [ms for ms in (arm["full_step_ms_p50"], arm["shallow_step_ms_p50"]) if ms is not None]
    told = f"   {' / '.join(map(_milliseconds, times))} ms" if times else ""
    return f"{arm['speedup_vs_eager']:.2f}x{told}"


def _milliseconds(ms: float) -> str:
    """Three digits, however long a step takes."""
    return f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2}f}"


def _title(document: Mapping[str, Any]) -> Sequence[str]:
    """The conditions that the figures hold under."""
    settings, environment = document["settings"], document["environment"]
    weights = " (random weights)" if settings["random_weights"] else ""
    gpus = environment.get("gpus", {}).get("before", [])
    where = ", ".join(gpu["name"] for gpu in gpus) or f"{environment['processor']}, {environment['threads']} threads"
    versions = [f"{name} {environment['versions'][name]}" for name in ("torch", "diffusers", "fastcache")]
    images = "1 image" if settings["batch"] == 1 else f"{settings['batch']} images"
    guidance = "without guidance" if settings.get("guided_rows") == 1 else "under guidance"
    plan = f"N={settings['cache_interval']}, branch {settings['branch_id']}"
    return (
        f"{settings['model']}{weights}, {settings['width']}x{settings['height']}, {images} {guidance}, "
        f"{settings['steps']} {settings['sampler']} steps, {plan}",
        f"{where}; {', '.join(versions)}; {environment['date']}; median of {settings['repeats']}",
    )
