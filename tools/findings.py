"""Measure what docs/findings.md says of plans on the bundled model: python tools/findings.py --help

    python tools/findings.py plans    calibrate on captions of training scenes, make every plan   10 minutes on one core
    python tools/findings.py draw     draw 200 held-out scenes with each, with other seeds        70 minutes on one core
    python tools/findings.py show     print the tables, draw the charts

`draw` goes on where it was stopped: it keeps each batch that it finished.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import fastcache
from fastcache import CachePlan, FastCachePipeline, Forecast
from fastcache.study import evaluate_judges as judges
from fastcache.study.calibrate import Calibration
from fastcache.study.evaluate import Arm, arms_of, draw_batch, frechet_estimate
from fastcache.study.planning import kept_calibration, optimal_plan, threshold_plan
from fastcache.study.quality import mean_of, psnr_db_each
from fastcache.study.search import interval_costs, local_search, moved, optimal_refreshes, threshold_for

STEPS, SAMPLER, GUIDANCE = 50, "ddim", 4.0
INTERVALS = {25: 2, 17: 3, 10: 5, 5: 10}  # refreshes of 50 steps, and the uniform interval that gives them
FEWER_STEPS = (28, 21, 14, 10)  # of no less time than these, where a shallow step takes a tenth of a full one
CALIBRATION_PROMPTS = 8
FIRST_SEED = 5000  # of the held-out pictures
BATCH = 8
FORECAST = Forecast(order=1, damping=0.75, by="sigma")
CENTERS, POWERS = (5, 10, 15, 25, 35), (1.1, 1.2, 1.4, 1.6)
JUDGES = {
    "psnr_db": judges.psnr_db,
    "ssim": judges.ssim,
    "scene_right": judges.scene_right,
    "attribute_accuracy": judges.attribute_accuracy,
}

app = typer.Typer(add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="Where the bundle and finished batches are kept.")]
Results = Annotated[Path, typer.Option(help="Where results go.")]
WORK, RESULTS = Path("build/findings"), Path("tools/results/findings")


def say(message: str) -> None:
    typer.echo(message, err=True)


def pipeline(work: Path) -> FastCachePipeline:
    """The bundled model on OpenVINO, in float32, built once."""
    bundle = fastcache.build_engines("demo", work / "engines", backend="openvino", batch="1:4:16", progress=say)
    return FastCachePipeline(bundle)


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


def write_plans(file: Path, made: dict[str, CachePlan]) -> None:
    lines = ",\n".join(f'"{name}": {plan.to_json()}' for name, plan in made.items())
    file.write_text(f"{{\n{lines}\n}}\n")


def read_plans(file: Path) -> dict[str, CachePlan]:
    return {name: CachePlan.from_json(json.dumps(plan)) for name, plan in json.loads(file.read_text()).items()}


def make_plans(calibration: Calibration) -> dict[str, CachePlan]:
    """Every plan by its name: kind and number of refreshes."""
    made: dict[str, CachePlan] = {}
    errors, changes = calibration.errors[:, 0], calibration.change[0]
    couplings = calibration.couplings
    apart = couplings * np.eye(STEPS)  # as if the steps' errors were at right angles: their squares add up
    for count, interval in INTERVALS.items():
        candidates = nonuniform_candidates(interval)
        expected = [np.log(moved(errors, couplings, plan.refresh_steps)).mean() for plan in candidates]
        made[f"uniform-{count}"] = CachePlan.uniform(STEPS, interval)
        made[f"nonuniform-{count}"] = candidates[int(np.argmin(expected))]
        made[f"threshold-{count}"] = threshold_plan(calibration, 0, threshold_for(changes, count))
        made[f"optimal-{count}"] = optimal_plan(calibration, 0, count)
        steps = optimal_refreshes(interval_costs(errors, apart), count)
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

    uncached, *_ = arms_of(pipe, {"plan": plans[f"optimal-{count}"]}, SAMPLER, STEPS)
    (reference,) = draw_batch(pipe, [uncached], prompts, range(len(prompts)), GUIDANCE)

    def score(steps: tuple[int, ...]) -> float:
        arm = replace(uncached, plan=CachePlan.from_refresh_steps(STEPS, steps))
        (drawn,) = draw_batch(pipe, [arm], prompts, range(len(prompts)), GUIDANCE)
        psnr = float(psnr_db_each(drawn.images, reference.images).mean())
        say(f"{psnr:.3f} dB {steps}")
        return -psnr

    found = local_search(plans[f"optimal-{count}"].refresh_steps, STEPS, score, moves)
    file = results / "refined.json"
    made = read_plans(file) if file.is_file() else {}
    plan = replace(CachePlan.from_refresh_steps(STEPS, found), made_by=f"optimal, then {moves} moves")
    made[f"refined-{count}"] = replace(plan, model="demo", sampler=SAMPLER)
    write_plans(file, made)


def experiments(results: Path) -> dict[str, dict[str, CachePlan]]:
    """What is drawn together, and so compared at the same moments."""
    plans = read_plans(results / "plans.json")
    fewer = {f"steps-{calls}": CachePlan.all_full(calls) for calls in FEWER_STEPS}
    found = {"plans": plans, "steps": fewer, "forecast": {}}
    for count in INTERVALS:
        for kind in ("uniform", "optimal"):
            plan = plans[f"{kind}-{count}"]
            found["forecast"][f"{kind}-{count}"] = plan
            found["forecast"][f"{kind}, forecast-{count}"] = replace(plan, forecast=FORECAST)
    if (results / "refined.json").is_file():
        found["refined"] = read_plans(results / "refined.json")
    return found


@app.command("draw")
def draw_command(
    experiment: Annotated[str, typer.Option(help="plans, steps, forecast, refined, or all.")] = "all",
    images: int = 200,
    most: Annotated[int | None, typer.Option(help="Stop after so many new batches.")] = None,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Draw held-out pictures with every plan of an experiment, and write what they are like."""
    pipe, known = pipeline(work), experiments(results)
    names = list(known) if experiment == "all" else [experiment]
    prompts, left = judges.held_out_prompts(images), most
    for name in names:
        arms = arms_of(pipe, known[name], SAMPLER, STEPS)
        files = [work / name / f"{start:05d}.json" for start in range(0, images, BATCH)]
        for number, file in enumerate(files):
            if file.is_file() or left == 0:
                continue
            say(f"{name}: batch {number + 1} of {len(files)}, {len(arms)} plans")
            draw_one(pipe, arms, prompts, number, file)
            left = None if left is None else left - 1
        if all(file.is_file() for file in files):
            summarise(name, arms, files, prompts, results)


