"""Uncached trajectories -> what reuse at each step would do: the error e(j, s), and the closed-loop gain g(j).

e(j, s) is the error of step j's guided noise prediction where the feature stems from step s: along an uncached
trajectory, all features are kept, and each step runs its shallow pass on every one of them. g(j) says how far the final
latents move for each unit of error put into step j, when the rest of the run reacts to it in full. What leaving out
guidance at step j does is measured likewise. What a planner makes of them is its own business: see `Calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fastcache.evaluate.evaluate import batches
from fastcache.loop.scheduler import make_scheduler
from fastcache.loop.table import SamplerTable, compile_sampler
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.planning.calibration import Array, Calibration, Conditions, Measurements
from fastcache.planning.trajectory import Denoiser, EngineDenoiser, Feature, Walk, draw_noise

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
    (P, C, H, W) each, for the couplings. For T calls this costs T full passes, about T^2 / 2 shallow ones for each
    branch, and about T^2 / 2 full ones for the gains and again for `guidance`, what leaving it out does. It keeps the
    features of every step, T of them for each branch, and T latents for each of the two over as many past steps as the
    sampler uses.
    """
    noise, generators = draw_noise(denoiser.latent_shape, seeds, denoiser.device)
    calls, images, branches = table.num_calls, denoiser.images, len(denoiser.branch_ids)
    trials = [kind for kind, wanted in (("reuse", gains), ("unguided", guidance)) if wanted]
    # Walk 0 is the uncached run; after it come T for each kind of trial, of which number j has an error put into call j
    # and is equal to walk 0 before.
    walk = Walk(table, noise.expand(1 + len(trials) * calls, *noise.shape))
    stored: list[tuple[Feature, ...]] = []
    errors, changes = np.full((images, branches, calls, calls), np.nan), np.zeros((images, branches, calls))
    noise_rms, pushed = np.zeros((images, calls)), np.zeros((images, calls))
    while not walk.finished:
        j, timestep, samples = walk.call, walk.timestep, walk.model_input
        with watch or nullcontext():
            guided, features = denoiser.store(samples[0], timestep, guidance_scale)
        pushes = {"reuse": torch.zeros_like(guided)}
        stored.append(features)
        noise_rms[:, j] = _rms(guided)
        for b, branch_id in enumerate(denoiser.branch_ids):
            reused = denoiser.reuse(samples[0], timestep, guidance_scale, branch_id, [kept[b] for kept in stored])
            errors[:, b, j, : j + 1] = _rms(reused - guided).T
            changes[:, b, j] = _relative_change(stored[j][b], stored[max(0, j - 1)][b], images)
            if b == 0 and j > 0:
                pushes["reuse"] = reused[max(0, j - GAIN_LAG)] - guided
        if guidance:
            pushes["unguided"] = denoiser.full(samples[:1], timestep, 1.0)[0] - guided
        noise_preds = guided.expand_as(samples).clone()
        astray = [1 + k * calls + i for k, kind in enumerate(trials) for i in range(kind == "reuse", j)]
        if astray:
            noise_preds[astray] = denoiser.full(samples[astray], timestep, guidance_scale)
        for k, kind in enumerate(trials):
            noise_preds[1 + k * calls + j] += pushes[kind]
        pushed[:, j] = _rms(pushes["reuse"])
        walk.step(noise_preds, walk.drawn(generators))
    ends = walk.latents
    found = _reuse_moves(ends[: 1 + calls], pushed, see) if gains else (np.full_like(pushed, np.nan), _unknown(pushed))
    unguided = _couplings(ends[[0, *range(-calls, 0)]], np.ones_like(pushed), see) if guidance else _unknown(pushed)
    return MeasuredBatch(errors, found[0], noise_rms, changes, found[1], unguided, ends[0])


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


def _reuse_moves(ends: Tensor, pushed: Array, see: See) -> tuple[Array, Array]:
    """The gains and the couplings of final latents, uncached first, that errors of these sizes led to."""
    moved = _rms(ends[1:] - ends[:1]).T
    return np.divide(moved, pushed, out=np.zeros_like(moved), where=pushed > 0), _couplings(ends, pushed, see)


def _unknown(pushed: Array) -> Array:
    return np.full((*pushed.shape, pushed.shape[1]), np.nan)


def _couplings(ends: Tensor, pushed: Array, see: See) -> Array:
    """Products of what errors do to the pictures, by the errors' sizes.

    Shapes: `ends` (T + 1, P, C, H, W), latents, uncached first; `pushed` (P, T); returns (P, T, T).
    """
    seen = [see(latents) for latents in ends]
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
