"""Fitted plans for docs/findings.md: make them, see how far their rows carry, and what rows take at run time.

Commands of `findings.py`.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Annotated, Any

import findings_tables as tables
import numpy as np
import typer
from findings_setting import (
    BATCH,
    FIRST_SEED,
    FITTED,
    GUIDANCE,
    RESULTS,
    SAMPLER,
    STEPS,
    WORK,
    Results,
    Work,
    pipeline,
    read_plans,
    say,
    write_plans,
)

import fastcache
from fastcache import CachePlan, FastCachePipeline
from fastcache.evaluate import judges
from fastcache.evaluate.evaluate import Candidate, draw_batch, num_calls
from fastcache.evaluate.quality import mean_of, psnr_db_each, ratio_of_medians
from fastcache.loop.fitted import default_rows
from fastcache.planning.fitting import Fitting, Reference
from fastcache.planning.frontier import budget_plan
from fastcache.planning.planning import measure_loop
from fastcache.planning.skipping import FORETOLD
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import compile_sampler

BUDGETS = (7, 10, 14, 21)  # in full steps
CARRIED = ("fitted-10", "fitted-14")


def fit_command(
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(FITTED)}.")] = "fitted",
    images: Annotated[int, typer.Option(help="Calibration pictures.")] = 20,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Fitted plans for 7, 10, 14 and 21 full steps, and rivals of as long; writes SETTING.json."""
    own = FITTED[setting]
    pipe = pipeline(work, own.engines)
    fitting = Fitting(pipe, judges.calibration_prompts(images), Reference(own.sampler, own.steps, GUIDANCE), say)
    times = measure_loop(pipe, own.sampler, own.steps, GUIDANCE)
    if own.shallow is not None:
        times = replace(times, shallow_ms={0: own.shallow * times.full_ms})
    say(f"{times}")
    made = dict[str, CachePlan]()
    for budget in BUDGETS:
        start = time.perf_counter()
        made[f"fitted-{budget}"] = budget_plan(fitting, times, budget, say)
        say(f"planning for {budget} full steps took {time.perf_counter() - start:.0f} s")
        rivals = {own.sampler: None}
        if setting == "fitted":
            made |= {f"skip {how}-{budget}": fitting.skipping(budget, how) for how in FORETOLD}
            rivals = dict.fromkeys(("ddim", "dpm++_2m", "unipc", "euler"))
        for sampler in rivals:
            calls = num_calls(pipe.bundle.manifest, sampler, budget)
            made[f"{sampler}-{budget}"] = replace(CachePlan.all_full(calls), model="demo", sampler=sampler)
    if own.steps > STEPS:
        made[f"{own.sampler}-{STEPS}"] = replace(CachePlan.all_full(STEPS), model="demo", sampler=own.sampler)
    write_plans(results / f"{setting}.json", made)


def carry_command(images: int = 32, work: Work = WORK, results: Results = RESULTS) -> None:
    """How far rows carry that were fitted at guidance 4 and 64x64: gain over default rows; writes carry.json."""
    plans = {name: plan for name, plan in read_plans(results / "fitted.json").items() if name in CARRIED}
    ways = {f"guidance {scale:g}": {"guidance_scale": scale} for scale in (1.5, 2.0, 3.0, 4.0, 5.5, 8.0, 12.0)}
    ways |= {"negative prompt": {"negative_prompt": "a small blue ring"}, "96x96": {"height": 96, "width": 96}}
    pipe = FastCachePipeline(
        fastcache.build_engines(
            "demo",
            work / "sizes",
            backend="openvino",
            dtype="fp32",
            sizes=("64x64", "96x96"),
            batch="1:4:16",
            progress=say,
        )
    )
    reference = compile_sampler(make_scheduler(SAMPLER, pipe.bundle.manifest.model.scheduler), STEPS)
    found: dict[str, Any] = {}
    for way, own in ways.items():
        gains: dict[str, list[float]] = {name: [] for name in plans}
        for start in range(0, images, BATCH):
            common: dict[str, Any] = {
                "prompt": judges.held_out_prompts(images)[start : start + BATCH],
                "seed": [*range(FIRST_SEED + start, FIRST_SEED + min(start + BATCH, images))],
                "guidance_scale": GUIDANCE,
                "output_type": "pt",
            }
            full = pipe(**(common | own), num_inference_steps=STEPS, sampler=SAMPLER).images
            for name, plan in plans.items():
                if (fit := plan.fit) is None:
                    continue
                fit = replace(fit, height=own.get("height", 64), width=own.get("width", 64))
                plain = replace(fit, rows=tuple(default_rows(reference, "v_prediction", fit.points)), contrasts=())
                pair = replace(plan, fit=fit), replace(plan, fit=plain, forecast=None)
                fitted, default = (psnr_db_each(pipe(**(common | own), plan=one).images, full) for one in pair)
                gains[name] += (fitted - default).tolist()
        found[way] = {name: vars(mean_of(np.array(own))) for name, own in gains.items()}
        say(
            f"{way}: " + "; ".join(f"{name} {tables.interval(gain, sign=True)} dB" for name, gain in found[way].items())
        )
    (results / "carry.json").write_text(json.dumps({"images": images, "gains_db": found}, indent=1) + "\n")


def time_command(rounds: int = 40, work: Work = WORK, results: Results = RESULTS) -> None:
    """What fitted rows take at run time: loops of fitted plans by those of the same plans with default rows."""
    pipe = pipeline(work)
    reference = compile_sampler(make_scheduler(SAMPLER, pipe.bundle.manifest.model.scheduler), STEPS)
    for name, plan in read_plans(results / "fitted.json").items():
        if plan.fit is None or not name.startswith("fitted"):
            continue
        rows = tuple(default_rows(reference, "v_prediction", plan.fit.points))
        plans = [replace(plan, fit=replace(plan.fit, rows=rows, contrasts=())), plan]
        arms = [Candidate(str(k), one, SAMPLER, STEPS) for k, one in enumerate(plans)]
        taken = [[own.loop_ms for own in draw_batch(pipe, arms, ["a"], [0], GUIDANCE, first=k)] for k in range(rounds)]
        plain, fitted = np.array(taken[2:]).T
        ratio = ratio_of_medians(fitted, plain)
        say(f"{name}: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) of the time with default rows")
