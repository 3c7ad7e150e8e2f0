"""Uncached trajectories -> what reuse at each step would do: the error e(j, s), and the closed-loop gain g(j).

e(j, s) is the error of step j's guided noise prediction where the feature stems from step s: along an uncached
trajectory, all features are kept, and each step runs its shallow pass on every one of them. g(j) says how far the final
latents move for each unit of error put into step j, when the rest of the run reacts to it in full. What a planner makes
of the two is its own business: see `Calibration`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcache.run.pipeline import FastCachePipeline
from fastcache.run.sampler import SamplerTable, compile_sampler
from fastcache.run.scheduler import make_scheduler
from fastcache.study.trajectory import Denoiser, EngineDenoiser, Feature, Walk, draw_noise

SCHEMA: Final = "fastcache.calibration/1"
GAIN_LAG: Final = 3  # the errors that gains are measured with are those of a feature three steps old, as in 1:4 reuse

Array = npt.NDArray[np.float64]
Say = Callable[[str], None]
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
class Calibration:
    """What was measured on N samples (a prompt with a seed each), over T U-Net calls and B branches.

    Shapes: `errors` (N, B, T, T): [n, b, j, s], nan above the diagonal, zero on it but for rounding. `gains` (N, T),
    nan where gains were not measured. `noise_rms` (N, T). `changes` (N, B, T), of the cached feature since the step
    before, L1 relative to its own L1 norm; 0 at the first step. `couplings` (N, T, T), nan as `gains`.
    Units: `errors` and `noise_rms`, the root mean square over the elements of a latent, of the guided noise prediction
    and of what is wrong with it; `errors / noise_rms` is therefore the relative error. `gains`, root mean square of the
    final latents' displacement by that of the error; so g(j) e(j, s) is how far reuse at step j alone moves the final
    latents, root mean square. `gains[:, 0]` is 0: the first step always runs in full. `couplings` are of pictures: what
    unit errors at steps j and k do to the final one, multiplied and averaged over its elements, so that the diagonal
    holds the squares of the gains that a viewer sees, and the sum over j and k, weighed by e(j, s) and e(k, s), is the
    mean square by which a plan moves the picture (the latents, where the measurement had no decoder).
    """

    conditions: Conditions
    branch_ids: tuple[int, ...]
    samples: tuple[str, ...]
    errors: Array
    gains: Array
    noise_rms: Array
    changes: Array
    couplings: Array

    def __post_init__(self) -> None:
        count, branches, calls = len(self.samples), len(self.branch_ids), self.num_calls
        wanted: dict[str, tuple[int, ...]] = {
            "errors": (count, branches, calls, calls),
            "gains": (count, calls),
            "noise_rms": (count, calls),
            "changes": (count, branches, calls),
            "couplings": (count, calls, calls),
        }
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"expected {name} of shape {shape}, got {getattr(self, name).shape}")

    @classmethod
    def of(
        cls, conditions: Conditions, branch_ids: Sequence[int], samples: Sequence[str], parts: Sequence[Measured]
    ) -> Calibration:
        """The measurements of several batches, their samples in order."""
        names = ("errors", "gains", "noise_rms", "changes", "couplings")
        joined = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return cls(conditions, tuple(branch_ids), tuple(samples), *joined)

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

    def branch(self, branch_id: int) -> int:
        """Where a branch stands in `errors`. Raises: `ValueError` for one that was not measured."""
        if branch_id not in self.branch_ids:
            raise ValueError(
                f"expected a branch out of {self.branch_ids}, got {branch_id}; measure it with --branch-id"
            )
        return self.branch_ids.index(branch_id)

    def to_json(self) -> str:
        """One line a sample. Of `errors` and `couplings`, row j holds s and k = 0 ... j."""
        rows = [
            {
                "name": name,
                "noise_rms": _rounded(self.noise_rms[n]),
                "changes": [_rounded(row) for row in self.changes[n]],
                "gains": None if np.isnan(self.gains[n]).any() else _rounded(self.gains[n]),
                "couplings": None if np.isnan(self.couplings[n]).any() else _triangle(self.couplings[n]),
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
            gains = np.array([row["gains"] or [np.nan] * noise_rms.shape[1] for row in rows], dtype=np.float64)
            errors = np.array([[_square(matrix) for matrix in row["errors"]] for row in rows])
            unknown = [[np.nan] * (j + 1) for j in range(noise_rms.shape[1])]
            lower = np.array([_square(row["couplings"] or unknown) for row in rows])
            return cls(
                Conditions(**document["conditions"]),
                tuple(document["branch_ids"]),
                tuple(row["name"] for row in rows),
                errors,
                gains,
                noise_rms,
                np.array([row["changes"] for row in rows], dtype=np.float64),
                np.where(np.isnan(lower), lower.transpose(0, 2, 1), lower),
            )
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"expected a calibration as fastcache writes it, got one with {error!r}") from None


@dataclass(frozen=True, eq=False)
class Measured:
    """One batch's part of a calibration. Shapes: as there, with the batch's P images for N; `latents` (P, C, H, W),
    the final ones, uncached."""

    errors: Array
    gains: Array
    noise_rms: Array
    changes: Array
    couplings: Array
    latents: Tensor


def calibrate(
    denoiser: Denoiser,
    table: SamplerTable,
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    gains: bool = True,
    watch: AbstractContextManager[object] | None = None,
    see: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> Measured:
    """Measure a batch in one pass over its trajectory, one seed for each image of the denoiser's conditioning.

    `watch` is entered around each step's full pass, and around no other pass. `see` makes pictures of final latents,
    (P, C, H, W) each, for the couplings. For T calls this costs T full passes,
    about T^2 / 2 shallow ones for each branch, and about T^2 / 2 full ones for the gains. It keeps the features of
    every step, T of them for each branch, and for the gains T + 1 latents over as many past steps as the sampler uses.
    """
    noise, generators = draw_noise(denoiser.latent_shape, seeds, denoiser.device)
    calls = table.num_calls
    # Walk 0 is the uncached run; walk 1 + j is the run with an error put into call j, and equal to walk 0 before.
    walk = Walk(table, noise.expand(1 + calls if gains else 1, *noise.shape))
    stored: list[tuple[Feature, ...]] = []
    errors = np.full((denoiser.images, len(denoiser.branch_ids), calls, calls), np.nan)
    changes = np.zeros((denoiser.images, len(denoiser.branch_ids), calls))
    noise_rms, pushed = np.zeros((denoiser.images, calls)), np.zeros((denoiser.images, calls))
    while not walk.finished:
        j, timestep, samples = walk.call, walk.timestep, walk.model_input
        with watch or nullcontext():
            guided, features = denoiser.store(samples[0], timestep, guidance_scale)
        push = torch.zeros_like(guided)
        stored.append(features)
        noise_rms[:, j] = _rms(guided)
        for b, branch_id in enumerate(denoiser.branch_ids):
            reused = denoiser.reuse(samples[0], timestep, guidance_scale, branch_id, [kept[b] for kept in stored])
            errors[:, b, j, : j + 1] = _rms(reused - guided).T
            changes[:, b, j] = _relative_change(stored[j][b], stored[max(0, j - 1)][b], denoiser.images)
            if b == 0:
                push = reused[max(0, j - GAIN_LAG)] - guided
        noise_preds = guided.expand_as(samples).clone()
        if gains and j > 1:
            noise_preds[2 : 1 + j] = denoiser.full(samples[2 : 1 + j], timestep, guidance_scale)
        if gains and j > 0:
            noise_preds[1 + j] += push
            pushed[:, j] = _rms(push)
        walk.step(noise_preds, walk.drawn(generators))
    measured, couplings = np.full((denoiser.images, calls), np.nan), np.full((denoiser.images, calls, calls), np.nan)
    if gains:
        moved = _rms(walk.latents[1:] - walk.latents[:1]).T
        measured = np.divide(moved, pushed, out=np.zeros_like(moved), where=pushed > 0)
        couplings = _couplings([see(latents) for latents in walk.latents], pushed)
    return Measured(errors, measured, noise_rms, changes, couplings, walk.latents[0])


def calibrate_bundle(
    pipe: FastCachePipeline,
    prompts: Sequence[str],
    *,
    sampler: str = "ddim",
    num_steps: int = 50,
    guidance_scale: float = 7.5,
    gains: bool = True,
    say: Say = lambda _: None,
) -> Calibration:
    """Measure a bundle's engines at its own cut, prompt k with seed k, as many at once as the bundle takes.

    Raises: `BundleError` for a bundle without a text encoder; `ValueError` for no prompts or an unknown sampler.
    """
    if not prompts:
        raise ValueError("expected one prompt or more to calibrate on, got none")
    manifest = pipe.bundle.manifest
    table = compile_sampler(make_scheduler(sampler, manifest.model.scheduler), num_steps)
    profile, parts, branch_ids = manifest.profiles["batch"], list[Measured](), tuple[int, ...]()

    def see(latents: Tensor) -> Tensor:
        return pipe.pictures.decode(latents.contiguous(), "pt")

    for start, batch in batches(prompts, profile.max):
        say(f"calibrating on prompts {start + 1} to {start + len(batch)} of {len(prompts)}")
        embeds = torch.cat([pipe.encode_prompt([""] * len(batch)), pipe.encode_prompt(batch)])
        denoiser = EngineDenoiser(pipe.runtime, {"encoder_hidden_states": embeds})
        seeds, branch_ids = range(start, start + len(batch)), denoiser.branch_ids
        parts.append(calibrate(denoiser, table, seeds, guidance_scale=guidance_scale, gains=gains, see=see))
    conditions = Conditions(
        model=manifest.model.name,
        weights_sha256=manifest.weights_sha256,
        sampler=sampler,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        height=manifest.height,
        width=manifest.width,
    )
    return Calibration.of(conditions, branch_ids, sample_names(prompts), parts)


def batches(prompts: Sequence[str], size: int) -> Iterator[tuple[int, list[str]]]:
    """The prompts in parts of a size, and where each part starts."""
    for start in range(0, len(prompts), size):
        yield start, list(prompts[start : start + size])


def sample_names(prompts: Sequence[str]) -> list[str]:
    """What a sample is called: its prompt and seed, which is its index."""
    return [f"{prompt} (seed {seed})" for seed, prompt in enumerate(prompts)]


def _rms(tensor: Tensor) -> Array:
    """Root mean square of each latent. Shapes: (..., C, H, W) to (...)."""
    return tensor.double().square().mean((-3, -2, -1)).sqrt().cpu().numpy()


def _couplings(seen: Sequence[Tensor], pushed: Array) -> Array:
    """Products of what unit errors do. Shapes: `seen` T + 1 pictures (P, C, H, W), uncached first; to (P, T, T)."""
    sizes = torch.from_numpy(pushed.T).clamp(min=torch.finfo(torch.float32).tiny)
    found: list[Array] = []
    for image in range(pushed.shape[0]):
        moved = torch.stack([other[image] - seen[0][image] for other in seen[1:]]).flatten(1).double().cpu()
        each = moved / sizes[:, image, None]
        found.append((each @ each.T / each.shape[1]).numpy())
    return np.stack(found)


def _relative_change(feature: Feature, before: Feature, images: int) -> Array:
    """L1 change of each image's feature by its own L1 norm, both halves taken together. Shapes: returns (P,)."""

    def norms(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [part.double().abs().unflatten(0, (-1, images)).flatten(2).sum((0, 2)) for part in parts]
        ).sum(0)

    return (norms([a - b for a, b in zip(feature, before, strict=True)]) / norms(feature)).cpu().numpy()


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
