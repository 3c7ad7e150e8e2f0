"""What `plan` does for --budget, --max-latency-ms, --fit and --frontier: measure, choose, fit, and tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastcache.commands.options import prompts_or_own, require_blocks
from fastcache.console import figure, print_json, print_table, progress

if TYPE_CHECKING:
    from fastcache.loop.plan import CachePlan
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.planning.fitting import Fitting, Reference
    from fastcache.planning.ways import StepTimes

Say = Callable[[str], None]

_CALIBRATED_ON = 4  # pictures, for the rivals that reuse by a calibration


def fitted(
    engines: Path, branches: Sequence[int], flags: Mapping[str, Any], made: CachePlan | None = None
) -> tuple[CachePlan, dict[str, Any]]:
    """The plan that was made, its rows fitted, or the best one for a budget, a time or a frontier, and what to say."""
    from fastcache.bundle.bundle import open_bundle
    from fastcache.evaluate.judges import calibration_prompts
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.planning.fitting import Fitting, Reference
    from fastcache.planning.frontier import budget_plan

    with progress() as say:
        pipe = FastCachePipeline(open_bundle(engines))
        manifest, most = pipe.bundle.manifest, flags["calibration_images"]
        usual, wanted = manifest.model.defaults.guidance_scale, flags["guidance_scale"]
        sampler, steps = (flags[f"reference_{name}"] or flags[name] for name in ("sampler", "steps"))
        reference = Reference(sampler, steps, usual if wanted is None else wanted)
        file = None if flags["prompts"] is None else Path(flags["prompts"])
        prompts = prompts_or_own(file, manifest, lambda: calibration_prompts(most))[:most]
        fitting = Fitting(pipe, prompts, reference, say)
        if made is not None:
            found = fitting.fit(made, spread(made.num_steps, fitting.table.num_calls))
            return found, said(found)
        blocks: bool = flags["blocks"]
        if blocks:
            require_blocks(manifest, engines)
        times = _times(pipe, reference, branches, say)
        if flags["frontier"] is not None:
            return write_frontier(pipe, fitting, reference, times, Path(flags["frontier"]), say, blocks=blocks)
        budget, latency_ms = flags["budget"], flags["max_latency_ms"]
        if latency_ms is not None and not latency_ms >= times.full_ms:
            raise ValueError(
                f"expected --max-latency-ms of {times.full_ms:.1f} or more, which one step takes at batch "
                f"{times.batch} on this machine, got {latency_ms:g}; allow more time"
            )
        most = budget if latency_ms is None else latency_ms / times.full_ms
        found = budget_plan(fitting, times, most, say, blocks=blocks)
        return found, said(found, pipe, times)


def spread(steps: int, calls: int) -> list[int]:
    """Steps evenly over a reference's calls. Raises: `ValueError` for more steps than calls."""
    if steps > calls:
        raise ValueError(f"expected --reference-steps that make {steps} U-Net calls or more, as the plan, got {calls}")
    return [step * calls // steps for step in range(steps)]


def said(found: CachePlan, pipe: FastCachePipeline | None = None, times: StepTimes | None = None) -> dict[str, Any]:
    """What a fitted plan was made from, and may be expected to do."""
    fit = found.fit
    if fit is None:
        return {}
    told: dict[str, Any] = {"calibration_samples": fit.images, "points": list(fit.points)}
    if fit.psnr_db is not None:
        told["expected_psnr_db"] = round(fit.psnr_db, 2)
    if times is None or pipe is None or fit.full_steps is None:
        return told
    manifest = pipe.bundle.manifest
    return told | {
        "full_steps": round(fit.full_steps, 2),
        "expected_loop_ms": round(fit.full_steps * times.full_ms, 1),
        "full_step_ms": round(times.full_ms, 3),
        "shallow_step_ms": {str(branch): round(ms, 3) for branch, ms in times.shallow_ms.items()},
        "timed_at": f"batch {times.batch}, {manifest.backend} {manifest.dtype} on {manifest.device}",
    }


def write_frontier(
    pipe: FastCachePipeline,
    fitting: Fitting,
    reference: Reference,
    times: StepTimes,
    folder: Path,
    say: Say,
    *,
    blocks: bool = False,
) -> tuple[CachePlan, dict[str, Any]]:
    """draft.json, standard.json and fine.json in a folder, and how they and their rivals do on left-out prompts."""
    from fastcache.evaluate.chart import draw_frontier
    from fastcache.evaluate.evaluate import Candidate, evaluate
    from fastcache.evaluate.judges import psnr_db
    from fastcache.files import write_json, write_whole
    from fastcache.planning.frontier import QUALITIES, quality_plans, rivals
    from fastcache.planning.planning import kept_calibration

    folder.mkdir(parents=True, exist_ok=True)
    plans = quality_plans(fitting, times, say, blocks=blocks)
    for name, plan in plans.items():
        write_whole(folder / f"{name}.json", (plan.to_json() + "\n").encode())
    sampler, steps = reference.sampler, reference.num_inference_steps
    budgets = [share * fitting.table.num_calls for share in QUALITIES.values()]
    calibration = kept_calibration(
        pipe,
        fitting.prompts[:_CALIBRATED_ON],
        sampler=sampler,
        num_steps=steps,
        guidance_scale=reference.guidance_scale,
        say=say,
    )
    arms = rivals(pipe, fitting, budgets, times, calibration)
    arms += [Candidate(name, plan, sampler, steps) for name, plan in plans.items()]
    left_out = fitting.left_out
    found = evaluate(
        pipe,
        arms,
        left_out,
        judges={"psnr_db": psnr_db},
        first_seed=fitting.images,  # none of those that were fitted on
        guidance_scale=reference.guidance_scale,
        say=say,
    )
    manifest = pipe.bundle.manifest
    result: dict[str, Any] = {
        "schema": "fastcache.frontier/1",
        "reference": vars(reference) | {"unet_calls": fitting.table.num_calls},
        "model": manifest.model.name,
        "bundle_sha256": manifest.bundle_sha256,
        "images": len(left_out),
        "full_step_ms": round(times.full_ms, 3),
        "shallow_step_ms": {str(branch): round(ms, 3) for branch, ms in times.shallow_ms.items()},
        "rows": [row.to_json() for row in found.rows],
    }
    write_json(folder / "frontier.json", result)
    title = f"{manifest.model.name}, {len(left_out)} pictures, {manifest.backend} {manifest.dtype} on {manifest.device}"
    draw_frontier(found.rows, title, folder / "frontier.png")
    return plans["fine"], result


def show_frontier(result: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    print_table(
        f"PSNR to the uncached picture, {result['images']} left-out pictures",
        ["plan", "U-Net calls", "in full", "loop", "speed", "PSNR"],
        [
            [
                row["name"],
                str(row["unet_calls"]),
                str(row["refreshes"]),
                figure(row["loop_ms"], ".0f", " ms"),
                figure(row["speedup"]["value"], ".2f", "x"),
                figure(row["metrics"]["psnr_db"]["value"], ".1f", " dB"),
            ]
            for row in sorted(result["rows"], key=lambda row: -row["loop_ms"])
        ],
    )
    typer.echo(f"plans: draft.json, standard.json and fine.json in {folder}\nchart: {folder / 'frontier.png'}")


def _times(pipe: FastCachePipeline, reference: Reference, branches: Sequence[int] | None, say: Say) -> StepTimes:
    from fastcache.planning.planning import measure_loop

    say("timing full and shallow steps")
    steps = reference.num_inference_steps
    return measure_loop(pipe, reference.sampler, steps, reference.guidance_scale, branches, repeats=3)
