"""Two engines and a stored reference -> how far the engines are from the model, and from each other.

The reference holds one input and what the PyTorch model computed from it when the bundle was built, so a bundle can be
checked on a machine that has neither the model nor torch's exporter. Invariants 1 and 2 of the design.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import fastcache_engines
from fastcache.bundle.bundle import REFERENCE
from fastcache.bundle.manifest import BlockEntry, EngineEntry, Parity, PassEntry
from fastcache.bundle.patterns import Passes
from fastcache.cut.chain import ADJUSTMENT, RUNS, kept_in, kept_name, neutral
from fastcache.cut.names import pattern_pass
from fastcache.errors import BundleError
from fastcache_engines import TOLERANCE, Backend, DType, Engine, LoadOptions, TensorSpec

ADJUSTED = "noise_pred_adjusted"  # of the reference: with every residual reused, scaled and shifted


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


Pair = tuple[Tensors, Tensors]  # what was computed, and what is right


def parity_of(
    measured_on: str, dtype: DType, full: Pair, others: Iterable[Pair], tolerance: float | None = None
) -> Parity:
    """How far passes are from what is right: the full one from the model, the others from what it gave.

    Without a `tolerance` it is the dtype's.

    Raises: `BundleError` for NaN or infinity among what was computed, of which there is no error to tell.
    """
    full_vs_model, shallow_vs_full = worst_error(*full), max(worst_error(*pair) for pair in others)
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
        tolerance=TOLERANCE[dtype] if tolerance is None else tolerance,
    )


@dataclass(frozen=True)
class Trial:
    """A pass to try on the reference, its engines' files, in turn, and whether the residuals it reuses are adjusted.

    Where they are, an engine that computes them anew is found out, for what comes before them is not what it was.
    """

    files: tuple[str, ...]
    entry: PassEntry
    adjusted: bool = False


def trials(engines: Mapping[str, EngineEntry], passes: Passes, blocks: Sequence[BlockEntry]) -> list[Trial]:
    """What shows that engines compute what the model does: the full pass, and each other one.

    Of patterns of blocks these are every second block, each half once, and none, with a scale and a shift.
    """
    of_blocks = [pattern_pass([k % 2 != rest for k in range(len(blocks))]) for rest in (0, 1)] if blocks else []

    def trial(name: str, adjusted: bool = False) -> Trial:
        return Trial(tuple(engines[role].file for role in passes[name].engines), passes[name], adjusted)

    plain = [trial(name) for name in dict.fromkeys([*passes, *of_blocks])]
    return [*plain, trial(pattern_pass([False] * len(blocks)), adjusted=True)] if blocks else plain


def measure_parity(
    backend: Backend, folder: Path, tried: Sequence[Trial], options: LoadOptions, tolerance: float | None = None
) -> Parity:
    """Run passes on a bundle's reference input, one after the other, over one set of tensors.

    The first is the full one; the others take what it stored. Without a `tolerance` it is the dtype's.

    Raises: as `parity_of`.
    """
    expected = load_file(folder / REFERENCE)
    adjusted = {"noise_pred": expected.pop(ADJUSTED)} if ADJUSTED in expected else {}
    load = lru_cache(maxsize=None)(lambda file: backend.load(folder / file, options))
    tensors, of_full = dict[str, Tensor](), dict[str, Tensor]()

    def run(trial: Trial) -> dict[str, Tensor]:
        engines: list[Engine] = [load(file) for file in trial.files]
        specs = {spec.name: spec for engine in engines for spec in (*engine.inputs, *engine.outputs)}
        place(tensors, specs, expected | of_full, options.device)
        if ADJUSTMENT in specs and not trial.adjusted:
            tensors[ADJUSTMENT].copy_(neutral(*tensors[ADJUSTMENT].shape[::2]))
        if RUNS in specs:
            tensors[RUNS].copy_(torch.tensor(trial.entry.runs))
        made = [spec.name for engine in engines for spec in engine.outputs if spec.name not in trial.entry.takes]
        for name in made:
            tensors[name].fill_(torch.nan)
        for engine in engines:
            engine.bind(tensors).run()
        return {name: tensors[name].clone() for name in made if name in expected}

    of_full |= run(tried[0])
    pairs = ((run(trial), adjusted if trial.adjusted else of_full) for trial in tried[1:])
    measured_on = backend.CAPABILITIES.name
    known = (_only_known(*pair) for pair in pairs)
    return parity_of(measured_on, options.dtype, (of_full, expected), known, tolerance)


def graph_error(backend: Backend, graph: Path, known: Tensors, options: LoadOptions) -> float:
    """How far an ONNX engine's noise prediction is from what ONNX Runtime makes of its graph, node by node.

    `known` are the inputs, and outputs by whose shapes room is made. An engine in 8 bits may be far off where a
    processor, or what a backend fuses, rounds otherwise than the graph says.
    """
    engine, tensors = backend.load(graph, options), dict[str, Tensor]()
    place(tensors, {spec.name: spec for spec in (*engine.inputs, *engine.outputs)}, known, options.device)
    engine.bind(tensors).run()
    inputs = {spec.name: known[spec.name] for spec in engine.inputs}
    exact = fastcache_engines.backend(fastcache_engines.REFERENCE).evaluate(graph, inputs)
    return relative_error(tensors["noise_pred"], exact["noise_pred"])


def _only_known(found: Tensors, wanted: Tensors) -> Pair:
    return {name: value for name, value in found.items() if name in wanted}, wanted


def place(tensors: dict[str, Tensor], specs: Mapping[str, TensorSpec], known: Tensors, device: str) -> None:
    """Tensors for these inputs and outputs, those that are known with what they hold."""
    sizes = dict[str, int]()
    for name in specs.keys() & known.keys():
        sizes |= specs[name].sizes_in(known[name].shape)
    for name, spec in specs.items():
        if name not in tensors and kept_name(name) is None:
            tensors[name] = torch.zeros(spec.shape_at(sizes), dtype=getattr(torch, spec.dtype), device=device)
        if name in known:
            tensors[name].copy_(known[name])
    tensors |= kept_in(tensors, specs)
