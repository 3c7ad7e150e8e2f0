"""A bundle's folder -> whether it is what was built, and computes what the model does, as far as can be told here.

Knows files, engines and their errors; knows nothing about steps or pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastcache_engines
from fastcache.bundle.bundle import FileCheck, check_files, read_manifest
from fastcache.bundle.manifest import Manifest, Parity
from fastcache.health.facts import engine_facts
from fastcache.loop.runtime import check_here, check_version, measure_here


@dataclass(frozen=True)
class Verification:
    """What was found: every file, the parity measured now or why there is none, and the engine files' own faults."""

    manifest: Manifest
    files: tuple[FileCheck, ...]
    parity: Parity | None
    not_run: str | None

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each; empty for a bundle in which nothing was found."""
        wrong = [f"{check.name} {check.problem}" for check in self.files if check.problem is not None]
        parity = self.parity
        if parity is not None and not (worst := max(parity.full_vs_model, parity.shallow_vs_full)) <= parity.tolerance:
            wrong.append(f"expected errors up to {parity.tolerance:g}, got {worst:.1e}")
        return wrong

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "files": [{"name": c.name, "ok": c.problem is None, "problem": c.problem} for c in self.files],
            "full_vs_model": self.parity.full_vs_model if self.parity else None,
            "shallow_vs_full": self.parity.shallow_vs_full if self.parity else None,
            "tolerance": self.manifest.parity.tolerance,
            "not_run": self.not_run,
            "at_build": self.manifest.parity.model_dump(),
        }


def verify_bundle(folder: Path, trusted: Path | None = None) -> Verification:
    """Check every hash; if they are right, run the engines on the reference, or say why they are not run here.

    Engines that were built here for another machine are checked by what their files say of themselves.

    Raises: `BundleError` for a folder that is no bundle, or another version's, or with `trusted` not signed by the key
    in that file; `BackendUnavailable` for a bundle of another machine, or of a backend that is not installed.
    """
    manifest = read_manifest(folder, trusted)
    files = tuple(check_files(folder, manifest))
    if any(check.problem is not None for check in files):
        return Verification(manifest, files, None, None)
    if manifest.recipe.onnx_only:
        return Verification(manifest, files, None, "the bundle holds ONNX graphs only (--onnx-only)")
    support = fastcache_engines.backend(manifest.backend).support(manifest.device_type)
    if not support.can_build or support.can_run:
        check_here(manifest)
        return Verification(manifest, files, measure_here(folder, manifest), None)
    check_version(manifest)
    facts = engine_facts(folder, manifest)
    doubts = {manifest.engines[role].file: doubt for role, said in facts.items() if (doubt := _doubt(said))}
    files = tuple(FileCheck(check.name, doubts.get(check.name)) for check in files)
    return Verification(manifest, files, None, support.reason)


def _doubt(facts: dict[str, Any]) -> str | None:
    if "unknown" in facts:
        return f"cannot be read: {facts['unknown']}"
    return f"is not valid: {facts['reason']}" if facts.get("validity") == "invalid" else None
