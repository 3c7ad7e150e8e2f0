"""What a U-Net costs at each branch id, for `inspect`: recorded in a bundle, or counted for a model or a preset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastcache.console import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastcache.bundle.manifest import WorkEntry


def show_model_branches(name: str, height: int | None, width: int | None, as_json: bool) -> None:
    """Count and print the multiply-adds of a model or a preset at each branch id; nothing of it is loaded."""
    from fastcache.bench.work import geometry, unet_work
    from fastcache.bundle.manifest import WorkEntry
    from fastcache.compile.models import find_model
    from fastcache.compile.presets import PRESETS

    model = find_model(name, random_weights=name in PRESETS)
    own = geometry(model)
    size = height or own.height, width or own.width
    work = unet_work(model, *size)
    passes = [(None, work.full), *enumerate(work.shallow)]
    entries = [WorkEntry(branch_id=b, layers=one.layers, attention=one.attention) for b, one in passes]
    if as_json:
        print_json({"model": name, "height": size[0], "width": size[1], "work": branch_rows(entries)})
    else:
        show_branches(f"{name} at {size[1]}x{size[0]}", entries)


def show_branches(title: str, work: Sequence[WorkEntry]) -> None:
    """Print a table of the multiply-adds of one U-Net call for one image, at each branch id."""
    rows = [
        [
            "full" if row["branch_id"] is None else f"shallow {row['branch_id']}",
            f"{row['multiply_adds'] / 1e9:.2f}",
            f"{100 * row['share']:.1f}",
            f"{row['multiply_adds_without_attention'] / 1e9:.2f}",
        ]
        for row in branch_rows(work)
    ]
    columns = ["pass", "G", "% of full", "G without attention's products"]
    print_table(f"Multiply-adds of one U-Net call for one image, {title}", columns, rows)


def branch_rows(work: Sequence[WorkEntry]) -> list[dict[str, Any]]:
    """The passes as JSON says them; `share` is of the full pass.

    Raises: `ValueError` for a bundle that was built before they were recorded.
    """
    if not work:
        raise ValueError("expected a bundle that records its multiply-adds, got an older one; build it again")
    full = work[0].layers + work[0].attention
    return [
        {
            "branch_id": entry.branch_id,
            "multiply_adds": entry.layers + entry.attention,
            "multiply_adds_without_attention": entry.layers,
            "share": (entry.layers + entry.attention) / full,
        }
        for entry in work
    ]
