"""A reference run, its passes and what each costs -> routes over its calls: where to stop, and which pass to run there.

A beam of states moves over the reference's grid. A state stands before a FULL pass. That pass, and some chains of
shallow ones after it, are run for true; where the fitted row of each would land at every later point is then known in
closed form, without another call. Of the states that arrive at a point the nearest to the reference for its cost stays.
One search so finds routes of every cost. Knows nothing about engines, prompts or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fastcache.cut.names import FULL
from fastcache.loop.fit import MOST_LOOKED_BACK
from fastcache.loop.fitted import Grid
from fastcache.planning.fit import Past, columns

Predict = Callable[[str, int, Tensor], tuple[Tensor, Tensor | None]]
"""A pass, a reference's call and x -> the guided prediction, and what guidance added. Shapes: (N, ...)."""

_RIDGE: Final = 1e-7  # of each column's size; the search fits on few pictures and few columns, and need not choose
# Chains of shallow steps after a FULL one, by their stride on a grid of 50 calls and the most of them.
_CHAINS: Final = ((1, 4), (2, 3), (3, 2), (4, 1), (5, 1))
_LONGEST: Final = 6  # points from a step to the next, on a grid of 50


@dataclass(frozen=True)
class Route:
    """Points of a reference, the pass at each, their cost in full steps, and how near the latents end, in dB."""

    points: tuple[int, ...]
    passes: tuple[str, ...]
    full_steps: float
    decibels: float


@dataclass(frozen=True, eq=False)
class _State:
    """Where a route stands before its pass at a point. `past` is of the last calls, `x` the state there."""

    route: Route
    past: tuple[Past, ...]
    x: Tensor


@dataclass(frozen=True)
class Scope:
    """What to keep at each point, of every budget: the nearest state that has spent no more of it than each `pace`
    says. At a pace of 1 the budget is spent evenly, above it is spent early."""

    budgets: tuple[float, ...]
    paces: tuple[float, ...] = (0.85, 1.0, 1.2)

    @property
    def width(self) -> int:
        return len(self.budgets) * len(self.paces)

    @property
    def most(self) -> float:
        return max(self.budgets)


def most_steps(calls: int, costs: Mapping[str, float], width: int) -> float:
    """What a search takes of each picture at most, in full steps."""
    chained = sum(most for _, most in _CHAINS)
    return width * calls * (costs[FULL] + chained * sum(cost for name, cost in costs.items() if name != FULL))


def find_routes(
    predict: Predict,
    reference: Sequence[Tensor],
    grid: Grid,
    costs: Mapping[str, float],
    scope: Scope,
    say: Callable[[str], None] = lambda _: None,
) -> list[Route]:
    """Routes from the first call to the end, cheapest first, each nearer than all cheaper ones.

    `costs` are of the passes, in full steps, FULL's among them.

    Shapes: `reference` (calls + 1) states of (N, ...).
    """
    calls = len(reference) - 1
    waiting: dict[int, list[_State]] = {point: [] for point in range(calls + 1)}
    waiting[0] = [_State(Route((), (), 0.0, math.inf), (), reference[0])]
    for point in range(calls):
        kept = _thinned(waiting.pop(point), scope, point / calls)
        say(f"searching: point {point + 1} of {calls}, {len(kept)} routes")
        for state in kept:
            for arrival, end in _arrivals(predict, reference, grid, costs, state, point):
                if arrival.route.full_steps <= scope.most:
                    waiting[end].append(arrival)
    return [state.route for state in _front(waiting[calls])]


def _arrivals(
    predict: Predict,
    reference: Sequence[Tensor],
    grid: Grid,
    costs: Mapping[str, float],
    state: _State,
    point: int,
) -> Iterator[tuple[_State, int]]:
    """Everywhere that a state gets to before the next FULL pass."""
    calls = len(reference) - 1
    scale = max(1, round(calls / 50))

    def landings(state: _State, at: int) -> list[tuple[_State, int]]:
        ends = range(at + 1, min(at + scale * _LONGEST, calls) + 1)
        return list(_landings(reference, grid, state, ends))

    fresh = _called(state, predict(FULL, point, state.x), FULL, point, costs[FULL])
    found = landings(fresh, point)
    yield from found
    for name in (name for name in costs if name != FULL):
        for stride, most in _CHAINS:
            before, at = found, point
            for _ in range(most):
                following = at + stride * scale
                arrived = [state for state, end in before if end == following and end < calls]
                if not arrived:
                    break
                own = _called(arrived[0], predict(name, following, arrived[0].x), name, following, costs[name])
                before, at = landings(own, following), following
                yield from before


def _called(state: _State, found: tuple[Tensor, Tensor | None], name: str, point: int, cost: float) -> _State:
    route, (e, added) = state.route, found
    own = (state.x, e) if added is None else (state.x, e, added)
    grown = Route((*route.points, point), (*route.passes, name), route.full_steps + cost, route.decibels)
    return _State(grown, (*state.past[1 - MOST_LOOKED_BACK :], own), state.x)


def _landings(
    reference: Sequence[Tensor], grid: Grid, state: _State, ends: Sequence[int]
) -> Iterator[tuple[_State, int]]:
    """Where the fitted rows take a state, all of whose pictures count in the fit, by one regression for all ends."""
    if not ends:
        return
    points, (x, e, *_) = state.route.points, state.past[-1]
    raw = torch.stack([part for call in state.past for part in call], -1)
    design = raw @ columns(grid, points[-len(state.past) :], state.past)[-1]
    flat = design.flatten(0, -2)
    weighed = [grid.transfer(points[-1], end) for end in ends]
    defaults = torch.stack([of_x * x + of_e * e for of_x, of_e in weighed], -1)
    wanted = torch.stack([reference[end] for end in ends], -1)
    normal = flat.T @ flat
    normal.diagonal().mul_(1 + _RIDGE)
    weights = torch.linalg.solve(normal, flat.T @ (wanted - defaults).flatten(0, -2))
    landed = defaults + design @ weights
    missed = (landed - wanted).square().flatten(1, -2).mean(1)
    decibels = (-10 * torch.log10(missed + 1e-30)).mean(0).tolist()
    for k, end in enumerate(ends):
        route = Route(points, state.route.passes, state.route.full_steps, decibels[k])
        yield _State(route, state.past, landed[..., k].contiguous()), end


def _thinned(states: Sequence[_State], scope: Scope, share: float) -> list[_State]:
    """The states of a front to go on with, after this share of the reference's calls."""
    front = _front(states)
    kept = dict[int, _State]()
    for budget in scope.budgets:
        for pace in scope.paces:
            spent = min(budget, 1 + (budget - 1) * share * pace)
            within = [state for state in front if state.route.full_steps <= spent + 1e-9]
            if within:
                kept[id(within[-1])] = within[-1]  # of a front the dearest is the nearest
    return list(kept.values())


def _front(states: Sequence[_State]) -> list[_State]:
    """Those that nothing as cheap beats, cheapest first."""
    found, best = list[_State](), -math.inf
    for state in sorted(states, key=lambda one: (one.route.full_steps, -one.route.decibels)):
        if state.route.decibels > best:
            found.append(state)
            best = state.route.decibels
    return found
