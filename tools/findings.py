"""Measure what docs/findings.md says of plans on the bundled model: python tools/findings.py --help

    python tools/findings.py plans    calibrate on captions of training scenes, make every plan   10 minutes on one core
    python tools/findings.py choose   the same with depths and guidance to choose from            15 minutes on one core
    python tools/findings.py refine --count 5          local search, judged by true PSNR           2 minutes on one core
    python tools/findings.py fit      fitted plans, and what rivals them                          15 minutes on one core
    python tools/findings.py fit --setting fitted-int8   for other engines or samplers            5 minutes on two cores
    python tools/findings.py blocks --setting NAME     plans of blocks, scales and shifts        15 minutes on two cores
    python tools/findings.py frontier                  blocks, two engines, both, all fitted     15 minutes on two cores
    python tools/findings.py draw     draw 200 held-out scenes with each, with other seeds        two hours on one core
    python tools/findings.py show     print the tables, draw the charts

`draw` goes on where it was stopped: it keeps each batch that it finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import findings_tables as tables
import numpy as np
import torch
import typer
from findings_blocks import blocks_command, changes_command, feature_command, frontier_command, loops_command
from findings_fitted import carry_command, fit_command, time_command
from findings_setting import (
    BATCH,
    BLOCKS,
    CONVERGED,
    DTYPES,
    FIRST_SEED,
    FITTED,
    FRONTIER,
    GUIDANCE,
    RESULTS,
    SAMPLER,
    STEPS,
    WORK,
    Results,
    Setting,
    Work,
    pipeline,
    read_plans,
    say,
    write_plans,
)

from fastcache import CachePlan, FastCachePipeline, Forecast
from fastcache.evaluate import judges
from fastcache.evaluate.evaluate import Candidate, candidates_of, draw_batch
from fastcache.evaluate.quality import frechet_estimate, mean_of, psnr_db_each
from fastcache.planning.calibration import Calibration
from fastcache.planning.planning import (
    kept_calibration,
    latency_plan,
    measure_loop,
    optimal_plan,
    threshold_plan,
)
from fastcache.planning.search import Steps, moved, optimal_refreshes, threshold_for
from fastcache.planning.ways import Way, way_costs

INTERVALS = {25: 2, 17: 3, 10: 5, 5: 10}  # refreshes of 50 steps, and the uniform interval that gives them
FEWER_STEPS = (28, 21, 14, 10)  # of no less time than these, where a shallow step takes a tenth of a full one
CALIBRATION_PROMPTS = 8
FORECASTS = {
    "linear": Forecast(order=1),
    "linear, half": Forecast(order=1, damping=0.5),
    "over sigma": Forecast(order=1, by="sigma"),
    "squared over sigma": Forecast(order=2, by="sigma"),
}
# what an experiment's candidates are compared with, where that is not uniform
BASELINES = (
    {"choices": "one depth", "refined": "optimal", "steps": "uncached", "blocks-frontier": "two engines"}
    | dict.fromkeys(BLOCKS, "steps")
    | dict.fromkeys((*FITTED, "converged", "dtypes"), "uncached")
)
CHARTS = ("plans", "forecast", "steps", "fitted", "blocks-frontier")
REFRESHES = "refreshes of 50 steps, or their time"
LABELS = {"steps": "steps of the sampler"} | dict.fromkeys(("fitted", "blocks-frontier"), "time, in full steps")


SLACK = 1.002  # of a time, for what counting it in ticks rounds up
CENTERS, POWERS = (5, 10, 15, 25, 35), (1.1, 1.2, 1.4, 1.6)
JUDGES = {
    "psnr_db": judges.psnr_db,
    "ssim": judges.ssim,
    "scene_right": judges.scene_right,
    "attribute_accuracy": judges.attribute_accuracy,
}

app = typer.Typer(add_completion=False, help=__doc__)
for command in (
    *(fit_command, carry_command, time_command),
    *(blocks_command, loops_command, changes_command, feature_command, frontier_command),
):
    app.command(command.__name__.removesuffix("_command"))(command)


@app.command("plans")
def plans_command(work: Work = WORK, results: Results = RESULTS) -> None:
    """Calibrate on training captions and write every plan that is compared."""
    pipe = pipeline(work)
    prompts = judges.calibration_prompts(CALIBRATION_PROMPTS)
    calibration = kept_calibration(pipe, prompts, sampler=SAMPLER, num_steps=STEPS, guidance_scale=GUIDANCE, say=say)
    made = make_plans(calibration)
    results.mkdir(parents=True, exist_ok=True)
    (results / "calibration.json").write_text(calibration.to_json())
    write_plans(results / "plans.json", made)


def make_plans(calibration: Calibration) -> dict[str, CachePlan]:
    """Every plan by its name: kind and number of refreshes."""
    made: dict[str, CachePlan] = {}
    errors, changes = calibration.errors[:, 0], calibration.change[0]
    couplings = calibration.couplings
    # as if the steps' errors were at right angles: their squares add up
    apart = replace(calibration, couplings=couplings * np.eye(STEPS))
    for count, interval in INTERVALS.items():
        candidates = nonuniform_candidates(interval)
        expected = [np.log(moved(errors, couplings, plan.refresh_steps)).mean() for plan in candidates]
        made[f"uniform-{count}"] = CachePlan.uniform(STEPS, interval)
        made[f"nonuniform-{count}"] = candidates[int(np.argmin(expected))]
        made[f"threshold-{count}"] = threshold_plan(calibration, 0, threshold_for(changes, count))
        made[f"optimal-{count}"] = optimal_plan(calibration, 0, count)
        steps = optimal_refreshes(way_costs(apart, Way((0,))), count)
        plan = CachePlan.from_refresh_steps(STEPS, steps)
        made[f"squares-{count}"] = replace(plan, made_by="optimal for the sum of squares")
    return {name: replace(plan, model="demo", sampler=SAMPLER) for name, plan in made.items()}


def nonuniform_candidates(interval: int) -> list[CachePlan]:
    """Schedules of a small set of centres and powers, each different one once."""
    found: dict[tuple[int | None, ...], CachePlan] = {}
    for center in CENTERS:
        for power in POWERS:
            try:
                plan = CachePlan.nonuniform(STEPS, interval, center, power)
            except ValueError:  # no power gives that many distinct steps around this centre
                continue
            found.setdefault(plan.branches, plan)
    return list(found.values())


@app.command("choose")
def choose_command(work: Work = WORK, results: Results = RESULTS) -> None:
    """Plans that choose depths and guidance in the time that K refreshes at branch 0 take; writes choices.json.

    A kind that chose what a simpler one did is left out.
    """
    pipe = pipeline(work, "depths")
    calibration = kept_calibration(
        pipe,
        judges.calibration_prompts(CALIBRATION_PROMPTS),
        sampler=SAMPLER,
        num_steps=STEPS,
        guidance_scale=GUIDANCE,
        guidance=True,
        say=say,
    )
    times = measure_loop(pipe, SAMPLER, STEPS, GUIDANCE, guidance=True)
    say(f"{times}")
    one_depth = replace(times, shallow_ms={0: times.shallow_ms[0]})
    made: dict[str, CachePlan] = {}
    for count, interval in INTERVALS.items():
        most_ms = SLACK * times.loop_ms(CachePlan.uniform(STEPS, interval))
        own = {
            "one depth": latency_plan(calibration, one_depth, most_ms),
            "depths": latency_plan(calibration, times, most_ms),
            "guidance": latency_plan(calibration, one_depth, most_ms, guidance=True),
            "depths and guidance": latency_plan(calibration, times, most_ms, guidance=True),
        }
        chosen = {plan: kind for kind, plan in reversed(own.items())}  # of kinds that chose the same the first
        made |= {f"{kind}-{count}": plan for plan, kind in reversed(chosen.items())}
    write_plans(results / "choices.json", made)


@app.command("refine")
def refine_command(
    count: Annotated[int, typer.Option(help="How many refreshes.")],
    moves: int = 40,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Local search from the optimal plan, judged by true PSNR on the calibration prompts; writes refined.json."""
    pipe, plans = pipeline(work), read_plans(results / "plans.json")
    prompts = judges.calibration_prompts(CALIBRATION_PROMPTS)

    uncached, *_ = candidates_of(pipe, {"plan": plans[f"optimal-{count}"]}, SAMPLER, STEPS)
    (reference,) = draw_batch(pipe, [uncached], prompts, [*range(len(prompts))], GUIDANCE)

    def score(steps: tuple[int, ...]) -> float:
        candidate = replace(uncached, plan=CachePlan.from_refresh_steps(STEPS, steps))
        (drawn,) = draw_batch(pipe, [candidate], prompts, [*range(len(prompts))], GUIDANCE)
        psnr = float(psnr_db_each(drawn.images, reference.images).mean())
        say(f"{psnr:.3f} dB {steps}")
        return -psnr

    found = local_search(plans[f"optimal-{count}"].refresh_steps, STEPS, score, moves)
    if found == plans[f"optimal-{count}"].refresh_steps:
        say(f"none of {moves} moves is better at {count} refreshes")
        return
    file = results / "refined.json"
    made = read_plans(file) if file.is_file() else {}
    plan = replace(CachePlan.from_refresh_steps(STEPS, found), made_by=f"optimal, then {moves} moves")
    made[f"refined-{count}"] = replace(plan, model="demo", sampler=SAMPLER)
    write_plans(file, made)


