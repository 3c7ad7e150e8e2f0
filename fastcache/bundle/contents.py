"""A manifest's values -> whether a bundle can be what they say, before anything of them is followed or allocated.

The manifest's hash says that it was not damaged, not that an honest build wrote it. Knows values only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from fastcache.bundle.manifest import Manifest
from fastcache.bundle.patterns import chain_pass
from fastcache.cut.chain import RUNS, kept, kept_name
from fastcache_engines import TensorSpec

_DTYPES = frozenset({"float32", "float16", "bfloat16", "int64", "int32", "bool"})
_FREE = re.compile(r"([a-z]+)(/[1-9]\d{0,3})?")  # `batch`, `height/8`
_LONGEST_AXIS = 2**20


def check_contents(manifest: Manifest) -> None:
    """Raises: `ValueError` in one line for the first value that no bundle can have."""
    for problem in _problems(manifest):
        raise ValueError(problem)


def _problems(manifest: Manifest) -> Iterator[str]:
    names = [entry.name for entry in manifest.files]
    yield from (f"expected files inside the bundle, got {name!r}" for name in names if not _is_inside(name))
    if len(set(names)) < len(names):
        yield "expected each file once, got one twice"
    yield from _wrong_passes(manifest)
    yield from _wrong_blocks(manifest)
    yield from _wrong_sizes(manifest)
    for role, engine in manifest.engines.items():
        if engine.file not in names:
            yield f"expected the {role} engine's file among the bundle's, got {engine.file!r}"
        yield from _wrong_tensors(role, (*engine.inputs, *engine.outputs), manifest.profiles)


def _is_inside(name: str) -> bool:
    """Whether a name is a plain path below a folder, on every system."""
    path = PurePosixPath(name)
    plain = bool(path.parts) and path.as_posix() == name and not path.is_absolute() and ".." not in path.parts
    return plain and not any(character in name for character in "\\:\0")


def _wrong_passes(manifest: Manifest) -> Iterator[str]:
    branches = manifest.branches
    if not branches or branches[0] != manifest.branch_id or len(set(branches)) < len(branches):
        yield f"expected branches, each once and {manifest.branch_id} first, got {list(branches)}"
    if not all(0 <= branch < manifest.num_branches for branch in branches):
        yield f"expected branches from 0 to {manifest.num_branches - 1}, got {list(branches)}"
    if "unet" not in manifest.components:
        yield f"expected components with unet, got {list(manifest.components)}"
    yield from _wrong_engines_of_passes(manifest)
    parity = manifest.parity
    if not (parity.tolerance > 0 and parity.full_vs_model >= 0 and parity.shallow_vs_full >= 0):
        yield f"expected errors of 0 or more and a tolerance above 0, got {parity}"


def _wrong_engines_of_passes(manifest: Manifest) -> Iterator[str]:
    passes = manifest.named_passes
    missing = [name for name in ("full", *(f"shallow-{b}" for b in manifest.branches)) if name not in passes]
    if missing:
        yield f"expected a pass {missing[0]}, got {', '.join(passes) or 'none'}"
    features = set(passes["full"].stores)
    for name, one in passes.items():
        lacking = [role for role in one.engines if role not in manifest.engines]
        if lacking or not one.engines:
            yield f"expected an engine for the pass {name}, got no {', '.join(lacking) or 'engine'}"
        unknown = {*one.takes, *one.stores} - features
        if unknown or (name == "full" and one.takes):
            yield f"expected the pass {name} to take and store what full stores, got {', '.join(unknown or one.takes)}"


def _wrong_blocks(manifest: Manifest) -> Iterator[str]:
    """What the full pass runs gives the residual of each block: a chain, or an engine with a condition for each."""
    full, chain, blocks = manifest.named_passes["full"], manifest.chain, manifest.blocks
    known = [role for role in chain or full.engines if role in manifest.engines]
    if chain and (len(known) < len(chain) or chain_pass(manifest.engines, known, ()) != full.engines):
        yield "expected a chain of the engines that the full pass runs, got another"
    given = {spec.name: spec for role in known for spec in manifest.engines[role].outputs}
    residuals = [given[block.residual] for block in blocks if block.residual in given]
    fit = [one.shape[1:2] for one in residuals] == [(block.channels,) for block in blocks]
    if len({one.name for one in residuals}) < len(blocks) or not fit:
        yield f"expected a full pass that gives the residuals of its {len(blocks)} blocks, got one without"
    conditional = len(blocks) if not chain else 0
    if full.runs != (True,) * conditional or any(one.runs for one in manifest.named_passes.values() if one is not full):
        yield f"expected a full pass with a condition for each of {conditional} blocks, and no other, got another"
    kept_residuals = {replace(one, name=kept(one.name)) for one in residuals if conditional}
    for role, engine in manifest.engines.items():
        wanted = kept_residuals if role in full.engines else set[TensorSpec]()
        taken = {spec for spec in engine.inputs if kept_name(spec.name) is not None}
        runs = [spec.shape[1:] for spec in engine.inputs if spec.name == RUNS]
        if taken != wanted or runs != [(conditional,)] * bool(wanted):
            yield f"expected conditions for {len(wanted)} blocks in the {role} engine, got others"


def _wrong_sizes(manifest: Manifest) -> Iterator[str]:
    model, sizes, profiles = manifest.model, manifest.sizes, manifest.profiles
    counts = {name: getattr(model, name) for name in ("in_channels", "latent_channels", "vae_scale_factor")}
    yield from (f"expected {n} of 1 to 4096, got {value}" for n, value in counts.items() if not 1 <= value <= 4096)
    if model.tokens is not None and not 0 <= model.tokens <= _LONGEST_AXIS:
        yield f"expected 0 tokens or more, got {model.tokens}"
    if not sizes or (sizes[0].width, sizes[0].height) != (manifest.width, manifest.height):
        listed = ", ".join(map(str, sizes)) or "none"
        yield f"expected sizes with {manifest.width}x{manifest.height} first, got {listed}"
    lacking = {"batch", "height", "width"} - profiles.keys()
    if lacking:
        yield f"expected profiles of batch, height and width, got none of {', '.join(sorted(lacking))}"
    tile = manifest.vae_tile
    fits = tile is None or (tile >= 1 and all(tile <= min(size.height, size.width) for size in sizes))
    if not fits or (tile or 0) % model.vae_scale_factor:
        yield f"expected a vae_tile that every size holds, got {tile}"
    for size in sizes:
        for name, pixels in (("height", size.height), ("width", size.width)):
            if not profiles[name].min <= pixels <= profiles[name].max or pixels % model.vae_scale_factor:
                yield f"expected a {name} of {profiles[name]} in steps of {model.vae_scale_factor}, got {pixels}"


def _wrong_tensors(role: str, specs: Collection[TensorSpec], profiles: Collection[str]) -> Iterator[str]:
    for spec in specs:
        if spec.dtype not in _DTYPES:
            yield f"expected a dtype of {spec.name} in {role} out of {', '.join(sorted(_DTYPES))}, got {spec.dtype!r}"
        for size in spec.shape:
            free = _FREE.fullmatch(size) if isinstance(size, str) else None
            known = free is not None and free[1] in profiles if isinstance(size, str) else 1 <= size <= _LONGEST_AXIS
            if not known:
                yield f"expected sizes of {spec.name} in {role} that the profiles have, got {size!r}"
