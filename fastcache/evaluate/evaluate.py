"""Plans, prompts and seeds -> what each plan costs in likeness and quality and gains in time, measured side by side.

Every plan draws the same batches of pictures in turn, the uncached run among them, so that whatever else the machine
does hits all alike. Knows pictures and numbers about them; what judges a picture is handed in as functions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcache.evaluate.quality import Estimate, bootstrap, frechet_distance, mean_of
from fastcache.loop.plan import CachePlan
from fastcache.loop.scheduler import make_scheduler, own_sampler
from fastcache.pipeline.arguments import check_plan
from fastcache.pipeline.pipeline import FastCachePipeline, Run
from fastcache.pipeline.request import Request
from fastcache.pipeline.schedule import Steps, steps_for

Array = npt.NDArray[np.floating]
Judge = Callable[[Tensor, Tensor, Sequence[str]], Array]
"""Pictures, the uncached ones, both (N, 3, H, W) in [0, 1], and their prompts -> a number for each picture."""
FeaturesOf = Callable[[Tensor], Array]
"""Pictures (N, 3, H, W) in [0, 1] -> features (N, width)."""

UNCACHED = "uncached"


@dataclass(frozen=True)
class Arm:
    """A plan to draw with, and the sampler it runs with; `steps` is what the sampler is asked for."""

    name: str
    plan: CachePlan
    sampler: str
    steps: int


@dataclass(frozen=True)
class Drawn:
    """One arm's pictures of a batch, (N, 3, H, W) in [0, 1], and how long its U-Net loop took."""

    images: Tensor
    loop_ms: float


def arms_of(
    pipe: FastCachePipeline, plans: Mapping[str, CachePlan], sampler: str | None, steps: int | None
) -> list[Arm]:
    """The uncached run, with `steps` or else as many as the longest plan's sampler takes, and an arm for each plan.

    `sampler` is None for the model's own; a plan that names one runs with that.

    Raises: `ValueError` naming the plan for one of another model or branch, or that no number of steps makes.
    """
    usual = sampler or own_sampler(pipe.bundle.manifest.model.scheduler)
    arms = [_arm(pipe, name, plan, usual) for name, plan in plans.items()]
    most = steps or max(arm.steps for arm in arms)
    calls = num_calls(pipe, usual, most)
    return [Arm(UNCACHED, CachePlan.all_full(calls), usual, most), *arms]


def _arm(pipe: FastCachePipeline, name: str, plan: CachePlan, sampler: str) -> Arm:
    manifest, sampler = pipe.bundle.manifest, plan.sampler or sampler
    try:
        check_plan(plan, manifest, plan.num_steps, sampler)
        steps = steps_for(make_scheduler(sampler, manifest.model.scheduler), plan.num_steps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if steps is None:
        raise ValueError(
            f"{name}: expected a plan for as many U-Net calls as {sampler} makes, got one for {plan.num_steps}"
        )
    return Arm(name, plan, sampler, steps)


def num_calls(pipe: FastCachePipeline, sampler: str, steps: int) -> int:
    """How often a sampler calls the U-Net."""
    return len(Steps(steps).prepare(make_scheduler(sampler, pipe.bundle.manifest.model.scheduler)).timesteps)


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
    arms: Sequence[Arm],
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float,
    first: int = 0,
) -> list[Drawn]:
    """Draw one batch with every arm, beginning with arm `first`, so that over batches no arm has the better place."""
    drawn = dict[int, Drawn]()
    for k in range(len(arms)):
        index = (first + k) % len(arms)
        arm = arms[index]
        request = Request(
            prompts,
            num_inference_steps=arm.steps,
            plan=arm.plan,
            sampler=arm.sampler,
            seed=seeds,
            guidance_scale=guidance_scale,
        )
        run = pipe.begin(request, whole=True)
        latents, loop_ms = timed_loop(run)
        images: Tensor = pipe.pictures.decode(latents.clone(), "pt")
        drawn[index] = Drawn(images.float().cpu(), loop_ms)
    return [drawn[index] for index in range(len(arms))]