Experiment = dict[str, dict[str, CachePlan]]  # engines -> the plans that they draw with


def experiments(results: Path) -> dict[str, Experiment]:
    """What is drawn together, and so compared at the same moments."""
    plans = read_plans(results / "plans.json")
    fewer = {f"steps-{calls}": CachePlan.all_full(calls) for calls in FEWER_STEPS}
    found = {"plans": plans, "steps": fewer, "forecast": {}}
    for count in INTERVALS:
        for kind in ("uniform", "optimal"):
            for name, forecast in FORECASTS.items():
                if kind == "uniform" or forecast.order == 1:
                    found["forecast"][f"{kind}, {name}-{count}"] = replace(plans[f"{kind}-{count}"], forecast=forecast)
    for name in ("refined", "choices", *FITTED, *BLOCKS, *FRONTIER):
        if (file := results / f"{name}.json").is_file():
            found[name] = read_plans(file)
    if "fitted" in found:
        found["converged"] = {"steps-50": CachePlan.all_full(STEPS)} | _of_kinds(found["fitted"], "fitted")
    made = {name: {setting_of(name).engines: own} for name, own in found.items()}
    if found.keys() >= {*DTYPES.values()}:
        made["dtypes"] = {engines: _of_kinds(found[name], "fitted", SAMPLER) for engines, name in DTYPES.items()}
    return made


