"""Block Caching for docs/findings.md: plans of blocks with every repair, and blocks beside two engines on one frontier.

Commands of `findings.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from findings_fitted import BUDGETS
from findings_setting import (
    BLOCKS,
    FIRST_SEED,
    FRONTIER,
    GUIDANCE,
    RESULTS,
    SAMPLER,
    WORK,
    Results,
    Work,
    pipeline,
    read_plans,
    say,
    write_plans,
)
from torch import Tensor
from train_scale_shift import Training, line, train

from fastcache import CachePlan, FastCachePipeline
from fastcache.cut.names import FULL, pattern_of
from fastcache.demo import MODEL_DIRECTORY
from fastcache.evaluate import judges
from fastcache.evaluate.evaluate import candidates_of, draw_batch
from fastcache.evaluate.quality import mean_of, psnr_db_each, ratio_of_medians
from fastcache.planning.blocks import (
    block_plan,
    block_times,
    changes_of_rows,
    channel_fit,
    measured_changes,
    with_scale_shift,
)
from fastcache.planning.calibration import Array
from fastcache.planning.fitting import Fitting, Reference
from fastcache.planning.frontier import budget_plan
from fastcache.planning.planning import measure_loop
from fastcache.planning.walks import Walks
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import SamplerTable, compile_sampler

SHARE = 0.7  # of the uncached time, as 14 of 20 steps in the paper's tables
UPDATES = 800  # of a training
Setting = Annotated[str, typer.Option(help=f"One of {', '.join(BLOCKS)}.")]


def blocks_command(setting: Setting, work: Work = WORK, results: Results = RESULTS) -> None:
    """Blocks reused as they are, repaired in closed form and by training, and fewer steps; writes SETTING.json."""
    from diffusers import StableDiffusionPipeline

    own = BLOCKS[setting]
    pipe, prompts = pipeline(work, own.engines), judges.calibration_prompts(12)
    table = table_of(pipe, own.sampler, own.steps)
    walks = Walks(pipe, prompts, range(len(prompts)), table=table, guidance_scale=GUIDANCE)
    blocks, most = pipe.bundle.manifest.blocks, round(SHARE * own.steps)
    changes, shares = measured_changes(walks, blocks), block_times(pipe)
    say(f"shares of a full step by block: {', '.join(f'{share:.3f}' for share in shares)}")
    reused = within_time(pipe, own.sampler, changes, shares, most)
    closed = with_scale_shift(walks, reused, blocks)
    fewer = replace(CachePlan.all_full(most), model=reused.model, sampler=own.sampler)
    made = {f"steps-{most}": fewer, f"reused-{most}": reused, f"closed form-{most}": closed}
    write_plans(results / f"{setting}.json", made)
    live = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, safety_checker=None)
    how = Training(rounds=UPDATES // own.steps)
    made[f"trained-{most}"] = train(
        live,
        reused,
        judges.calibration_prompts(how.rounds * how.batch),
        how,
        lambda number, loss: say(line(number, loss, how)),
    )
    write_plans(results / f"{setting}.json", made)
    (results / f"{setting}-changes.json").write_text(
        json.dumps({"blocks": [block.place for block in blocks], "l1rel": changes.round(5).tolist()}) + "\n"
    )


def table_of(pipe: FastCachePipeline, sampler: str, steps: int) -> SamplerTable:
    return compile_sampler(make_scheduler(sampler, pipe.bundle.manifest.model.scheduler), steps)


def within_time(
    pipe: FastCachePipeline, sampler: str, changes: Array, shares: Sequence[float], most: float
) -> CachePlan:
    """The paper's schedule of the lowest threshold that takes no longer than so many full steps."""
    for threshold in np.geomspace(0.01, 10, 200):
        plan = block_plan(pipe.bundle.manifest, sampler, changes, float(threshold))
        if sum(cost_of(name, shares) for name in plan.passes) <= most:
            return plan
    raise ValueError(f"expected blocks that take more of a step, for no threshold takes {most} full steps or less")


def cost_of(name: str, shares: Sequence[float]) -> float:
    """What a pass takes, in full steps."""
    runs = pattern_of(name, len(shares)) or (True,) * len(shares)
    return 1 - sum(share for share, run in zip(shares, runs, strict=True) if not run)


def frontier_command(work: Work = WORK, results: Results = RESULTS) -> None:
    """Fitted plans of two engines, of blocks alone and of both, by their own times; writes blocks-frontier.json."""
    (name,) = FRONTIER
    own = FRONTIER[name]
    pipe = pipeline(work, own.engines)
    fitting = Fitting(pipe, judges.calibration_prompts(12), Reference(own.sampler, own.steps, GUIDANCE), say)
    times = measure_loop(pipe, own.sampler, own.steps, GUIDANCE)
    say(f"{times}")
    made = dict[str, CachePlan]()
    for budget in BUDGETS:
        made[f"two engines-{budget}"] = budget_plan(fitting, times, budget, say)
        made[f"blocks-{budget}"] = budget_plan(fitting, replace(times, shallow_ms={}), budget, say, blocks=True)
        made[f"both-{budget}"] = budget_plan(fitting, times, budget, say, blocks=True)
    write_plans(results / f"{name}.json", made)


