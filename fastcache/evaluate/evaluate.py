"""Plans, prompts and seeds -> what each plan costs in likeness and quality and gains in time, measured side by side.

Every plan draws the same batches of pictures in turn, the uncached run among them, so that whatever else the machine
does hits all alike. Knows pictures and numbers about them; what judges a picture is handed in as functions.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcache.bundle.manifest import Manifest
from fastcache.evaluate.quality import Estimate, frechet_estimate, mean_of, ratio_of_medians
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.arguments import check_plan
from fastcache.pipeline.pipeline import FastCachePipeline, Run
from fastcache.pipeline.request import Request
from fastcache.pipeline.schedule import Steps, steps_for
from fastcache.sampler.scheduler import make_scheduler, own_sampler

Array = npt.NDArray[np.floating]
Judge = Callable[[Tensor, Tensor, Sequence[str]], Array]
"""Pictures, the uncached ones, both (N, 3, H, W) in [0, 1], and their prompts -> a number for each picture."""
FeaturesOf = Callable[[Tensor], Array]
"""Pictures (N, 3, H, W) in [0, 1] -> features (N, width)."""

UNCACHED = "uncached"
_FEW_CALLS = 8


@dataclass(frozen=True)
class Candidate:
    """A plan to draw with, and the sampler it runs with; `steps` is what the sampler is asked for."""

    name: str
    plan: CachePlan
    sampler: str
    steps: int


@dataclass(frozen=True)
class DrawnBatch:
    """One candidate's pictures of a batch, (N, 3, H, W) in [0, 1], and how long its U-Net loop took."""

    images: Tensor
    loop_ms: float


def candidates_of(
    pipe: FastCachePipeline, plans: Mapping[str, CachePlan], sampler: str | None, steps: int | None
) -> list[Candidate]:
    """The uncached run, with `steps` or else as many as the longest plan's sampler takes, and each plan.

    `sampler` is None for the model's own; a plan that names one runs with that.

    Raises: `ValueError` naming the plan for one of another model or branch, or that no number of steps makes.
    """
    usual = sampler or own_sampler(pipe.bundle.manifest.model.scheduler)
    candidates = [_candidate(pipe, name, plan, usual) for name, plan in plans.items()]
    most = steps or max(candidate.steps for candidate in candidates)
    calls = num_calls(pipe.bundle.manifest, usual, most)
    return [Candidate(UNCACHED, CachePlan.all_full(calls), usual, most), *candidates]


def _candidate(pipe: FastCachePipeline, name: str, plan: CachePlan, sampler: str) -> Candidate:
    manifest, sampler = pipe.bundle.manifest, plan.sampler or sampler
    try:
        check_plan(plan, manifest, plan.num_steps, sampler)
        steps = (
            steps_for(make_scheduler(sampler, manifest.model.scheduler), plan.num_steps)
            if plan.fit is None
            else plan.fit.num_inference_steps
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if steps is None:
        raise ValueError(
            f"{name}: expected a plan for as many U-Net calls as {sampler} makes, got one for {plan.num_steps}"
        )
    return Candidate(name, plan, sampler, steps)


def fewer_steps(
    pipe: FastCachePipeline, candidates: Sequence[Candidate], prompts: Sequence[str], guidance_scale: float
) -> list[Candidate]:
    """Of the first candidate's run fewer steps, all in full, that take no less time than each of the others.

    That is what a plan has to be better than. Times are of one batch, drawn twice, so a step more or less is chance.
    """
    batch = list(prompts[: pipe.bundle.manifest.profiles["batch"].max])
    draw_batch(pipe, candidates, batch, list(range(len(batch))), guidance_scale)  # warms up
    drawn = draw_batch(pipe, candidates, batch, list(range(len(batch))), guidance_scale)
    uncached, found = candidates[0], dict[int, Candidate]()
    for own in drawn[1:]:
        steps = math.ceil(uncached.steps * own.loop_ms / drawn[0].loop_ms)
        if steps < uncached.steps:
            plan = CachePlan.all_full(num_calls(pipe.bundle.manifest, uncached.sampler, steps))
            found[steps] = replace(uncached, name=f"{steps} steps", plan=plan, steps=steps)
    return list(found.values())


def warn_of_few_calls(candidates: Sequence[Candidate]) -> None:
    """Say of plans of very few calls what is known of them. Source: CLIP score of SDXL with LCM, .327 to .208 at 4."""
    for candidate in candidates:
        plan = candidate.plan
        if plan.num_steps < _FEW_CALLS and len(plan.refresh_steps) < plan.num_steps:
            warnings.warn(
                f"{candidate.name} makes {plan.num_steps} U-Net calls; below {_FEW_CALLS} caching has little left to "
                "give, and costs much",
                stacklevel=2,
            )


def num_calls(manifest: Manifest, sampler: str, steps: int) -> int:
    """How often a sampler calls the U-Net."""
    return len(Steps(steps).prepare(make_scheduler(sampler, manifest.model.scheduler)).timesteps)


def timed_loop(run: Run) -> tuple[Tensor, float]:
    """Take all steps of a run that was started: its latents, and the milliseconds it took."""
    start, latents = time.perf_counter(), run.latents
    for step in run.steps:
        latents = step.latents
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)
    return latents, (time.perf_counter() - start) * 1e3