def draw_one(pipe: FastCachePipeline, arms: Sequence[Arm], prompts: Sequence[str], number: int, file: Path) -> None:
    start = number * BATCH
    batch = prompts[start : start + BATCH]
    seeds = range(FIRST_SEED + start, FIRST_SEED + start + len(batch))
    drawn = draw_batch(pipe, arms, batch, seeds, GUIDANCE, first=number)
    row = {
        arm.name: {name: judge(own.images, drawn[0].images, batch).tolist() for name, judge in JUDGES.items()}
        | {"features": judges.demo_features(own.images).round(4).tolist(), "loop_ms": own.loop_ms}
        for arm, own in zip(arms, drawn, strict=True)
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".part").write_text(json.dumps(row))
    file.with_suffix(".part").rename(file)


def summarise(name: str, arms: Sequence[Arm], files: Sequence[Path], prompts: Sequence[str], results: Path) -> None:
    """Per-picture numbers and means with intervals, of all batches."""
    batches = [json.loads(file.read_text()) for file in files]
    truth = judges.true_features(prompts)
    rows: dict[str, Any] = {}
    for arm in arms:
        own = [batch[arm.name] for batch in batches]
        values = {judge: [value for part in own for value in part[judge]] for judge in JUDGES}
        features = np.concatenate([np.array(part["features"]) for part in own])
        rows[arm.name] = {
            "refresh_steps": list(arm.plan.refresh_steps),
            "unet_calls": arm.plan.num_steps,
            "made_by": arm.plan.made_by,
            "loop_ms": float(np.median([part["loop_ms"] for part in own])),
            "means": {judge: vars(mean_of(np.array(v))) for judge, v in values.items()},
            "frechet_distance": vars(frechet_estimate(features, truth)),
            "psnr_db": [round(v, 3) for v in values["psnr_db"]],
        }
    document = {
        "conditions": {
            "model": "demo",
            "steps": STEPS,
            "sampler": SAMPLER,
            "guidance_scale": GUIDANCE,
            "images": len(prompts),
            "batch": BATCH,
            "threads": torch.get_num_threads(),
            "backend": "openvino fp32",
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
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(results.glob("drawn-*.json")):
        document = json.loads(file.read_text())
        conditions, rows = document["conditions"], document["rows"]
        name = file.stem.removeprefix("drawn-")
        typer.echo(f"\n{name}: {conditions['images']} pictures, {conditions['backend']}\n\n{table(rows)}")
        found[name] = rows
        figures.mkdir(parents=True, exist_ok=True)
        draw_chart(rows, f"{conditions['images']} held-out pictures, 95% intervals", figures / f"{name}.png")
    if {"plans", "steps"} <= found.keys():
        typer.echo(f"\nequal time\n\n{equal_time(found['plans'], found['steps'])}")


def table(rows: dict[str, Any]) -> str:
    """Markdown; each PSNR with its interval, and its gain over the uniform plan of as many refreshes, in pairs."""
    lines = ["| plan | PSNR, dB | over uniform, dB | right | Fréchet |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        psnr = "-" if name == "uncached" else interval(row["means"]["psnr_db"])
        gain = interval(over_uniform(rows, name), sign=True) if over_uniform(rows, name) else "-"
        right = f"{row['means']['scene_right']['value']:.1%}"
        lines.append(f"| {name} | {psnr} | {gain} | {right} | {interval(row['frechet_distance'])} |")
    return "\n".join(lines)


def equal_time(plans: dict[str, Any], steps: dict[str, Any]) -> str:
    """Caching against fewer steps of at least the same time, on the pictures that both drew."""
    lines = ["| caching | fewer steps | caching over fewer steps, dB |", "|---|---|---|"]
    for count, rival in zip(INTERVALS, FEWER_STEPS, strict=True):
        for kind in ("uniform", "optimal"):
            fewer = np.array(steps[f"steps-{rival}"]["psnr_db"])
            gain = mean_of(np.array(plans[f"{kind}-{count}"]["psnr_db"])[: len(fewer)] - fewer)
            lines.append(f"| {kind}-{count} | {rival} steps | {interval(vars(gain), sign=True)} |")
    return "\n".join(lines)


def over_uniform(rows: dict[str, Any], name: str) -> dict[str, float]:
    """The mean gain over the uniform plan of as many refreshes, picture by picture; nothing where there is none."""
    uniform = f"uniform-{name.rpartition('-')[2]}"
    if uniform == name or uniform not in rows:
        return {}
    return vars(mean_of(np.array(rows[name]["psnr_db"]) - np.array(rows[uniform]["psnr_db"])))


def interval(estimate: dict[str, float], *, sign: bool = False) -> str:
    form = "+.2f" if sign else ".2f"
    return f"{estimate['value']:{form}} ({estimate['low']:{form}} to {estimate['high']:{form}})"


def draw_chart(rows: dict[str, Any], title: str, path: Path) -> None:
    """PSNR, and the gain over uniform where uniform was drawn, over the U-Net calls in full, by kind of plan."""
    from matplotlib.figure import Figure

    names = [name for name in rows if name != "uncached"]
    psnr = {name: rows[name]["means"]["psnr_db"] for name in names}
    gain = {name: found for name in names if (found := over_uniform(rows, name))}
    panels = [("PSNR to the uncached picture, dB", psnr)] + [("PSNR over uniform, dB", gain)] * bool(gain)
    figure = Figure(figsize=(6 * len(panels), 4.4), layout="constrained")
    kinds = list(dict.fromkeys(name.rpartition("-")[0] for name in names))
    for axes, (label, estimates) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for k, kind in enumerate(kinds):
            own = {name: e for name, e in estimates.items() if name.rpartition("-")[0] == kind}
            middle = np.array([e["value"] for e in own.values()])
            low, high = (np.array([e[side] for e in own.values()]) for side in ("low", "high"))
            aside = 1 + 0.015 * (k - len(kinds) / 2)
            x = [aside * len(rows[name]["refresh_steps"]) for name in own]
            if own:
                bars = [middle - low, high - middle]
                axes.errorbar(x, middle, yerr=bars, fmt="-o", ms=4, capsize=2, lw=1.2, label=kind, color=f"C{k}")
        axes.set_xscale("log")
        ticks = sorted({len(rows[name]["refresh_steps"]) for name in names})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("U-Net calls in full")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    app()
