"""What a calibration holds: for each sample, what reuse and unguided steps would do to its predictions and picture.

Written by `calibrate.py`, read by planners; a file in JSON between the two. Knows nothing about models or tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

SCHEMA: Final = "fastcache.calibration/1"

Array = npt.NDArray[np.float64]
_DIGITS = 5  # of each number in the file; the spread over prompts is some tens of percent


@dataclass(frozen=True)
class Conditions:
    """What a calibration holds for, and nothing else. `num_steps` is what the sampler is asked for; it may make more
    U-Net calls of it. `weights_sha256` is that of the model's sources, as in a bundle's manifest."""

    model: str
    weights_sha256: str
    sampler: str
    num_steps: int
    guidance_scale: float
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Measurements:
    """What was measured on N samples (a prompt with a seed each), over T U-Net calls and B branches.

    Shapes: `errors` (N, B, T, T): [n, b, j, s], nan above the diagonal, zero on it but for rounding. `gains` (N, T),
    nan where gains were not measured. `noise_rms` (N, T). `changes` (N, B, T), of the cached feature since the step
    before, L1 relative to its own L1 norm; 0 at the first step. `couplings` (N, T, T), nan as `gains`; `unguided`
    (N, T, T), nan where that was not measured.
    Units: `errors` and `noise_rms`, the root mean square over the elements of a latent, of the guided noise prediction
    and of what is wrong with it; `errors / noise_rms` is therefore the relative error. `gains`, root mean square of the
    final latents' displacement by that of the error; so g(j) e(j, s) is how far reuse at step j alone moves the final
    latents, root mean square. `gains[:, 0]` is 0: the first step always runs in full. `couplings` are of pictures: what
    unit errors at steps j and k do to the final one, multiplied and averaged over its elements, so that the diagonal
    holds the squares of the gains that a viewer sees, and the sum over j and k, weighed by e(j, s) and e(k, s), is the
    mean square by which a plan moves the picture (the latents, where the measurement had no decoder). `unguided` is
    the same of steps without guidance, not by unit: its sum over a set of steps is what leaving it out there does.
    """

    errors: Array
    gains: Array
    noise_rms: Array
    changes: Array
    couplings: Array
    unguided: Array


@dataclass(frozen=True, eq=False)
class Calibration(Measurements):
    """Measurements of named samples, with what they hold for.

    Raises: `ValueError` where the shapes of the measurements do not fit each other.
    """

    conditions: Conditions
    branch_ids: tuple[int, ...]
    samples: tuple[str, ...]

    def __post_init__(self) -> None:
        count, branches, calls = len(self.samples), len(self.branch_ids), self.num_calls
        wanted: dict[str, tuple[int, ...]] = {
            "errors": (count, branches, calls, calls),
            "gains": (count, calls),
            "noise_rms": (count, calls),
            "changes": (count, branches, calls),
            "couplings": (count, calls, calls),
            "unguided": (count, calls, calls),
        }
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"expected {name} of shape {shape}, got {getattr(self, name).shape}")

    @classmethod
    def of(
        cls, conditions: Conditions, branch_ids: Sequence[int], samples: Sequence[str], parts: Sequence[Measurements]
    ) -> Calibration:
        """The measurements of several batches, their samples in order."""
        names = [field.name for field in fields(Measurements)]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, conditions=conditions, branch_ids=tuple(branch_ids), samples=tuple(samples))

    @property
    def num_calls(self) -> int:
        return self.noise_rms.shape[-1]

    @property
    def error(self) -> Array:
        """Mean over the samples. Shapes: (B, T, T): [b, j, s]."""
        return self.errors.mean(0)

    @property
    def gain(self) -> Array:
        """Mean over the samples. Shapes: (T,)."""
        return self.gains.mean(0)

    @property
    def relative_error(self) -> Array:
        """Mean over the samples of error by noise prediction. Shapes: (B, T, T): [b, j, s]."""
        return (self.errors / self.noise_rms[:, None, :, None]).mean(0)

    @property
    def change(self) -> Array:
        """Mean over the samples. Shapes: (B, T)."""
        return self.changes.mean(0)

    @property
    def has_gains(self) -> bool:
        return not bool(np.isnan(self.gains).any())

    @property
    def has_unguided(self) -> bool:
        return not bool(np.isnan(self.unguided).any())

    def branch(self, branch_id: int) -> int:
        """Where a branch stands in `errors`. Raises: `ValueError` for one that was not measured."""
        if branch_id not in self.branch_ids:
            raise ValueError(
                f"expected a branch out of {self.branch_ids}, got {branch_id}; measure it with --branch-id"
            )
        return self.branch_ids.index(branch_id)

    def to_json(self) -> str:
        """One line a sample. Of matrices row j holds s and k = 0 ... j."""
        rows = [
            {
                "name": name,
                "noise_rms": _rounded(self.noise_rms[n]),
                "changes": [_rounded(row) for row in self.changes[n]],
                "gains": None if np.isnan(self.gains[n]).any() else _rounded(self.gains[n]),
                "couplings": _known(self.couplings[n]),
                "unguided": _known(self.unguided[n]),
                "errors": [_triangle(matrix) for matrix in self.errors[n]],
            }
            for n, name in enumerate(self.samples)
        ]
        head = {"schema": SCHEMA, "conditions": vars(self.conditions), "branch_ids": list(self.branch_ids)}
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
        return f'{json.dumps(head)[:-1]}, "samples": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Raises: `ValueError` for anything but what `to_json` writes."""
        try:
            document: dict[str, Any] = json.loads(text)
            if document.get("schema") != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, got {document.get('schema')!r}; measure again")
            rows = cast("list[dict[str, Any]]", document["samples"])
            noise_rms = np.array([row["noise_rms"] for row in rows], dtype=np.float64)
            calls = noise_rms.shape[1]
            return cls(
                errors=np.array([[_square(matrix) for matrix in row["errors"]] for row in rows]),
                gains=np.array([row["gains"] or [np.nan] * calls for row in rows], dtype=np.float64),
                noise_rms=noise_rms,
                changes=np.array([row["changes"] for row in rows], dtype=np.float64),
                couplings=np.array([_symmetric(row["couplings"], calls) for row in rows]),
                unguided=np.array([_symmetric(row.get("unguided"), calls) for row in rows]),
                conditions=Conditions(**document["conditions"]),
                branch_ids=tuple(document["branch_ids"]),
                samples=tuple(row["name"] for row in rows),
            )
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"expected a calibration as fastcache writes it, got one with {error!r}") from None


def _known(matrix: Array) -> list[list[float]] | None:
    return None if np.isnan(matrix).any() else _triangle(matrix)


def _symmetric(rows: Sequence[Sequence[float]] | None, size: int) -> Array:
    """What `_known` gave; nan where nothing was measured."""
    if rows is None:
        return np.full((size, size), np.nan)
    lower = _square(rows)
    return np.where(np.isnan(lower), lower.T, lower)


def _triangle(matrix: Array) -> list[list[float]]:
    return [_rounded(row[: j + 1]) for j, row in enumerate(matrix)]


def _rounded(numbers: Array) -> list[float]:
    return [float(f"{number:.{_DIGITS}g}") for number in numbers]


def _square(rows: Sequence[Sequence[float]]) -> Array:
    """Rows of 1, 2, ... numbers, as the lower triangle of a matrix whose rest is nan."""
    square = np.full((len(rows), len(rows)), np.nan)
    for j, row in enumerate(rows):
        if len(row) != j + 1:
            raise ValueError(f"expected {j + 1} errors for step {j}, got {len(row)}; measure again")
        square[j, : j + 1] = row
    return square