@dataclass
class Tally:
    """What was measured so far of one arm: a number for each picture and judge, features, and times."""

    values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    features: list[Array] = field(default_factory=list[Array])
    loop_ms: list[float] = field(default_factory=list[float])

    def add(
        self,
        drawn: Drawn,
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
class Row:
    """One arm's result. `speedup` is the uncached loop's time by this one's; `metrics` are means over the pictures."""

    arm: Arm
    loop_ms: float
    speedup: Estimate
    metrics: dict[str, Estimate]
    per_image: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        plan = self.arm.plan
        return {
            "name": self.arm.name,
            "steps": self.arm.steps,
            "sampler": self.arm.sampler,
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

    rows: list[Row]
    samples: list[Tensor]
    images: int


def evaluate(
    pipe: FastCachePipeline,
    arms: Sequence[Arm],
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
    """Draw a picture for each prompt with every arm, prompt k with seed `first_seed` + k, and judge it.

    The first arm is the reference. The first batch is drawn once more, before it counts, to warm up. With features
    and `truth`, features of true pictures, every row has its Frechet distance to these.
    """
    tallies, shown = [Tally() for _ in arms], list[Tensor]()
    most = pipe.bundle.manifest.profiles["batch"].max
    for number, (start, batch) in enumerate(_batches(prompts, most)):
        say(f"drawing pictures {start + 1} to {start + len(batch)} of {len(prompts)} with {len(arms)} plans")
        seeds = [first_seed + start + k for k in range(len(batch))]
        if number == 0:
            draw_batch(pipe, arms, batch, seeds, guidance_scale)
        drawn = draw_batch(pipe, arms, batch, seeds, guidance_scale, first=number)
        for tally, own in zip(tallies, drawn, strict=True):
            tally.add(own, drawn[0].images, batch, judges, features_of)
        if number == 0:
            shown = [own.images[:samples] for own in drawn]
    return Evaluation(summarise(arms, tallies, truth), shown, len(prompts))


def _batches(prompts: Sequence[str], size: int) -> Iterator[tuple[int, list[str]]]:
    for start in range(0, len(prompts), size):
        yield start, list(prompts[start : start + size])


def summarise(arms: Sequence[Arm], tallies: Sequence[Tally], truth: Array | None = None) -> list[Row]:
    """Means with bootstrap intervals. Times are medians over batches; pictures and batches are resampled in pairs."""
    reference = tallies[0]
    rows = list[Row]()
    for arm, tally in zip(arms, tallies, strict=True):
        metrics = {name: mean_of(np.array(values)) for name, values in tally.values.items()}
        if truth is not None and tally.features:
            metrics["frechet_distance"] = frechet_estimate(np.concatenate(tally.features), truth)
        rows.append(
            Row(arm, statistics.median(tally.loop_ms), _ratio(reference.loop_ms, tally.loop_ms), metrics, tally.values)
        )
    return rows


def _ratio(reference_ms: Sequence[float], loop_ms: Sequence[float]) -> Estimate:
    """How many times as fast: the ratio of the medians over batches that both drew."""
    ours, theirs = np.array(loop_ms), np.array(reference_ms)
    return bootstrap(lambda rows: float(np.median(theirs[rows]) / np.median(ours[rows])), len(ours))


def frechet_estimate(features: Array, truth: Array) -> Estimate:
    """The distance, and around it 1.96 standard errors: resampled pictures repeat, which alone raises a distance."""
    rng, count = np.random.default_rng(0), len(features)
    drawn = [frechet_distance(features[rng.integers(count, size=count)], truth) for _ in range(100)]
    value, error = frechet_distance(features, truth), 1.96 * float(np.std(drawn))
    return Estimate(value, value - error, value + error)


def _rounded(estimate: Estimate) -> dict[str, float]:
    return {name: round(value, 5) for name, value in vars(estimate).items()}
