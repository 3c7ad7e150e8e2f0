"""A subject, a sampler and branch ids -> one pass over each sample's trajectory, and the numbers that tell of it.

All measures are taken in the same pass: a step's full pass runs once, its features are reduced as they come, and the
shallow passes run on what is kept of them. Samples go in batches; what is kept of a batch goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.analysis.recorder import Array, FeatureMeasures, FeatureRecorder, joined
from fastcache.analysis.subject import Subject
from fastcache.analysis.taps import unet_taps
from fastcache.evaluate.evaluate import batches
from fastcache.planning.calibrate import MeasuredBatch, calibrate, sample_names
from fastcache.planning.calibration import Calibration, Conditions
from fastcache.planning.eager import EagerDenoiser
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import SamplerTable, compile_sampler

Say = Callable[[str], None]
ALIKE = 0.95  # the similarity above which DeepCache's figure 2 counts a step as alike
SIMILARITY_COLUMNS = ("feature", "all pairs", f"above {ALIKE}", "step to step", "dip", "at step")


@dataclass(frozen=True)
class AnalysisSettings:
    """What an analysis is asked to do, beside its subject."""

    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    branch_ids: tuple[int, ...] = (0,)
    batch: int = 1
    gains: bool = False


@dataclass(frozen=True, eq=False)
class Analysis:
    """What came out: e(j, s) and the gains, and the features' similarity and change by tap."""

    subject: Subject
    settings: AnalysisSettings
    calibration: Calibration
    recorded: FeatureMeasures
    kinds: dict[str, str]


def sampler_table(subject: Subject, settings: AnalysisSettings) -> SamplerTable:
    return compile_sampler(make_scheduler(settings.sampler, subject.source.scheduler), settings.steps)


def analyse(subject: Subject, settings: AnalysisSettings, say: Say) -> Analysis:
    """Measure every sample. Raises: `PartitionError` for a branch id that the U-Net does not have."""
    table = sampler_table(subject, settings)
    taps = unet_taps(subject.unet, settings.branch_ids)
    parts, records = list[MeasuredBatch](), list[FeatureMeasures]()
    for start, prompts in batches(subject.prompts, settings.batch):
        say(f"measuring samples {start + 1} to {start + len(prompts)} of {len(subject.prompts)}")
        conditioning = subject.conditioning(prompts)
        denoiser = EagerDenoiser(
            subject.unet, conditioning, len(prompts), subject.latent_size, branch_ids=settings.branch_ids
        )
        recorder = FeatureRecorder(taps, table.num_calls, len(prompts))
        seeds = range(start, start + len(prompts))
        scale = settings.guidance_scale
        parts.append(calibrate(denoiser, table, seeds, guidance_scale=scale, gains=settings.gains, watch=recorder))
        records.append(recorder.recorded())
    conditions = Conditions(
        model=subject.name,
        weights_sha256=subject.source.weights_sha256,
        sampler=settings.sampler,
        num_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        height=subject.height,
        width=subject.width,
    )
    calibration = Calibration.of(conditions, settings.branch_ids, sample_names(subject.prompts), parts)
    return Analysis(subject, settings, calibration, joined(records), {tap.name: tap.kind for tap in taps})


@dataclass(frozen=True)
class SimilarityFacts:
    """One feature's similarity in figures: means over samples, of all pairs of different steps where not said
    otherwise. The dip is the pair of adjacent steps that are least alike, named by its later step."""

    mean: float
    share_above: float
    adjacent_mean: float
    dip: float
    dip_step: int

    def row(self, name: str) -> tuple[str, ...]:
        """The cells under `SIMILARITY_COLUMNS`."""
        dip = f"{self.dip:.3f}", str(self.dip_step)
        return name, f"{self.mean:.3f}", f"{self.share_above:.0%}", f"{self.adjacent_mean:.4f}", *dip

    @classmethod
    def of(cls, similarity: Array) -> SimilarityFacts:
        """Shapes: `similarity` (N, T, T), of two steps or more."""
        mean = similarity.mean(0)
        adjacent, pairs = np.diagonal(mean, 1), np.triu_indices(len(mean), 1)
        return cls(
            mean=float(mean[pairs].mean()),
            share_above=float((similarity[:, *pairs] > ALIKE).mean()),
            adjacent_mean=float(adjacent.mean()),
            dip=float(adjacent.min()),
            dip_step=int(adjacent.argmin()) + 1,
        )


def share_alike(similarity: Array) -> Array:
    """For each step the share of all other steps that are like it. Shapes: (N, T, T) to (N, T)."""
    steps = similarity.shape[-1]
    return ((similarity > ALIKE).sum(-1) - 1) / max(1, steps - 1)


def numbers(analysis: Analysis) -> dict[str, Any]:
    """All that the report's figures are drawn from, by tap: mean and standard deviation over the samples."""
    calibration = analysis.calibration
    errors = {
        str(branch_id): spread(calibration.errors[:, b] / calibration.noise_rms[:, :, None])
        for b, branch_id in enumerate(calibration.branch_ids)
    }
    gains = spread(calibration.gains) if calibration.has_gains else None
    return {
        "similarity": similarity_numbers(analysis.recorded, analysis.kinds),
        "change": change_numbers(analysis.recorded, analysis.kinds),
        "relative_error": errors,
        "gains": gains,
    }


def similarity_numbers(recorded: FeatureMeasures, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Of each feature: its facts, the share of steps alike to each step, and all pairs."""
    return {
        name: {
            "kind": kinds[name],
            **asdict(SimilarityFacts.of(values)),
            "share_above_by_step": spread(share_alike(values)),
            "pairs": spread(values),
        }
        for name, values in recorded.similarity.items()
    }


def change_numbers(recorded: FeatureMeasures, kinds: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"kind": kinds[name], **spread(values)} for name, values in recorded.change.items()}


def spread(values: npt.ArrayLike) -> dict[str, Any]:
    """Mean and standard deviation over the first axis, as nested lists; what is not a number is None."""
    array = np.asarray(values, dtype=np.float64)
    return {"mean": rounded(array.mean(0)), "std": rounded(array.std(0))}


def rounded(array: Array) -> Any:
    """Nested lists of five significant digits, with None for nan, as JSON has it."""
    if array.ndim:
        return [rounded(part) for part in array]
    return None if np.isnan(array) else float(f"{array:.5g}")
