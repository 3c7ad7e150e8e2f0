"""Two engines and a stored reference -> how far the engines are from the model, and from each other.

The reference holds one input and what the PyTorch model computed from it when the bundle was built, so a bundle can be
checked on a machine that has neither the model nor torch's exporter. Invariants 1 and 2 of the design.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastcache.bundle.manifest import Parity
from fastcache.errors import BundleError
from fastcache_engines import TOLERANCE, Backend, DType, Engine, LoadOptions


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude; infinite where either is not finite."""
    difference, scale = float((got - expected).abs().max()), float(expected.abs().max())
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)


Tensors = Mapping[str, Tensor]


def worst_error(found: Tensors, wanted: Tensors) -> float:
    """The largest `relative_error` of some tensors."""
    return max(relative_error(value.float().cpu(), wanted[name].float().cpu()) for name, value in found.items())


def parity_of(measured_on: str, dtype: DType, expected: Tensors, full: Tensors, shallow: Iterable[Tensors]) -> Parity:
    """What the passes gave, on `measured_on`, beside what the model did.

    Each shallow pass is held to all that the full one gave: its noise prediction, and the features of shallower cuts
    where it refreshes them.

    Raises: `BundleError` for NaN or infinity among what was computed, of which there is no error to tell.
    """
    full_vs_model, shallow_vs_full = worst_error(full, expected), max(worst_error(found, full) for found in shallow)
    if not math.isfinite(max(full_vs_model, shallow_vs_full)):
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

    Each shallow engine takes what the full one stored. Raises: as `parity_of`.
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

    def run_shallow(path: Path) -> dict[str, Tensor]:
        for name, value in of_full.items():
            tensors[name].copy_(value)
        return run(backend.load(path, options))

    of_full = run(engine)
    return parity_of(backend.CAPABILITIES.name, options.dtype, expected, of_full, map(run_shallow, shallow))
