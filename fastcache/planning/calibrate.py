"""Uncached trajectories -> what reuse at each step would do: the error e(j, s), and the closed-loop gain g(j).

e(j, s) is the error of step j's guided noise prediction where the feature stems from step s: along an uncached
trajectory, all features are kept, and each step runs its shallow pass on every one of them. g(j) says how far the final
latents move for each unit of error put into step j, when the rest of the run reacts to it in full. What leaving out
guidance at step j does is measured likewise. Both change slowly from step to step, so of a long run a few steps are
measured and the others interpolated. What a planner makes of them is its own business: see `Calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fastcache.evaluate.evaluate import batches
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.planning.calibration import Array, Calibration, Conditions, Measurements
from fastcache.planning.trajectory import Denoiser, EngineDenoiser, Feature, Walk, draw_noise
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import SamplerTable, compile_sampler

_TRIED, _LAST = 5, 3  # steps of a run that gains are measured at, and how many more of the last ones
_NEAR: Final = 8  # errors of features as many steps old or less are all measured, of older ones every fourth
GAIN_LAG: Final = 3  # the errors that gains are measured with are those of a feature three steps old, as in 1:4 reuse

Say = Callable[[str], None]
See = Callable[[Tensor], Tensor]  # final latents -> pictures, (P, C, H, W) each


@dataclass(frozen=True, eq=False)
class MeasuredBatch(Measurements):
    """One batch's part of a calibration. Shapes: `latents` (N, C, H, W), the final ones, uncached."""

    latents: Tensor


def calibrate(
    denoiser: Denoiser,
    table: SamplerTable,
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    gains: bool = True,
    guidance: bool = False,
    watch: AbstractContextManager[object] | None = None,
    see: See = lambda latents: latents,
) -> MeasuredBatch:
    """Measure a batch in one pass over its trajectory, one seed for each image of the denoiser's conditioning.

    `watch` is entered around each step's full pass, and around no other pass. `see` makes pictures of final latents,
    (P, C, H, W) each, for the couplings. For T calls this costs T full passes, about T^2 / 8 + 6 T shallow ones for
    each branch, and about 3 T full ones for the gains and again for `guidance`, what leaving it out does. It keeps the
    features of every step, T of them for each branch, and eight latents for each of the two over as many past steps as
    the sampler uses.
    """
    noise, generators = draw_noise(denoiser.latent_shape, seeds, denoiser.device)
    calls, images, branches = table.num_calls, denoiser.images, len(denoiser.branch_ids)
    # Walk 0 is the uncached run. Each other one has an error put into the call of its trial, is equal to walk 0 before,
    # and is run in full from there on.
    reused = [_Trial("reuse", call) for call in _spread(1, calls)] if gains else []
    trials = reused + ([_Trial("unguided", call) for call in _spread(0, calls)] if guidance else [])
    walk = Walk(table, noise.expand(1 + len(trials), *noise.shape))
    stored: list[tuple[Feature, ...]] = []
    errors, changes = np.full((images, branches, calls, calls), np.nan), np.zeros((images, branches, calls))
    noise_rms = np.zeros((images, calls))
    while not walk.finished:
        j, timestep, samples = walk.call, walk.timestep, walk.model_input
        with watch or nullcontext():
            guided, features = denoiser.store(samples[0], timestep, guidance_scale)
        stored.append(features)
        noise_rms[:, j] = _rms(guided)
        pushes = dict[str, Tensor]()
        sources = _sources(j)
        for b, branch_id in enumerate(denoiser.branch_ids):
            kept = [stored[s][b] for s in sources]
            missed = denoiser.reuse(samples[0], timestep, guidance_scale, branch_id, kept) - guided
            for image, sizes in enumerate(_rms(missed).T):
                errors[image, b, j, : j + 1] = np.interp(range(j + 1), sources, sizes)
            changes[:, b, j] = _relative_change(stored[j][b], stored[max(0, j - 1)][b], images)
            if b == 0:
                pushes["reuse"] = missed[sources.index(max(0, j - GAIN_LAG))]
        if any(trial == _Trial("unguided", j) for trial in trials):
            pushes["unguided"] = denoiser.full(samples[:1], timestep, 1.0)[0] - guided
        noise_preds = guided.expand_as(samples).clone()
        astray = [k for k, trial in enumerate(trials, 1) if trial.call < j]
        if astray:
            noise_preds[astray] = denoiser.full(samples[astray], timestep, guidance_scale)
        for k, trial in enumerate(trials, 1):
            if trial.call == j:
                noise_preds[k] += pushes[trial.kind]
                trial.size = _rms(pushes[trial.kind]) if trial.kind == "reuse" else np.ones(images)
        walk.step(noise_preds, walk.drawn(generators))
    return _measured(errors, noise_rms, changes, walk.latents, trials, see)


def passes_of(calls: int, branches: int, *, gains: bool = True, guidance: bool = False) -> tuple[int, int]:
    """How many full and shallow passes a measurement takes of each picture."""
    trials = _spread(1, calls) * gains + _spread(0, calls) * guidance
    full = calls + sum(calls - call for call in trials)
    return full, branches * sum(len(_sources(j)) for j in range(calls))


def _sources(j: int) -> list[int]:
    """The steps whose features are tried at step j."""
    return [s for s in range(j + 1) if j - s <= _NEAR or s % 4 == 0]


@dataclass
class _Trial:
    """A run with an error put into one call, (P,) `size` for each image: that of reuse, or of missing guidance."""

    kind: str
    call: int
    size: Array = field(default_factory=lambda: np.ones(0), compare=False)


