"""What a U-Net costs at each branch id, for `inspect`: recorded in a bundle, or counted for a model or a preset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastcache.console import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastcache.bundle.manifest import WorkEntry


def count_work(name: str, height: int | None, width: int | None) -> tuple[int, int, list[WorkEntry]]:
    """A model's or a preset's own size where none is asked for, and its passes; nothing of it is loaded."""
    from fastcache.bench.work import geometry, unet_work
    from fastcache.bundle.manifest import WorkEntry
    from fastcache.compile.models import find_model
    from fastcache.compile.presets import PRESETS

    model = find_model(name, random_weights=name in PRESETS)
    height, width = geometry(model).size(height, width)
    work = unet_work(model, height, width)
    passes = [(None, work.full), *enumerate(work.shallow)]
    return height, width, [WorkEntry(branch_id=b, layers=one.layers, attention=one.attention) for b, one in passes]


def show_branches(name: str, height: int, width: int, work: Sequence[WorkEntry], *, as_json: bool = False) -> None:
    """Print the multiply-adds of one U-Net call for one image, at each branch id.

    Raises: `ValueError` for a bundle that was built before they were recorded.
    """
    if not work:
        raise ValueError("expected a bundle that records its multiply-adds, got an older one; build it again")
    full = work[0].layers + work[0].attention
    rows: list[dict[str, Any]] = [
        {
            "branch_id": entry.branch_id,
            "multiply_adds": entry.layers + entry.attention,
            "multiply_adds_without_attention": entry.layers,
            "share": (entry.layers + entry.attention) / full,
        }
        for entry in work
    ]
    if as_json:
        print_json({"model": name, "height": height, "width": width, "work": rows})
        return
    print_table(
        f"Multiply-adds of one U-Net call for one image, {name} at {width}x{height}",
        ["pass", "G", "% of full", "G without attention's products"],
        [
            [
                "full" if row["branch_id"] is None else f"shallow {row['branch_id']}",
                f"{row['multiply_adds'] / 1e9:.2f}",
                f"{100 * row['share']:.1f}",
                f"{row['multiply_adds_without_attention'] / 1e9:.2f}",
            ]
            for row in rows
        ],
    )
