"""A bundle of blocks and calibration pictures -> when each block runs, and by what its residual is repaired elsewhere.

A block's residual is kept until the changes that a run in full shows, added up call by call, pass a threshold. The
scale and shift of what is reused are least squares, channel by channel, towards what the block would give at the state
where the run itself is; so later steps are fitted to the states that they will meet.
Source: Block Caching, arXiv 2312.03209, sections 3.2 and 3.3; there scale and shift are trained.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastcache.bundle.manifest import BlockEntry, Manifest
from fastcache.cut.names import FULL, pattern_of, pattern_pass
from fastcache.loop.adjustment import ScaleShift
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.planning.calibration import Array
from fastcache.planning.search import threshold_refreshes
from fastcache.planning.walks import Walks

_RIDGE = 1e-6  # of a channel's variance
_ROUNDS = 12


def measured_changes(walks: Walks, blocks: Sequence[BlockEntry]) -> Array:
    """How much each block's residual changes from call to call of a run in full, as the mean over rows.

    Shapes: (blocks, calls); the first call's are 0.
    """
    return changes_of_rows(walks, blocks).mean(2)


def changes_of_rows(walks: Walks, blocks: Sequence[BlockEntry]) -> Array:
    """How much each block's residual changes from call to call of a run in full, relative to itself.

    Shapes: (blocks, calls, rows), a picture's rows together; the first call's are 0. Units: L1 norms.
    Source: Block Caching, arXiv 2312.03209, equation 4 (L1rel).
    """
    names, changes = [block.residual for block in blocks], list[list[Tensor]]()
    before: dict[str, Tensor] = {}

    def predict(call: int, x: Tensor) -> Tensor:
        nonlocal before
        e, now = walks.predict(FULL, call, x), walks.read(names)
        changes.append([_change(now[name], before.get(name, now[name])) for name in names])
        before = now
        return e

    walks.run(predict)
    return torch.stack([torch.stack(call) for call in changes]).transpose(0, 1).double().cpu().numpy()


def _change(now: Tensor, before: Tensor) -> Tensor:
    moved, size = (one.abs().flatten(1).sum(1) for one in (now - before, now))
    return moved / size


def block_plan(manifest: Manifest, sampler: str, changes: Array, threshold: float) -> CachePlan:
    """Block Caching's schedule: a block runs where its changes since it last ran pass a threshold.

    Raises: `ValueError` for a threshold that is not above 0.
    """
    runs = np.zeros(changes.shape, bool)
    for block, own in enumerate(changes):
        runs[block, list(threshold_refreshes(own, threshold))] = True
    passes = tuple(pattern_pass([bool(one) for one in step]) for step in runs.T)
    return CachePlan(passes, model=manifest.model.name, sampler=sampler, made_by=f"blocks(threshold={threshold:g})")


def with_scale_shift(walks: Walks, plan: CachePlan, blocks: Sequence[BlockEntry]) -> CachePlan:
    """The plan with scales and shifts, fitted on two thirds of the pictures, kept where they help the others.

    A step that reuses costs a pass in full besides.
    """
    ends = np.cumsum([block.channels for block in blocks])
    channels = {b.residual: slice(end - b.channels, end) for b, end in zip(blocks, ends.tolist(), strict=True)}
    table = torch.tensor([1.0, 0.0])[None, :, None].repeat(plan.num_steps, 1, int(ends[-1]))

    def predict(step: int, x: Tensor) -> Tensor:
        taken = walks.takes(plan.passes[step])
        if taken:
            kept = walks.read()
            walks.predict(FULL, step, x)
            wanted = walks.read(taken)
            for name in taken:
                table[step, :, channels[name]] = channel_fit(kept[name], wanted[name])
            walks.write(kept)
        return walks.predict(plan.passes[step], step, x, scale_shift=table[step])

    walks.run(predict)
    return replace(plan, scale_shift=ScaleShift.of(table.numpy()), made_by=f"{plan.made_by}, scale and shift")


def channel_fit(reused: Tensor, wanted: Tensor) -> Tensor:
    """The scale and shift of each channel, or 1 and 0 where left-out rows gain nothing.

    Shapes: both (rows, C, H, W); returns (2, C).
    """
    kept_out = len(reused) // 3
    x, y = (one.double().transpose(0, 1).flatten(2) for one in (reused, wanted))  # (C, rows, pixels)
    own, other = (slice(kept_out, None), slice(None, kept_out)) if kept_out else (slice(None), slice(None))
    x_mean, y_mean = (one[:, own].mean((1, 2), keepdim=True) for one in (x, y))
    apart = x[:, own] - x_mean
    variance = apart.square().mean((1, 2), keepdim=True)
    together = (apart * (y[:, own] - y_mean)).mean((1, 2), keepdim=True)
    scale = (together + _RIDGE * variance) / (variance * (1 + _RIDGE) + 1e-20)
    shift = y_mean - scale * x_mean
    gains = _missed(scale * x + shift, y, other) < _missed(x, y, other)
    unchanged = torch.tensor([1.0, 0.0])[:, None].expand(2, len(x))
    fitted = torch.stack([scale[:, 0, 0], shift[:, 0, 0]]).float()
    return fitted if bool(gains) else unchanged


def _missed(found: Tensor, wanted: Tensor, rows: slice) -> Tensor:
    return (found - wanted)[:, rows].square().mean()


def share_reused(plan: CachePlan, blocks: int) -> float:
    """How much of a plan's blocks, over all its steps, is reused."""
    runs = [pattern_of(name, blocks) or (True,) * blocks for name in plan.passes]
    return 1 - sum(map(sum, runs)) / (blocks * len(runs))


def pattern_costs(pipe: FastCachePipeline, walks: Walks) -> dict[str, float]:
    """Patterns that a plan may choose from, and what each takes of a pass in full.

    They reuse a quarter, half, three quarters and all of the blocks, those first that change least for their time.
    """
    blocks = pipe.bundle.manifest.blocks
    shares = block_times(pipe)
    change = measured_changes(walks, blocks).mean(1)
    order = sorted(range(len(blocks)), key=lambda block: change[block] / shares[block])
    found = dict[str, float]()
    for count in dict.fromkeys(max(1, len(blocks) * quarters // 4) for quarters in (1, 2, 3, 4)):
        reused = set(order[:count])
        name = pattern_pass([block not in reused for block in range(len(blocks))])
        found[name] = 1 - sum(shares[block] for block in reused)
    return found


def block_times(pipe: FastCachePipeline) -> list[float]:
    """What each block takes of a pass in full: what all do together, divided as their multiply-adds are.

    A pass in full and one without blocks take turns on the bundle's usual batch; medians.
    """
    manifest = pipe.bundle.manifest
    lane = pipe.runtime.lane(images=manifest.profiles["batch"].opt, guided=not manifest.model.unconditional)
    work = [block.multiply_adds or 1 for block in manifest.blocks]  # evenly, where nobody counted
    calls, shares = (lane.call(FULL), lane.call(pattern_pass([False] * len(work)))), list[float]()
    for number in range(_ROUNDS):
        marks = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        full, without = (end - start for start, end in pairwise(marks))
        if number:  # the first round warms up
            shares.append(1 - without / full)
    return [statistics.median(shares) * own / sum(work) for own in work]
