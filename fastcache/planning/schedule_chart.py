"""A plan of patterns and how blocks change -> a picture: blocks down, steps across, dark where a block runs.

matplotlib is imported where it draws.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastcache.bundle.manifest import BlockEntry
from fastcache.cut.names import pattern_of
from fastcache.files import write_whole
from fastcache.loop.plan import CachePlan
from fastcache.planning.calibration import Array


def draw_schedule(plan: CachePlan, blocks: Sequence[BlockEntry], changes: Array, path: Path) -> None:
    """Draw the schedule beside the changes that it follows. Shapes: `changes` (blocks, steps).

    Source: Block Caching, arXiv 2312.03209, figures 2 and 4.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    runs = np.array([pattern_of(name, len(blocks)) or (False,) * len(blocks) for name in plan.passes]).T
    figure = Figure(figsize=(11.5, 1.6 + 0.24 * len(blocks)), layout="constrained")
    schedule, curves = figure.subplots(1, 2)
    schedule.imshow(runs, cmap="Blues", vmin=0, vmax=1.25, aspect="auto", interpolation="none")
    schedule.set_title("dark: the block runs; light: its residual is reused", fontsize=9)
    image = curves.imshow(changes, cmap="magma", aspect="auto", interpolation="none", vmin=0)
    figure.colorbar(image, ax=curves, label="change since the step before, relative (L1)")
    curves.set_title("how much each block's residual changes", fontsize=9)
    for axes in (schedule, curves):
        axes.set_xlabel("U-Net call")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(len(blocks)), [block.place.removesuffix(".attention") for block in blocks], fontsize=7)
    figure.suptitle(f"{plan.made_by}, {plan.sampler}", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, picture.getvalue())
