"""Two engines and a stored reference -> how far the engines are from the model, and from each other.

The reference holds one input and what the PyTorch model computed from it when the bundle was built, so a bundle can be
checked on a machine that has neither the model nor torch's exporter. Invariants 1 and 2 of the design.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastcache.bundle.manifest import Parity
from fastcache.errors import BundleError
from fastcache_engines import TOLERANCE, Backend, DType, Engine, LoadOptions


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude; infinite where either is not finite."""
    difference, scale = float((got - expected).abs().max()), float(expected.abs().max())
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)


class Part(Protocol):
    """A full or a shallow pass: a module called with one dict of named tensors, and the names of what comes out."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def inputs(self) -> Mapping[str, Tensor]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...


def module_parity(parts: Sequence[Part], reference: Path, dtype: DType) -> Parity:
    """The same of PyTorch modules, the full pass and the shallow ones."""
    expected = load_file(reference)
    full, *shallow = parts

    def run(part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            results = part.module({name: tensors[name] for name in part.inputs})
        return dict(zip(part.outputs, results if isinstance(results, tuple) else (results,), strict=True))

    of_full = run(full, expected)
    of_shallow = [run(part, expected | of_full) for part in shallow]
    return _parity(
        "torch",
        max(relative_error(value.float(), expected[name]) for name, value in of_full.items()),
        max(relative_error(v, of_full[name]) for found in of_shallow for name, v in found.items()),
        dtype,
    )


def _parity(measured_on: str, full_vs_model: float, shallow_vs_full: float, dtype: DType) -> Parity:
    """Raises: `BundleError` for NaN or infinity among what was computed, of which there is no error to tell."""
    worst = max(full_vs_model, shallow_vs_full)
    if not math.isfinite(worst):
        which = "full" if not math.isfinite(full_vs_model) else "shallow"
        raise BundleError(
            f"expected numbers from the {which} pass on {measured_on}, got NaN or infinity; its values leave the range "
            f"of {dtype}: build it in fp32, or of other weights"
        )
    return Parity(
        measured_on=measured_on,
        full_vs_model=full_vs_model,
        shallow_vs_full=shallow_vs_full,
        tolerance=TOLERANCE[dtype],
    )


def measure_parity(
    backend: Backend, full: Path, shallow: Sequence[Path], reference: Path, options: LoadOptions
) -> Parity:
    """Run the engines on the reference input, one after the other, over one set of tensors.

    Each shallow engine takes what the full one stored, and is held to all that this gave: its noise prediction, and
    the features of shallower cuts where it refreshes them.
    """
    expected = load_file(reference)
    engine = backend.load(full, options)
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in (*engine.inputs, *engine.outputs)}
    tensors = {name: expected[name].to(options.device, dtype, copy=True) for name, dtype in dtypes.items()}

    def run(engine: Engine) -> dict[str, Tensor]:
        for spec in engine.outputs:
            tensors[spec.name].fill_(torch.nan)
        engine.bind(tensors).run()
        return {spec.name: tensors[spec.name].clone() for spec in engine.outputs}

    def worst(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
        return max(relative_error(value.float().cpu(), wanted[name].float().cpu()) for name, value in found.items())

    of_full = run(engine)
    errors: list[float] = []
    for path in shallow:
        for name, value in of_full.items():
            tensors[name].copy_(value)
        errors.append(worst(run(backend.load(path, options)), of_full))
    return _parity(backend.CAPABILITIES.name, worst(of_full, expected), max(errors), options.dtype)