def loops_command(setting: Setting, rounds: int = 8, work: Work = WORK, results: Results = RESULTS) -> None:
    """What plans of blocks take of the uncached run's time, one picture after the other in turns; SETTING-loops.json.

    For a machine with nothing else to do.
    """
    own = (BLOCKS | FRONTIER)[setting]
    pipe, plans = pipeline(work, own.engines), read_plans(results / f"{setting}.json")
    arms = candidates_of(pipe, plans, own.sampler, own.steps)
    taken = [[one.loop_ms for one in draw_batch(pipe, arms, ["a"], [0], GUIDANCE, first=k)] for k in range(rounds + 2)]
    times = np.array(taken[2:]).T  # the first two warm up
    shares = {arm.name: vars(ratio_of_medians(row, times[0])) for arm, row in zip(arms, times, strict=True)}
    say(json.dumps(shares, indent=1))
    (results / f"{setting}-loops.json").write_text(
        json.dumps({"rounds": rounds, "by_uncached": shares}, indent=1) + "\n"
    )


def changes_command(prompts: int = 16, work: Work = WORK, results: Results = RESULTS) -> None:
    """Whether blocks change smoothly, and alike over prompts and seeds, over 50 steps in full; writes changes.json."""
    pipe = pipeline(work, "blocks")
    texts = judges.held_out_prompts(prompts) * 2
    table = table_of(pipe, SAMPLER, 50)
    walks = Walks(pipe, texts, range(FIRST_SEED, FIRST_SEED + len(texts)), table=table, guidance_scale=GUIDANCE)
    rows = changes_of_rows(walks, pipe.bundle.manifest.blocks)[:, 1:]
    each = rows.reshape(*rows.shape[:2], len(texts), -1).mean(3)  # (blocks, calls, pictures)
    mean = each.mean(2)
    correlations = [np.corrcoef(each[block].T, mean[block])[-1, :-1] for block in range(len(each))]
    apart = np.abs(each[..., :prompts, None] - each[..., None, prompts:]).mean(1) / each.mean((1, 2))[:, None, None]
    same = np.eye(prompts, dtype=bool)
    found = {
        "pictures": len(texts),
        "correlation_with_mean_curve": {"median": float(np.median(correlations)), "least": float(np.min(correlations))},
        "variation_over_pictures": float(np.median(each.std(2) / mean)),
        "difference_of_curves": {
            "other seed": float(apart[:, same].mean()),
            "other prompt and seed": float(apart[:, ~same].mean()),
        },
        "correlation_with_next_call": float(np.median([np.corrcoef(one[:-1], one[1:])[0, 1] for one in mean])),
        "change_of_change": float(np.median(np.abs(np.diff(mean, axis=1)) / mean[:, 1:])),
        "sum_over_run": dict(
            zip([b.place for b in pipe.bundle.manifest.blocks], mean.sum(1).round(3).tolist(), strict=True)
        ),
    }
    say(json.dumps(found, indent=1))
    (results / "changes.json").write_text(json.dumps(found, indent=1) + "\n")


def feature_command(images: int = 32, work: Work = WORK, results: Results = RESULTS) -> None:
    """What a scale and shift gives to DeepCache's cached feature, every third step in full; writes feature.json."""
    pipe, found = pipeline(work), dict[str, Any]()
    for steps in (20, 50):
        table, plan = table_of(pipe, SAMPLER, steps), CachePlan.uniform(steps, 3)

        def walks(prompts: Sequence[str], first: int, table: SamplerTable = table) -> Walks:
            return Walks(pipe, prompts, range(first, first + len(prompts)), table=table, guidance_scale=GUIDANCE)

        rows = fitted_feature(walks(judges.calibration_prompts(12), 0), plan)
        held_out = walks(judges.held_out_prompts(images), FIRST_SEED)
        full, plain, repaired = (
            pictures(pipe, states[-1])
            for states in (held_out.reference(), reused(held_out, plan, {}), reused(held_out, plan, rows))
        )
        before, after = psnr_db_each(plain, full), psnr_db_each(repaired, full)
        found[str(steps)] = {"psnr_db": vars(mean_of(before)), "gain_db": vars(mean_of(after - before))}
        say(f"{steps} steps, every third in full: {found[str(steps)]}")
    (results / "feature.json").write_text(json.dumps({"images": images, "by_steps": found}, indent=1) + "\n")


Rows = Mapping[tuple[int, str], Tensor]  # by step and feature: a scale and a shift by channel, (2, channels)


def fitted_feature(walks: Walks, plan: CachePlan) -> Rows:
    """Least squares towards what a pass in full would store at the run's own states."""
    found = dict[tuple[int, str], Tensor]()

    def predict(step: int, x: Tensor) -> Tensor:
        if taken := walks.takes(plan.passes[step]):
            kept = walks.read(taken)
            walks.predict(FULL, step, x)
            wanted = walks.read(taken)
            found.update({(step, name): channel_fit(kept[name], wanted[name]) for name in taken})
            walks.write(kept)
        return _pass(walks, plan, found, step, x)

    walks.run(predict)
    return found


def reused(walks: Walks, plan: CachePlan, rows: Rows) -> list[Tensor]:
    """The states of a run with these scales and shifts."""
    return walks.run(lambda step, x: _pass(walks, plan, rows, step, x))


def _pass(walks: Walks, plan: CachePlan, rows: Rows, step: int, x: Tensor) -> Tensor:
    name = plan.passes[step]
    repaired = [feature for feature in walks.takes(name) if (step, feature) in rows]
    kept = walks.read(repaired) if repaired else {}
    for feature, value in kept.items():
        scale, shift = rows[step, feature][:, None, :, None, None]
        walks.write({feature: value * scale + shift})
    e = walks.predict(name, step, x)
    walks.write(kept)
    return e


def pictures(pipe: FastCachePipeline, latents: Tensor) -> Tensor:
    parts = latents.float().split(pipe.bundle.manifest.profiles["batch"].max)
    return torch.cat([pipe.pictures.decode(part.contiguous(), "pt").float() for part in parts])
