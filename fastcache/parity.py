"""Two engines and a stored reference -> how far the engines are from the model, and from each other.

The reference holds one input and what the PyTorch model computed from it when the bundle was built, so a bundle can be
checked on a machine that has neither the model nor torch's exporter. Invariants 1 and 2 of the design.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastcache.bundle import Parity
from fastcache.recipe import DType
from fastcache_engines import Backend, Engine, LoadOptions

# The largest error of one U-Net call. Eight bits of mantissa through some hundred layers leave 2 to 5% of bfloat16 in
# single values, on random weights; pictures agree far better than that (README).
TOLERANCE: dict[DType, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude; infinite where `got` is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max())


def module_parity(modules: Sequence[nn.Module], reference: Path, dtype: DType) -> Parity:
    """The same of a full and a shallow PyTorch module, each called with one dict of named tensors."""
    expected = load_file(reference)
    names = [name for name in expected if name.startswith("cached_")]
    inputs = {name: tensor for name, tensor in expected.items() if name != "noise_pred" and name not in names}
    full, shallow = modules
    with torch.no_grad():
        of_full, *values = full(inputs)
        cached = dict(zip(sorted(names), values, strict=True))
        of_shallow = shallow(inputs | cached)
    results = cached | {"noise_pred": of_full}
    return Parity(
        measured_on="torch",
        full_vs_model=max(relative_error(value.float(), expected[name]) for name, value in results.items()),
        shallow_vs_full=relative_error(of_shallow, of_full),
        tolerance=TOLERANCE[dtype],
    )


def measure_parity(backend: Backend, full: Path, shallow: Path, reference: Path, options: LoadOptions) -> Parity:
    """Run both engines on the reference input, one after the other, over one set of tensors."""
    expected = load_file(reference)
    engine = backend.load(full, options)
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in (*engine.inputs, *engine.outputs)}
    tensors = {name: expected[name].to(options.device, dtype, copy=True) for name, dtype in dtypes.items()}
    for spec in engine.outputs:
        tensors[spec.name].fill_(torch.nan)

    def run(engine: Engine) -> Tensor:
        tensors["noise_pred"].fill_(torch.nan)
        engine.bind(tensors).run()
        return tensors["noise_pred"].float().cpu()

    of_full = run(engine)
    full_vs_model = max(relative_error(tensors[s.name].float().cpu(), expected[s.name]) for s in engine.outputs)
    return Parity(
        measured_on=backend.NAME,
        full_vs_model=full_vs_model,
        shallow_vs_full=relative_error(run(backend.load(shallow, options)), of_full),
        tolerance=TOLERANCE[options.dtype],
    )
