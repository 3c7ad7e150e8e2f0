"""What shallow steps do to the picture, and how long steps take -> which steps refresh, and at which depth others run.

A plan is cut at its refreshes into intervals. What an interval does is known beforehand (`interval_costs`), so the best
plan is found exactly by dynamic programming over intervals; what intervals do to each other is not, and `descend` takes
it into account afterwards. Pure Python and numpy: knows nothing about tensors, engines or samplers, and `calibrate.py`
measures the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Choice = int | None  # a depth's index, or None for a step in full
Steps = tuple[int, ...]


def interval_costs(errors: Array, couplings: Array) -> Array:
    """How far an interval alone moves the picture: mean square, for a refresh at s and the next one at r.

    An error at step j moves the final picture in proportion, and movements add up as vectors, whose products the
    couplings are: so the cost is the sum of e(j, s) e(k, s) couplings[j, k] over the steps j, k between s and r.

    Shapes: `errors` (N, T, T), [n, j, s]; `couplings` (N, T, T); returns (T, T + 1), [s, r], infinite where r <= s.
    Raises: `ValueError` for errors or couplings that are no numbers.
    """
    samples, num_steps, _ = errors.shape
    below = np.tril_indices(num_steps, -1)
    if not (np.isfinite(errors[:, *below]).all() and np.isfinite(couplings).all()):
        raise ValueError("expected an error for every step and every earlier refresh, and couplings, got inf or nan")
    costs = np.full((num_steps, num_steps + 1), np.inf)
    for s in range(num_steps):
        so_far = np.zeros(samples)
        costs[s, s + 1] = 0
        for r in range(s + 2, num_steps + 1):
            own, before = errors[:, r - 1, s], errors[:, s + 1 : r - 1, s]
            across = (couplings[:, r - 1, s + 1 : r - 1] * before).sum(1)
            so_far = so_far + own * (2 * across + own * couplings[:, r - 1, r - 1])
            costs[s, r] = so_far.mean()
    return costs


def optimal_refreshes(costs: Array, refreshes: int) -> Steps:
    """The refresh steps, 0 among them, whose intervals cost least together, of all choices of as many.

    Shapes: `costs` (T, T + 1), as `interval_costs` gives them.
    Raises: `ValueError` for more refreshes than steps or fewer than one.
    """
    num_steps = len(costs)
    if not 1 <= refreshes <= num_steps:
        raise ValueError(f"expected 1 to {num_steps} refreshes of {num_steps} steps, got {refreshes}")
    choices = _cheapest(costs[None], 1, [0], refreshes, spend_all=True)
    return tuple(step for step, choice in enumerate(choices) if choice is None)


def optimal_choices(costs: Array, full_price: int, prices: Sequence[int], budget: int) -> tuple[Choice, ...]:
    """For each step None (in full) or the depth of its interval, at least cost within a budget of time.

    Prices and budget are whole numbers of one unit of time, a shallow step's price one for each depth.
    Shapes: `costs` (depths, T, T + 1).
    Raises: `ValueError` where even the cheapest choice passes the budget.
    """
    least = full_price + (costs.shape[1] - 1) * min([full_price, *prices])
    if least > budget:
        raise ValueError(f"expected a budget of at least {least}, the price of the cheapest plan, got {budget}")
    return _cheapest(costs, full_price, prices, budget, spend_all=False)


def _cheapest(
    costs: Array, full_price: int, prices: Sequence[int], budget: int, *, spend_all: bool
) -> tuple[Choice, ...]:
    """Dynamic programming: `total[r, q]` is the least cost of all steps before r at price q, where r refreshes next."""
    depths, num_steps, _ = costs.shape
    total = np.full((num_steps + 1, budget + 1), np.inf)
    total[0, 0] = 0
    came_from = np.zeros((num_steps + 1, budget + 1, 2), np.int32)  # the refresh before, and its interval's depth
    for r in range(1, num_steps + 1):
        for s in range(r):
            for depth in range(depths):
                price = full_price + (r - s - 1) * prices[depth]
                if price > budget:
                    continue
                candidate = np.full(budget + 1, np.inf)
                candidate[price:] = total[s, : budget + 1 - price] + costs[depth, s, r]
                better = candidate < total[r]
                total[r, better], came_from[r, better] = candidate[better], (s, depth)
    q = budget if spend_all else int(total[num_steps].argmin())
    choices: list[Choice] = []
    r = num_steps
    while r > 0:
        s, depth = map(int, came_from[r, q])
        choices[:0] = [None, *[depth] * (r - s - 1)]
        q -= full_price + (r - s - 1) * prices[depth]
        r = s
    return tuple(choices)


def moved(errors: Array, couplings: Array, refreshes: Sequence[int]) -> Array:
    """How far a whole plan moves each sample's picture, mean square, its intervals' effects on each other included.

    Shapes: `errors` (N, T, T), `couplings` (N, T, T); returns (N,).
    """
    num_steps = errors.shape[1]
    source = np.maximum.accumulate([step if step in refreshes else 0 for step in range(num_steps)])
    own = errors[:, np.arange(num_steps), source]
    own[:, list(refreshes)] = 0
    return np.einsum("nj,njk,nk->n", own, couplings, own)


def descend(refreshes: Sequence[int], num_steps: int, score: Callable[[Steps], float]) -> Steps:
    """Move one refresh at a time to where the score falls most, until no move lowers it; the first stays at 0."""
    best = tuple(refreshes)
    least = score(best)
    while True:
        free = [step for step in range(1, num_steps) if step not in best]
        moves = [tuple(sorted({*best, step} - {gone})) for gone in best[1:] for step in free]
        scores = [score(candidate) for candidate in moves]
        if not scores or min(scores) >= least:
            return best
        least = min(scores)
        best = moves[scores.index(least)]


def threshold_refreshes(changes: Sequence[float] | Array, threshold: float) -> Steps:
    """A refresh wherever the change since the last one, added up step by step, would pass the threshold.

    `changes[j]` is the relative change of the feature from step j - 1 to step j; `changes[0]` is ignored.
    Raises: `ValueError` for a threshold that is not above 0.
    Source: Block Caching, arXiv 2312.03209, section 3.2.
    """
    if not threshold > 0:
        raise ValueError(f"expected a threshold above 0, got {threshold}")
    refreshes, gathered = [0], 0.0
    for step in range(1, len(changes)):
        gathered += float(changes[step])
        if gathered > threshold:
            refreshes.append(step)
            gathered = 0.0
    return tuple(refreshes)


def threshold_for(changes: Sequence[float] | Array, refreshes: int) -> float:
    """A threshold that gives as many refreshes as asked for, or the nearest number above it that one gives.

    Raises: `ValueError` for fewer than one refresh or more than there are steps.
    """
    if not 1 <= refreshes <= len(changes):
        raise ValueError(f"expected 1 to {len(changes)} refreshes, got {refreshes}")
    low, high = 0.0, float(np.sum(changes[1:])) + 1.0  # the upper end gives one refresh
    for _ in range(60):
        middle = (low + high) / 2
        if len(threshold_refreshes(changes, middle)) > refreshes:
            low = middle
        else:
            high = middle
    # the count falls as the threshold grows, but may pass over some numbers
    return high if len(threshold_refreshes(changes, high)) == refreshes else low


def local_search(refreshes: Steps, num_steps: int, score: Callable[[Steps], float], moves: int, seed: int = 0) -> Steps:
    """Move a refresh at random, by a few steps or anywhere, and keep what lowers a score that is dear to compute.

    Each set of refreshes is scored once; the first refresh stays at 0.
    """
    rng = np.random.default_rng(seed)
    best = tuple(sorted(refreshes))
    scores = {best: score(best)}
    for _ in range(moves):
        candidate = _random_move(best, num_steps, rng)
        if candidate not in scores:
            scores[candidate] = score(candidate)
        if scores[candidate] < scores[best]:
            best = candidate
    return best


def _random_move(refreshes: Steps, num_steps: int, rng: np.random.Generator) -> Steps:
    free = [step for step in range(1, num_steps) if step not in refreshes]
    if len(refreshes) < 2 or not free:
        return refreshes
    gone = int(rng.choice(refreshes[1:]))
    near = [step for step in free if abs(step - gone) <= 3]
    target = int(rng.choice(near if near and rng.random() < 0.7 else free))
    return tuple(sorted({*refreshes, target} - {gone}))
