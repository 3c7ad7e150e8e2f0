"""`models`: what can be built by name, what was built, how much room it takes, and what of it may go."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fastcache.commands.options import Json
from fastcache.console import next_step, print_json, print_table

_DAY_S = 24 * 3600
app = typer.Typer(help="List presets and bundles, their sizes and when they were last used; remove old ones.")


@dataclass(frozen=True)
class Kept:
    """A bundle, or another folder of fastcache's own cache."""

    path: str
    kind: str  # bundle, or what the cache's folder is for
    model: str
    backend: str
    dtype: str
    bytes: int
    days_unused: int


@app.callback(invoke_without_command=True)
def models(
    ctx: typer.Context,
    folder: Annotated[
        list[Path] | None, typer.Option(help="Also the bundles in this folder, and below; repeatable.")
    ] = None,
    json_: Json = False,
) -> None:
    """List presets, and the bundles in the cache folder and in folders that are named.

    Last use is when a file was last read, which most systems note once a day.

    Example: fastcache models --folder engines
    """
    if ctx.invoked_subcommand is not None:
        return
    from fastcache.compile.presets import PRESETS

    found = [*_cached(), *(one for place in folder or () for one in _bundles(_there(place)))]
    if json_:
        print_json({"presets": list(PRESETS), "cache": str(_cache()), "kept": [asdict(one) for one in found]})
        return
    typer.echo(f"the bundled model: demo\npresets, with --random-weights: {', '.join(PRESETS)}")
    if not found:
        typer.echo(f"nothing in {_cache()}")
        return
    _show(found, f"In {_cache()}" + "".join(f", {place}" for place in folder or ()))
    next_step("fastcache models prune --dry-run, which lists what nobody used for 30 days")


@app.command()
def prune(
    older_than: Annotated[float, typer.Option(min=0, help="Days since the last use.")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    json_: Json = False,
) -> None:
    """Remove what was not used lately from fastcache's own cache folder, and only there; it is made again when needed.

    Example: fastcache models prune --older-than 7 --dry-run
    """
    old = [one for one in _cached() if one.days_unused >= older_than]
    if not dry_run:
        for one in old:
            _remove(Path(one.path))
    if json_:
        print_json({"removed": [] if dry_run else [one.path for one in old], "found": [asdict(one) for one in old]})
        return
    if old:
        _show(old, "Would be removed" if dry_run else "Removed")
    typer.echo(f"{sum(one.bytes for one in old) / 1e6:,.0f} MB {'could be' if dry_run else 'were'} freed")


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("fastcache"))


def _there(folder: Path) -> Path:
    """Raises: `ValueError` for a folder that is not there."""
    if not folder.is_dir():
        raise ValueError(f"expected --folder to be a folder, got {folder}, which is none; name another")
    return folder


def _cached() -> list[Kept]:
    """What the cache folder holds: bundles that `bench` built, and each other folder as a whole."""
    if not _cache().is_dir():
        return []
    own = _cache() / "engines"
    others = [place for place in sorted(_cache().iterdir()) if place.is_dir() and place != own]
    return _bundles(own) + [_kept(place, place.name) for place in others]


def _bundles(folder: Path) -> list[Kept]:
    """The bundles in a folder, and below; what is damaged is listed as such."""
    from fastcache.bundle.bundle import MANIFEST

    return [_bundle(file.parent) for file in sorted(folder.rglob(MANIFEST)) if not file.is_symlink()]


def _bundle(folder: Path) -> Kept:
    from fastcache.bundle.bundle import read_manifest
    from fastcache.errors import BundleError

    try:
        manifest = read_manifest(folder)
    except BundleError:  # also one of an older version
        return _kept(folder, "bundle", "older or damaged")
    return _kept(folder, "bundle", manifest.model.name, manifest.backend, manifest.dtype)


def _kept(folder: Path, kind: str, model: str = "-", backend: str = "-", dtype: str = "-") -> Kept:
    from fastcache.bundle.bundle import MANIFEST

    # The manifest is read for listing it.
    stats = [file.stat() for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    used = max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=folder.stat().st_mtime)
    days = max(0, int((time.time() - used) // _DAY_S))
    return Kept(str(folder), kind, model, backend, dtype, sum(stat.st_size for stat in stats), days)


def _remove(folder: Path) -> None:
    """First out of the way, so that nobody opens half of it."""
    aside = folder.with_name(f".{folder.name}.removed")
    folder.rename(aside)
    shutil.rmtree(aside)


def _show(found: list[Kept], title: str) -> None:
    def age(days: int) -> str:
        return "today" if days == 0 else f"{days} days ago"

    rows: list[list[Any]] = [
        [one.path, one.kind, one.model, one.backend, one.dtype, f"{one.bytes / 1e6:,.0f}", age(one.days_unused)]
        for one in sorted(found, key=lambda one: -one.bytes)
    ]
    rows.append(["all", "", "", "", "", f"{sum(one.bytes for one in found) / 1e6:,.0f}", ""])
    print_table(title, ["folder", "what", "model", "backend", "dtype", "MB", "last used"], rows)
