"""A bundle, prompts and a wish -> fitted plans: the best picture for a given time, or better rows for a plan at hand.

One reference run of the calibration pictures serves all. Of these pictures two thirds fit the rows, and the first few
choose the routes. The others, left out, choose among the last few plans and say what the one that is taken may be
expected to do. Knows pipelines and plans; what a row or a route is found by is the business of `fit.py` and
`routes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

import torch
from torch import Tensor

from fastcache.cut.names import FULL, shallow_pass
from fastcache.loop.fit import Fit
from fastcache.loop.fitted import Grid
from fastcache.loop.plan import CachePlan, Forecast
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.planning.beginnings import Beginnings
from fastcache.planning.blocks import pattern_costs
from fastcache.planning.climb import Stops, climb, cost_of, families
from fastcache.planning.fit import fit_rows
from fastcache.planning.routes import Route, Scope, find_routes, most_steps
from fastcache.planning.skipping import FORETOLD, skipping_rows
from fastcache.planning.walks import Walks
from fastcache.planning.ways import StepTimes
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import compile_sampler

Say = Callable[[str], None]

_SEARCHED_ON: Final = 4  # pictures: of 4x16x16 numbers each, for at most six weights a row
_MOST: Final = 240  # full steps a picture that a plan may take: reference, search, changes and the fits
_LEAST_TRIES: Final = 10  # changes of a plan
_STARTS: Final = 7  # of all searches
_FINALISTS: Final = 2  # of each search, fitted on all pictures: the few that choose routes tell plans apart to 2 dB
_ALONE: Final = 0.4  # of the changes, to plans of FULL steps alone: where only points change, less is to be found
_ANEW: Final = 0.6  # of a changed plan's calls, that its beginning does not share with one that ran
_FORECASTS: Final = (None, Forecast(by="sigma"))  # of the cached features; a line, for a square is worse (findings.md)


@dataclass(frozen=True)
class Reference:
    """The run that a fitted plan stays near: what a sampler is asked for, and the guidance."""

    sampler: str
    num_inference_steps: int
    guidance_scale: float


def costs_of(times: StepTimes) -> dict[str, float]:
    """What each pass takes, in full steps."""
    shallow = {shallow_pass(branch): ms / times.full_ms for branch, ms in times.shallow_ms.items()}
    return {FULL: 1.0, **shallow}


class Fitting:
    """Calibration pictures, their reference run, and the plans that are fitted to it.

    Raises: `ValueError` for no prompts, or a sampler that draws noise or has no table.
    """

    def __init__(
        self, pipe: FastCachePipeline, prompts: Sequence[str], reference: Reference, say: Say = lambda _: None
    ) -> None:
        if not prompts:
            raise ValueError("expected one prompt or more to fit on, got none")
        self._pipe, self.prompts, self.reference, self._say = pipe, list(prompts), reference, say
        scheduler = pipe.bundle.manifest.model.scheduler
        self.table = compile_sampler(make_scheduler(reference.sampler, scheduler), reference.num_inference_steps)
        self._prediction = str(scheduler.get("prediction_type", "epsilon"))
        self._grid = Grid.of(self.table, self._prediction)
        count = len(self.prompts)
        self._fitted = count if count < 3 else count - count // 3
        self._searched_on = min(_SEARCHED_ON, self._fitted)

    @property
    def left_out(self) -> list[str]:
        """The prompts that nothing is fitted on; all of them where there are too few to leave one out."""
        return self.prompts[self._fitted :] or self.prompts

    @property
    def images(self) -> int:
        return len(self.prompts)

    def _walks(self, first: int, end: int) -> Walks:
        return Walks(
            self._pipe,
            self.prompts[first:end],
            range(first, end),
            table=self.table,
            guidance_scale=self.reference.guidance_scale,
        )

    @cached_property
    def _all(self) -> tuple[Walks, list[Tensor]]:
        """Every picture, and its reference run."""
        self._say(f"reference: {self.table.num_calls} full steps of {len(self.prompts)} pictures")
        walks = self._walks(0, len(self.prompts))
        return walks, walks.reference()

    @cached_property
    def _wanted(self) -> Tensor:
        """The left-out pictures of the reference run."""
        return self._seen(self._all[1][-1][self._fitted :])

    def _seen(self, latents: Tensor) -> Tensor:
        """Pictures of latents, or the latents where the bundle has no decoder."""
        if "vae_decoder" not in self._pipe.bundle.manifest.engines:
            return latents
        most = self._pipe.bundle.manifest.profiles["batch"].max
        parts = [self._pipe.pictures.decode(part.float().contiguous(), "pt") for part in latents.split(most)]
        return torch.cat([part.double().cpu() for part in parts])

    def fit(self, plan: CachePlan, points: Sequence[int], full_steps: float | None = None) -> CachePlan:
        """The plan with rows fitted for these points of the reference.

        Raises: `ValueError` for a plan whose steps are not as many.
        """
        return self._fit(plan, points, full_steps)[0]

    def _fit(self, plan: CachePlan, points: Sequence[int], full_steps: float | None) -> tuple[CachePlan, float]:
        """As `fit`, and how near the left-out pictures come, in dB; the latents of all where none is left out."""
        if plan.num_steps != len(points):
            raise ValueError(f"expected a plan of {len(points)} steps, one a point, got one of {plan.num_steps}")
        walks, states = self._all
        walks.forecast(plan, points)
        fit_on = self._fitted
        adjusted = None if plan.scale_shift is None else torch.from_numpy(plan.scale_shift.table.copy())
        fitted = fit_rows(
            lambda step, x: walks.guided(
                plan.passes[step], points[step], x, step, None if adjusted is None else adjusted[step]
            ),
            states,
            self.table,
            self._prediction,
            points,
            fit_on=fit_on,
        )
        left_out = fitted.result[fit_on:]
        psnr_db = _psnr(self._seen(left_out), self._wanted) if len(left_out) else None
        if fitted.defaults:
            self._say(f"{fitted.defaults} of {len(points)} rows stay as they were: left-out pictures gain nothing")
        found = {"contrasts": fitted.contrasts, "images": fit_on, "psnr_db": psnr_db, "full_steps": full_steps}
        made = self._with_rows(plan, points, fitted.rows, **found)
        return made, _psnr(fitted.result, states[-1]) if psnr_db is None else psnr_db

    def skipping(self, calls: int, how: str) -> CachePlan:
        """A run of all the reference's steps, so many of them with a call, evenly, and the noise foretold at others.

        `how` is one of `FORETOLD`. Nothing is fitted.
        """
        points = [call * self.table.num_calls // calls for call in range(calls)]
        rows = skipping_rows(self.table, self._prediction, points, FORETOLD[how])
        plan = CachePlan((FULL,) * calls, made_by=f"skipping({how})")
        return self._with_rows(plan, points, rows, images=0)

    def _with_rows(
        self, plan: CachePlan, points: Sequence[int], rows: Sequence[tuple[float, ...]], **found: Any
    ) -> CachePlan:
        """The plan with rows for these points, and what they hold for."""
        manifest = self._pipe.bundle.manifest
        fit = Fit(
            num_inference_steps=self.reference.num_inference_steps,
            points=tuple(points),
            rows=tuple(rows),
            guidance_scale=self.reference.guidance_scale,
            height=manifest.height,
            width=manifest.width,
            weights_sha256=manifest.weights_sha256,
            backend=manifest.backend,
            dtype=manifest.dtype,
            **found,
        )
        return replace(plan, model=manifest.model.name, sampler=self.reference.sampler, fit=fit)

    def full_steps(self, costs: Mapping[str, float], scope: Scope) -> float:
        """What the reference, a search and the fits of a scope take at most, in full steps of one picture."""
        changes = sum(self._for_changes(costs, scope, budget) for budget in scope.budgets)
        starts = _STARTS * self._searched_on * sum(scope.budgets)
        return self._without_changes(costs, scope) + starts + changes

    def _without_changes(self, costs: Mapping[str, float], scope: Scope) -> float:
        searched = sum(most_steps(self.table.num_calls, own, scope.width) for own in _searches(costs))
        fitted = len(_searches(costs)) * _FINALISTS * sum(scope.budgets)
        return len(self.prompts) * (self.table.num_calls + fitted) + self._searched_on * searched

    def _for_changes(self, costs: Mapping[str, float], scope: Scope, budget: float) -> float:
        """What changes of a plan may take, in full steps of one picture."""
        left = _MOST * len(self.prompts) - self._without_changes(costs, scope) / len(scope.budgets)
        a_walk = self._searched_on * budget
        return max(_LEAST_TRIES * a_walk, left - _STARTS * a_walk)

    def routes(self, costs: Mapping[str, float], scope: Scope) -> list[list[Route]]:
        """Routes for the budgets of a scope, and cheaper ones, by what is near the reference on the way.

        Those of every pass, and those of FULL ones alone: the more time there is, the oftener these end nearer.
        """
        walks, states = self._searching
        return [find_routes(walks.guided, states, self._grid, own, scope, self._say) for own in _searches(costs)]

    @cached_property
    def _searching(self) -> tuple[Walks, list[Tensor]]:
        """The few pictures that choose, and their reference run."""
        count = self._searched_on
        return self._walks(0, count), [state[:count] for state in self._all[1]]

    @cached_property
    def _beginnings(self) -> Beginnings:
        return Beginnings(self._searching[0])

    def patterns(self) -> dict[str, float]:
        """Patterns of blocks that a plan may run as well, and what they take, in full steps."""
        return pattern_costs(self._pipe, self._searching[0])

    def best(
        self,
        routes: Sequence[Sequence[Route]],
        costs: Mapping[str, float],
        scope: Scope,
        budget: float,
        patterns: Mapping[str, float],
    ) -> CachePlan:
        """The nearest plan within a budget, of what each search found: of its routes and of even ones the best, climbed
        from; the last few fitted.

        On the way up its steps may also run `patterns`, at these costs.
        """
        left, found = self._for_changes(costs, scope, budget), list[tuple[CachePlan, float]]()
        for own, searched in zip(_searches(costs), routes, strict=True):
            within = [route for route in searched if route.full_steps <= budget + 1e-9][-2:]
            starts = [tuple(zip(route.points, route.passes, strict=True)) for route in within]
            share = 1.0 if len(routes) == 1 else _ALONE if len(own) == 1 else 1 - _ALONE
            found += self._climbed(starts, own, {**own, **patterns}, budget, share * left)
        return max(found, key=lambda one: one[1])[0]

    def _climbed(
        self,
        starts: Sequence[Stops],
        searched: Mapping[str, float],
        costs: Mapping[str, float],
        budget: float,
        full_steps: float,
    ) -> list[tuple[CachePlan, float]]:
        """The best of these starts and even ones, changed for so many full steps, fitted, and how near they end."""
        calls, tries = self.table.num_calls, full_steps / 2 / (self._searched_on * budget)
        every = [*starts, *families(calls, searched, budget)]
        self._say(f"choosing among {len(every)} plans and changes of the best for {budget:g} full steps")
        stops, score = climb(every, calls, costs, budget, self._score, round(tries / _ANEW))[0]
        reuses = any(name != FULL for _, name in stops)
        forecast = max(_FORECASTS, key=lambda one: self._score(stops, one) if one else score) if reuses else None
        more = round(tries if forecast else tries / _ANEW)
        ranked = climb([stops], calls, costs, budget, lambda own: self._score(own, forecast), more)
        found = list[tuple[CachePlan, float]]()
        for stops, _ in ranked[:_FINALISTS]:
            points, passes = zip(*stops, strict=True)
            self._say(f"fitting {len(points)} steps, {passes.count(FULL)} of them in full")
            plan = CachePlan(passes, made_by=f"budget({budget:g})", forecast=forecast)
            found.append(self._fit(plan, points, cost_of(stops, costs)))
        return found

    def _score(self, stops: Stops, forecast: Forecast | None = None) -> float:
        """How near the latents of a fitted run end, in dB."""
        walks, states = self._searching
        points, passes = zip(*stops, strict=True)
        if forecast is None:
            predict = self._beginnings.walk(stops)
        else:  # a forecast reads what several calls left
            walks.forecast(CachePlan(passes, forecast=forecast), points)
            predict = partial(_along, walks, stops)
        fitted = fit_rows(predict, states, self.table, self._prediction, points)
        return _psnr(fitted.result, states[-1])


def _along(walks: Walks, stops: Stops, step: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    point, name = stops[step]
    return walks.guided(name, point, x, step)


def _searches(costs: Mapping[str, float]) -> list[Mapping[str, float]]:
    """What each of two searches may run, and its cost; one search where there is no pass but FULL."""
    return [costs] if len(costs) == 1 else [costs, {FULL: costs[FULL]}]


def _psnr(pictures: Tensor, wanted: Tensor) -> float:
    """Mean over the pictures, in dB. Shapes: both (N, ...)."""
    missed = (pictures - wanted).square().flatten(1).mean(1)
    return float(-10 * torch.log10(missed + 1e-30).mean())