def draw_batch(
    pipe: FastCachePipeline,
    candidates: Sequence[Candidate],
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float,
    first: int = 0,
) -> list[DrawnBatch]:
    """Draw one batch with every candidate, number `first` first, so that over batches none has the better place."""
    drawn = dict[int, DrawnBatch]()
    for k in range(len(candidates)):
        index = (first + k) % len(candidates)
        candidate = candidates[index]
        request = Request(
            prompts,
            num_inference_steps=candidate.steps,
            plan=candidate.plan,
            sampler=candidate.sampler,
            seed=seeds,
            guidance_scale=guidance_scale,
        )
        run = pipe.begin(request, whole=True)
        latents, loop_ms = timed_loop(run)
        images: Tensor = pipe.pictures.decode(latents.clone(), "pt")
        drawn[index] = DrawnBatch(images.float().cpu(), loop_ms)
    return [drawn[index] for index in range(len(candidates))]


@dataclass
class Tally:
    """What was measured so far of one candidate: a number for each picture and judge, features, and times."""

    values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    features: list[Array] = field(default_factory=list[Array])
    loop_ms: list[float] = field(default_factory=list[float])

    def add(
        self,
        drawn: DrawnBatch,
        reference: Tensor,
        prompts: Sequence[str],
        judges: Mapping[str, Judge],
        look: FeaturesOf | None,
    ) -> None:
        for name, judge in judges.items():
            self.values.setdefault(name, []).extend(judge(drawn.images, reference, prompts).tolist())
        if look is not None:
            self.features.append(look(drawn.images))
        self.loop_ms.append(drawn.loop_ms)


@dataclass(frozen=True)
class Score:
    """A candidate's result: `speedup` is the uncached loop's time by its own, `metrics` are means over the pictures."""

    candidate: Candidate
    loop_ms: float
    speedup: Estimate
    metrics: dict[str, Estimate]
    per_image: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        plan = self.candidate.plan
        return {
            "name": self.candidate.name,
            "steps": self.candidate.steps,
            "sampler": self.candidate.sampler,
            "unet_calls": plan.num_steps,
            "refreshes": len(plan.refresh_steps),
            "refresh_steps": list(plan.refresh_steps),
            "made_by": plan.made_by,
            "loop_ms": round(self.loop_ms, 2),
            "speedup": _rounded(self.speedup),
            "metrics": {name: _rounded(estimate) for name, estimate in self.metrics.items()},
            "per_image": {name: [round(v, 4) for v in values] for name, values in self.per_image.items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """The rows, the uncached one first, and the first pictures of each, for a grid."""

    rows: list[Score]
    samples: list[Tensor]
    images: int


def evaluate(
    pipe: FastCachePipeline,
    candidates: Sequence[Candidate],
    prompts: Sequence[str],
    *,
    judges: Mapping[str, Judge],
    features_of: FeaturesOf | None = None,
    truth: Array | None = None,
    first_seed: int = 0,
    guidance_scale: float = 7.5,
    samples: int = 6,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Draw a picture for each prompt with every candidate, prompt k with seed `first_seed` + k, and judge it.

    The first candidate is the reference. The first batch is drawn once more, before it counts, to warm up. With
    features and `truth`, features of true pictures, every row has its Frechet distance to these.
    """
    tallies, shown = [Tally() for _ in candidates], list[Tensor]()
    most = pipe.bundle.manifest.profiles["batch"].max
    for number, (start, batch) in enumerate(batches(prompts, most)):
        say(f"drawing pictures {start + 1} to {start + len(batch)} of {len(prompts)} with {len(candidates)} plans")
        seeds = [first_seed + start + k for k in range(len(batch))]
        if number == 0:
            draw_batch(pipe, candidates, batch, seeds, guidance_scale)
        drawn = draw_batch(pipe, candidates, batch, seeds, guidance_scale, first=number)
        for tally, own in zip(tallies, drawn, strict=True):
            tally.add(own, drawn[0].images, batch, judges, features_of)
        if number == 0:
            shown = [own.images[:samples] for own in drawn]
    return Evaluation(summarise(candidates, tallies, truth), shown, len(prompts))


def batches(prompts: Sequence[str], size: int) -> Iterator[tuple[int, list[str]]]:
    """The prompts in parts of a size, and where each part starts."""
    for start in range(0, len(prompts), size):
        yield start, list(prompts[start : start + size])


def summarise(candidates: Sequence[Candidate], tallies: Sequence[Tally], truth: Array | None = None) -> list[Score]:
    """Means with bootstrap intervals. Times are medians over batches; pictures and batches are resampled in pairs."""
    reference = tallies[0]
    rows = list[Score]()
    for candidate, tally in zip(candidates, tallies, strict=True):
        metrics = {name: mean_of(np.array(values)) for name, values in tally.values.items()}
        if truth is not None and tally.features:
            metrics["frechet_distance"] = frechet_estimate(np.concatenate(tally.features), truth)
        speedup = ratio_of_medians(np.array(reference.loop_ms), np.array(tally.loop_ms))
        rows.append(Score(candidate, statistics.median(tally.loop_ms), speedup, metrics, tally.values))
    return rows


def _rounded(estimate: Estimate) -> dict[str, float]:
    return {name: round(value, 5) for name, value in vars(estimate).items()}