def _spread(first: int, calls: int) -> list[int]:
    """A few calls from `first` to the last, closer at both ends, where most changes from one to the next.

    A trial takes a full pass at every call after its own, so those at the end cost next to nothing.
    """
    last = range(max(first, calls - _LAST), calls)
    if last.start - first < _TRIED:
        return list(range(first, calls))
    shares = np.linspace(0, 1, _TRIED) ** 1.5
    return sorted({*(round(first + share * (last.start - first)) for share in shares.tolist()), *last})


def _measured(
    errors: Array, noise_rms: Array, changes: Array, ends: Tensor, trials: Sequence[_Trial], see: See
) -> MeasuredBatch:
    """Gains and couplings from where the runs ended. Shapes: `ends` (1 + trials, P, C, H, W), uncached first."""
    images, calls = noise_rms.shape
    seen = [see(latents).double().flatten(1).cpu().numpy() for latents in ends]
    plain = [latents.double().flatten(1).cpu().numpy() for latents in ends]
    gains, coupled = np.full((images, calls), np.nan), dict[str, Array]()
    for kind in ("reuse", "unguided"):
        own = [k for k, trial in enumerate(trials, 1) if trial.kind == kind]
        coupled[kind] = np.full((images, calls, calls), np.nan)
        for image in range(images) if own else ():
            tried = [trials[k - 1] for k in own]
            sizes = np.array([max(trial.size[image], np.finfo(np.float32).tiny) for trial in tried])[:, None]
            each = _between(tried, np.stack([seen[k][image] - seen[0][image] for k in own]) / sizes, calls)
            coupled[kind][image] = each @ each.T / each.shape[1]
            if kind == "reuse":
                moved = _between(tried, np.stack([plain[k][image] - plain[0][image] for k in own]) / sizes, calls)
                gains[image] = np.sqrt(np.square(moved).mean(1))
    return MeasuredBatch(errors, gains, noise_rms, changes, coupled["reuse"], coupled["unguided"], ends[0])


def _between(tried: Sequence[_Trial], moved: Array, calls: int) -> Array:
    """What an error at each call moves, from those tried: in between directions turn evenly and sizes by a factor.

    Before the first that was tried nothing moves. Shapes: `moved` (trials, n); returns (calls, n).
    """
    points, sizes = [trial.call for trial in tried], np.linalg.norm(moved, axis=1)
    mixed = np.stack([np.interp(range(calls), points, column) for column in np.eye(len(points))], 1) @ moved
    logarithms = np.log(np.maximum(sizes, np.finfo(np.float32).tiny))
    wanted, got = np.exp(np.interp(range(calls), points, logarithms, left=-np.inf)), np.linalg.norm(mixed, axis=1)
    return mixed * np.divide(wanted, got, out=np.zeros_like(got), where=got > 0)[:, None]


def calibrate_bundle(
    pipe: FastCachePipeline,
    prompts: Sequence[str],
    *,
    sampler: str = "ddim",
    num_steps: int = 50,
    guidance_scale: float = 7.5,
    gains: bool = True,
    guidance: bool = False,
    say: Say = lambda _: None,
) -> Calibration:
    """Measure a bundle's engines at its own cut, prompt k with seed k, as many at once as the bundle takes.

    Raises: `BundleError` for a bundle without a text encoder; `ValueError` for no prompts or an unknown sampler.
    """
    if not prompts:
        raise ValueError("expected one prompt or more to calibrate on, got none")
    manifest = pipe.bundle.manifest
    table = compile_sampler(make_scheduler(sampler, manifest.model.scheduler), num_steps)
    profile, parts, branch_ids = manifest.profiles["batch"], list[MeasuredBatch](), tuple[int, ...]()

    def see(latents: Tensor) -> Tensor:
        return pipe.pictures.decode(latents.contiguous(), "pt")

    full, shallow = passes_of(table.num_calls, len(manifest.branches), gains=gains, guidance=guidance)
    say(f"calibrating takes {full} full and {shallow} shallow passes of each of {len(prompts)} pictures")
    for start, batch in batches(prompts, profile.max):
        say(f"calibrating on prompts {start + 1} to {start + len(batch)} of {len(prompts)}")
        embeds = torch.cat([pipe.encode_prompt([""] * len(batch)), pipe.encode_prompt(batch)])
        denoiser = EngineDenoiser(pipe.runtime, {"encoder_hidden_states": embeds})
        seeds, branch_ids = range(start, start + len(batch)), denoiser.branch_ids
        parts.append(
            calibrate(denoiser, table, seeds, guidance_scale=guidance_scale, gains=gains, guidance=guidance, see=see)
        )
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


def sample_names(prompts: Sequence[str]) -> list[str]:
    """What a sample is called: its prompt and seed, which is its index."""
    return [f"{prompt} (seed {seed})" for seed, prompt in enumerate(prompts)]


def _rms(tensor: Tensor) -> Array:
    """Root mean square of each latent. Shapes: (..., C, H, W) to (...)."""
    return tensor.double().square().mean((-3, -2, -1)).sqrt().cpu().numpy()


def _relative_change(feature: Feature, before: Feature, images: int) -> Array:
    """L1 change of each image's feature by its own L1 norm, both halves taken together. Shapes: returns (P,)."""

    def norms(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [part.double().abs().unflatten(0, (-1, images)).flatten(2).sum((0, 2)) for part in parts]
        ).sum(0)

    return (norms([a - b for a, b in zip(feature, before, strict=True)]) / norms(feature)).cpu().numpy()
