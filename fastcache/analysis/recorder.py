"""A network's modules, hooked during its full passes -> how alike what they give is from step to step.

Two measures, both reduced on the device as the features come. *Similarity*: the cosine between a feature at every pair
of steps (DeepCache, arXiv 2312.00858, figure 2). *Change*: the L1 distance of a block's residual from the step before,
by its own L1 norm (Block Caching, arXiv 2312.03209, L1rel). Knows modules by name only; what they belong to is
`taps.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[np.float64]
Measure = Literal["similarity", "change"]
Predict = Callable[[Tensor, float, float], Tensor]  # sample, timestep and guidance scale -> a noise prediction


def output_of(_: tuple[Any, ...], output: Any) -> Tensor:
    """What a module returns, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class Tap:
    """One tensor to look at: where it appears, what it is called, what kind of block makes it, and the measure.

    `take` finds it among a module's arguments and output. Its rows are a batch's, under guidance once for each half.
    """

    name: str
    kind: str
    measure: Measure
    module: nn.Module
    take: Callable[[tuple[Any, ...], Any], Tensor] = output_of


@dataclass(frozen=True, eq=False)
class FeatureMeasures:
    """The measures by tap's name, for N samples over T steps.

    Shapes: similarity (N, T, T), symmetric; change (N, T), of each step from the one before, nan at step 0.
    """

    similarity: dict[str, Array]
    change: dict[str, Array]


def joined(parts: Sequence[FeatureMeasures]) -> FeatureMeasures:
    """The records of several batches of samples as one."""

    def join(measure: Measure) -> dict[str, Array]:
        of_parts = [getattr(part, measure) for part in parts]
        return {name: np.concatenate([part[name] for part in of_parts]) for name in of_parts[0]}

    return FeatureMeasures(join("similarity"), join("change"))


class Capture:
    """Entered around one full pass at a time, as a context manager: holds hooks only while it is.

    `found` has the tensors of the last pass by tap's name, in the order in which the modules ran.
    Raises: `RuntimeError` where a pass ends without having run a tapped module.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self._taps = {tap.name: tap for tap in taps}
        self._hooks: list[Any] = []
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        self.found = {}
        for tap in self._taps.values():
            self._hooks.append(tap.module.register_forward_hook(partial(self._take, tap)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        missing = self._taps.keys() - self.found.keys()
        if error is None and missing:
            raise RuntimeError(f"expected the pass to run {', '.join(sorted(missing))}, but it did not")

    def watching(self, predict: Predict) -> Predict:
        """The same function, of which each call is one pass."""

        def watched(sample: Tensor, timestep: float, guidance_scale: float) -> Tensor:
            with self:
                return predict(sample, timestep, guidance_scale)

        return watched

    def _take(self, tap: Tap, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.found[tap.name] = tap.take(arguments, output).detach()


class FeatureRecorder(Capture):
    """A capture that reduces what it finds, pass by pass.

    Keeps every step's features for the similarity (T tensors a tap), and the last step's for the change.
    """

    def __init__(self, taps: Sequence[Tap], num_calls: int, images: int) -> None:
        super().__init__(taps)
        self._num_calls, self._images, self._call = num_calls, images, 0
        self._kept: dict[str, Tensor] = {}
        self._numbers: dict[str, list[Tensor]] = {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        super().__exit__(kind, error, _)
        if error is not None:
            return
        for name, found in self.found.items():
            reduce = self._cosines if self._taps[name].measure == "similarity" else self._change
            self._numbers.setdefault(name, []).append(reduce(name, found.flatten(1)))
        self._call += 1

    def _cosines(self, name: str, found: Tensor) -> Tensor:
        """With every step so far, this one last. Shapes: `found` (rows, elements); returns (rows, steps)."""
        if name not in self._kept:
            self._kept[name] = torch.empty(len(found), self._num_calls, found.shape[1], device=found.device)
        unit = torch.nn.functional.normalize(found.float(), dim=1)
        self._kept[name][:, self._call] = unit
        return torch.bmm(self._kept[name][:, : self._call + 1], unit[:, :, None])[:, :, 0].cpu()

    def _change(self, name: str, found: Tensor) -> Tensor:
        """Shapes: `found` (rows, elements); returns (rows,)."""
        before, self._kept[name] = self._kept.get(name), found
        if before is None:
            return torch.full((len(found),), torch.nan)
        return ((found - before).abs().sum(1, dtype=torch.float32) / found.abs().sum(1, dtype=torch.float32)).cpu()

    def recorded(self) -> FeatureMeasures:
        """The measures over the steps taken so far, each the mean of a sample's two halves."""
        by_measure: dict[Measure, dict[str, Array]] = {"similarity": {}, "change": {}}
        for name, numbers in self._numbers.items():
            measure = self._taps[name].measure
            whole = _symmetric(numbers) if measure == "similarity" else torch.stack(numbers, 1)
            by_measure[measure][name] = whole.double().unflatten(0, (-1, self._images)).mean(0).numpy()
        return FeatureMeasures(**by_measure)


def _symmetric(rows: Sequence[Tensor]) -> Tensor:
    """Rows of 1, 2, ... steps -> the whole matrix. Shapes: each (rows, steps so far); returns (rows, T, T)."""
    steps = len(rows)
    square = torch.zeros(len(rows[0]), steps, steps)
    for step, row in enumerate(rows):
        square[:, step, : step + 1] = row
        square[:, : step + 1, step] = row
    return square
