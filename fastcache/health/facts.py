"""A bundle's engine files -> what each says of itself. Knows files only: nothing is loaded, PyTorch neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import fastcache_engines
from fastcache.bundle.bundle import plain_file
from fastcache.bundle.manifest import Manifest, Role
from fastcache.errors import BackendUnavailable
from fastcache_engines import onnx_files


def engine_facts(folder: Path, manifest: Manifest) -> dict[Role, dict[str, Any]]:
    """For each engine, what can be told of the file without loading it, or why nothing can.

    An ONNX graph tells the same whatever backend runs it; other files are their backend's to read.
    """
    facts: dict[Role, dict[str, Any]] = {}
    entries = {entry.name: entry for entry in manifest.files}
    for role, engine in manifest.engines.items():
        try:
            graph = engine.file.endswith(".onnx")
            describe = onnx_files.describe if graph else fastcache_engines.backend(manifest.backend).describe
            facts[role] = dataclasses.asdict(describe(plain_file(folder, entries[engine.file])))
        except (BackendUnavailable, ValueError, OSError) as error:
            facts[role] = {"unknown": str(error)}
    return facts