def _of_kinds(plans: Mapping[str, CachePlan], *kinds: str) -> dict[str, CachePlan]:
    return {name: plan for name, plan in plans.items() if name.rpartition("-")[0] in kinds}


def setting_of(name: str) -> Setting:
    """What an experiment is drawn with."""
    return (FITTED | BLOCKS | FRONTIER).get(name, Setting("depths" if name == "choices" else "fp32"))


@app.command("draw")
def draw_command(
    experiment: Annotated[str, typer.Option(help="plans, steps, forecast, fitted, dtypes, ..., or all.")] = "all",
    images: int = 200,
    most: Annotated[int | None, typer.Option(help="Stop after so many new batches.")] = None,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Draw held-out pictures with every plan of an experiment, and write what they are like."""
    known = experiments(results)
    if experiment not in ("all", *known):
        raise typer.BadParameter(
            f"expected all or one of {', '.join(known)}, got {experiment!r}; plans for others have to be made first"
        )
    prompts, left = judges.held_out_prompts(images), most
    for name in list(known) if experiment == "all" else [experiment]:
        sampler, steps = setting_of(name).sampler, CONVERGED if name == "converged" else setting_of(name).steps
        groups = list[Group]()
        for engines, plans in known[name].items():
            pipe, prefix = pipeline(work, engines), f"{engines} " if len(known[name]) > 1 else ""
            own = candidates_of(pipe, plans, sampler, steps)
            groups.append(Group(pipe, [replace(one, name=prefix + one.name) for one in own]))
        files = [work / name / f"{start:05d}.json" for start in range(0, images, BATCH)]
        candidates = [one for group in groups for one in group.candidates]
        for number, file in enumerate(files):
            if file.is_file() or left == 0:
                continue
            say(f"{name}: batch {number + 1} of {len(files)}, {len(candidates)} plans")
            draw_one(groups, prompts, number, file)
            left = None if left is None else left - 1
        if all(file.is_file() for file in files):
            summarise(name, ", ".join(known[name]), candidates, files, prompts, results)


@dataclass(frozen=True)
class Group:
    """What is drawn with one bundle."""

    pipe: FastCachePipeline
    candidates: Sequence[Candidate]


def draw_one(groups: Sequence[Group], prompts: Sequence[str], number: int, file: Path) -> None:
    """Draw a batch with every plan of every bundle; what it is like is by the first bundle's uncached run."""
    start = number * BATCH
    batch = prompts[start : start + BATCH]
    seeds = [*range(FIRST_SEED + start, FIRST_SEED + start + len(batch))]
    drawn = [draw_batch(own.pipe, own.candidates, batch, seeds, GUIDANCE, first=number) for own in groups]
    truth = drawn[0][0].images
    row = {
        candidate.name: {name: judge(one.images, truth, batch).tolist() for name, judge in JUDGES.items()}
        | {"features": judges.demo_features(one.images).round(4).tolist(), "loop_ms": one.loop_ms}
        for own, ones in zip(groups, drawn, strict=True)
        for candidate, one in zip(own.candidates, ones, strict=True)
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".part").write_text(json.dumps(row))
    file.with_suffix(".part").rename(file)


def summarise(
    name: str,
    engines: str,
    candidates: Sequence[Candidate],
    files: Sequence[Path],
    prompts: Sequence[str],
    results: Path,
) -> None:
    """Per-picture numbers and means with intervals, of all batches."""
    batches = [json.loads(file.read_text()) for file in files]
    truth = judges.true_features(prompts)
    rows: dict[str, Any] = {}
    for candidate in candidates:
        own = [batch[candidate.name] for batch in batches]
        values = {judge: [value for part in own for value in part[judge]] for judge in JUDGES}
        features = np.concatenate([np.array(part["features"]) for part in own])
        rows[candidate.name] = {
            "refresh_steps": list(candidate.plan.refresh_steps),
            "unet_calls": candidate.plan.num_steps,
            "made_by": candidate.plan.made_by,
            "loop_ms": float(np.median([part["loop_ms"] for part in own])),
            "means": {judge: vars(mean_of(np.array(v))) for judge, v in values.items()},
            "frechet_distance": vars(frechet_estimate(features, truth)),
            "psnr_db": [round(v, 3) for v in values["psnr_db"]],
        }
    document = {
        "conditions": {
            "model": "demo",
            "steps": candidates[0].steps,
            "sampler": setting_of(name).sampler,
            "guidance_scale": GUIDANCE,
            "images": len(prompts),
            "batch": BATCH,
            "threads": torch.get_num_threads(),
            "backend": f"openvino {engines}",
            "intervals": "95%, bootstrap over pictures",
        },
        "rows": rows,
    }
    (results / f"drawn-{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    say(f"{results}/drawn-{name}.json written")


@app.command("show")
def show_command(
    results: Results = RESULTS, figures: Annotated[Path, typer.Option(help="Where charts go.")] = Path("docs/figures")
) -> None:
    """Print the tables of docs/findings.md and draw its charts, from the results that are there."""
    files = {file.stem.removeprefix("drawn-"): file for file in sorted(results.glob("drawn-*.json"))}
    documents = {name: json.loads(file.read_text()) for name, file in files.items()}
    plans = documents["plans"]["rows"]
    figures.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        conditions, rows = document["conditions"], document["rows"]
        baseline = BASELINES.get(name, "uniform")
        baselines = plans | rows
        typer.echo(f"\n{name}: {conditions['images']} pictures, {conditions['backend']}\n")
        typer.echo(tables.table(rows, baselines, baseline))
        if any(tables.gain_over(rows, candidate, baselines, baseline) for candidate in rows):
            typer.echo(f"\n{tables.gains(rows, baselines, baseline)}")
        title = f"{conditions['images']} held-out pictures, 95% intervals"
        if name == "fitted":
            rows = rows | reused_in_time(plans | documents.get("forecast", {"rows": {}})["rows"])
        if name == "dtypes":
            tables.draw_times(rows, BATCH, title, figures / f"{name}.png")
        if name in CHARTS:
            tables.draw_chart(rows, baselines, baseline, title, figures / f"{name}.png", LABELS.get(name, REFRESHES))
    if "steps" in documents:
        cached = {name: plans[name] for name in plans if name.partition("-")[0] in ("uniform", "optimal")}
        cached |= documents.get("forecast", {"rows": {}})["rows"]
        pairs = list(zip(INTERVALS, FEWER_STEPS, strict=True))
        typer.echo(f"\nequal time\n\n{tables.equal_time(cached, documents['steps']['rows'], pairs)}")


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


def reused_in_time(rows: tables.Rows) -> tables.Rows:
    """Plans of 50 steps under the time they take, in full steps, where a shallow one takes a tenth."""
    kinds = {"uniform": "DeepCache 1:N", "optimal, over sigma": "optimal, forecast"}
    times = {count: round(count + (STEPS - count) / 10) for count in INTERVALS}
    return {f"{kinds[kind]}-{times[k]}": rows[f"{kind}-{k}"] for kind in kinds for k in times if f"{kind}-{k}" in rows}


if __name__ == "__main__":
    app()
