"""Two engines and a stored reference -> how far the engines are from the model, and from each other.

The reference holds one input and what the PyTorch model computed from it when the bundle was built, so a bundle can be
checked on a machine that has neither the model nor torch's exporter. Invariants 1 and 2 of the design.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastcache.bundle import Parity
from fastcache_engines import Backend

TOLERANCE = 1e-3


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude; infinite where `got` is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max())


def measure_parity(backend: Backend, full: Path, shallow: Path, reference: Path) -> Parity:
    """Run both engines on the reference input, one after the other, over one set of tensors."""
    tensors = load_file(reference)
    noise_pred, cached_feature = tensors["noise_pred"].clone(), tensors["cached_feature"].clone()
    tensors["noise_pred"].fill_(torch.nan)
    tensors["cached_feature"].fill_(torch.nan)
    backend.load(full).bind(tensors).run()
    of_full = tensors["noise_pred"].clone()
    full_vs_model = max(relative_error(of_full, noise_pred), relative_error(tensors["cached_feature"], cached_feature))
    tensors["noise_pred"].fill_(torch.nan)
    backend.load(shallow).bind(tensors).run()
    return Parity(
        full_vs_model=full_vs_model,
        shallow_vs_full=relative_error(tensors["noise_pred"], of_full),
        tolerance=TOLERANCE,
    )
