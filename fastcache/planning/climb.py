"""Routes and what a route scores -> a nearer one: small changes, kept where the true fitted error falls.

A search over states goes by how near each state is to the reference, and that is not all that counts at the end. Here
every candidate is fitted and run. Pure Python: knows nothing about tensors, engines or samplers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fastcache.cut.names import FULL

Stops = tuple[tuple[int, str], ...]
"""Points of the reference, ascending, and the pass at each."""

_DRAWS: Final = 1000
_FARTHEST: Final = 3  # points that one move takes a stop along


def cost_of(stops: Stops, costs: Mapping[str, float]) -> float:
    """In full steps."""
    return sum(costs[name] for _, name in stops)


def families(calls: int, costs: Mapping[str, float], budget: float) -> list[Stops]:
    """Evenly spaced points, every one, every second or every third of them FULL, as many as the budget allows."""
    cheap, found = min(costs, key=costs.__getitem__), list[Stops]()
    for every in (1, 2, 3):
        within = [
            stops
            for count in range(1, calls + 1)
            if cost_of(stops := _even(calls, count, every, cheap), costs) <= budget + 1e-9
        ]
        found += within[-1:]
    return list(dict.fromkeys(found))


def _even(calls: int, count: int, every: int, cheap: str) -> Stops:
    return tuple((k * calls // count, FULL if k % every == 0 else cheap) for k in range(count))


def climb(
    starts: Sequence[Stops],
    calls: int,
    costs: Mapping[str, float],
    budget: float,
    score: Callable[[Stops], float],
    tries: int,
) -> list[tuple[Stops, float]]:
    """The starts and so many random changes of the best, every change kept that scores more: all, the best first."""
    rng, scores = random.Random(0), {stops: score(stops) for stops in starts}
    best = max(scores, key=scores.__getitem__)
    for _ in range(tries):
        candidate = best
        for _ in range(_DRAWS):  # changes upon changes, until one is new and within the budget
            candidate = _changed(best if rng.random() < 0.7 else candidate, calls, sorted(costs), rng)
            if candidate not in scores and cost_of(candidate, costs) <= budget + 1e-9:
                break
        else:
            break
        scores[candidate] = score(candidate)
        if scores[candidate] > scores[best]:
            best = candidate
    return sorted(scores.items(), key=lambda scored: -scored[1])


def _changed(stops: Stops, calls: int, names: Sequence[str], rng: random.Random) -> Stops:
    """One stop moved, put in, left out, or run in another pass; the first stays FULL at 0."""
    own = dict(stops)
    free = [point for point in range(1, calls) if point not in own]
    movable = list(own)[1:]
    kind = rng.choice(["move", "move", "swap", "put in", "leave out", "other pass"])
    if kind == "put in" and free:
        own[rng.choice(free)] = rng.choice(names)
    elif not movable:
        return stops
    elif kind == "move":
        point = rng.choice(movable)
        place = point + rng.choice([-1, 1]) * rng.randint(1, _FARTHEST)
        if 0 < place < calls and place not in own:
            own[place] = own.pop(point)
    elif kind == "swap" and len(movable) > 1:
        k = rng.randrange(len(movable) - 1)
        first, second = movable[k], movable[k + 1]
        own[first], own[second] = own[second], own[first]
    elif kind == "leave out":
        own.pop(rng.choice(movable))
    elif kind == "other pass":
        own[rng.choice(movable)] = rng.choice(names)
    return tuple(sorted(own.items()))
