"""An analysis and its experiments -> report.html, which opens anywhere, its figures as PNGs, all numbers as JSON."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcache.analysis.experiments import GuidedInterval, PromptSwitch
from fastcache.analysis.measure import Analysis, change_numbers, numbers, rounded, similarity_numbers
from fastcache.analysis.probes import Probes
from fastcache.analysis.sections import Experiments, sections
from fastcache.bench.machine import environment
from fastcache.files import write_whole

SCHEMA = "fastcache.analysis/1"


def write_report(analysis: Analysis, experiments: Experiments, output: Path) -> Path:
    """Write `report.html`, `report.json`, `calibration.json` and a PNG a figure into a folder; returns the first."""
    output.mkdir(parents=True, exist_ok=True)
    result = document(analysis, experiments)
    parts = list(sections(analysis, experiments))
    for part in parts:
        if part.png is not None:
            write_whole(output / f"{part.name}.png", part.png)
    write_whole(output / "report.json", (json.dumps(result, allow_nan=False) + "\n").encode())
    write_whole(output / "calibration.json", analysis.calibration.to_json().encode())
    page = _template().render(
        title=_title(analysis),
        random_weights=analysis.subject.source.random_weights,
        conditions=_conditions(result),
        samples=result["samples"],
        parts=parts,
    )
    write_whole(output / "report.html", page.encode())
    return output / "report.html"


def document(analysis: Analysis, experiments: Experiments) -> dict[str, Any]:
    """What `report.json` holds: conditions, and every measure's mean and standard deviation over the samples."""
    settings, calibration = analysis.settings, analysis.calibration
    return {
        "schema": SCHEMA,
        "random_weights": analysis.subject.source.random_weights,
        "conditions": {
            **asdict(calibration.conditions),
            "num_calls": calibration.num_calls,
            "branch_ids": list(settings.branch_ids),
            "batch": settings.batch,
        },
        "environment": environment(torch.get_num_threads()),
        "samples": list(calibration.samples),
        **numbers(analysis),
        "switch_prompt": [_switch(switch) for switch in experiments.switches],
        "guidance_interval": [_interval(interval) for interval in experiments.intervals],
        "probes": None if experiments.probes is None else _probes(experiments.probes),
        "dit": None
        if experiments.dit is None
        else {
            "trained": experiments.dit.trained,
            "similarity": similarity_numbers(experiments.dit.recorded, experiments.dit.kinds),
            "change": change_numbers(experiments.dit.recorded, experiments.dit.kinds),
        },
    }


def _switch(switch: PromptSwitch) -> dict[str, Any]:
    followed = {name: [None, *rounded(np.nanmean(v[:, 1:], 0))] for name, v in switch.followed.items()}
    return {"at": switch.at, "followed": followed, "shows_a": switch.shows_a, "shows_b": switch.shows_b}


def _interval(interval: GuidedInterval) -> dict[str, Any]:
    psnr_db = None if np.isinf(interval.psnr_db) else interval.psnr_db  # the reference itself
    return {**asdict(interval), "psnr_db": psnr_db}


def _probes(probes: Probes) -> dict[str, Any]:
    accuracy = {a: {name: rounded(curve) for name, curve in c.items()} for a, c in probes.accuracy.items()}
    return {
        "steps": list(probes.steps),
        "accuracy": accuracy,
        "commonest_value": probes.chance,
        "pictures": probes.pictures,
    }


def _title(analysis: Analysis) -> str:
    weights = " with random weights" if analysis.subject.source.random_weights else ""
    return f"How the features of {analysis.subject.name}{weights} change"


def _conditions(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The conditions that the figures hold under, as the report's head has them."""
    conditions, machine = result["conditions"], result["environment"]
    versions = machine["versions"]
    return [
        ("model", f"{conditions['model']} (weights {conditions['weights_sha256'][:12]})"),
        ("pictures", f"{conditions['width']}x{conditions['height']}, samples: {len(result['samples'])}"),
        ("sampler", f"{conditions['sampler']}, {conditions['num_steps']} steps, {conditions['num_calls']} U-Net calls"),
        ("guidance", f"{conditions['guidance_scale']:g}"),
        ("branches", ", ".join(map(str, conditions["branch_ids"]))),
        ("machine", f"{machine['processor']}, threads: {machine['threads']}"),
        ("versions", ", ".join(f"{name} {versions[name]}" for name in ("fastcache", "torch", "diffusers"))),
        ("date", f"{machine['date']}, commit {(machine['commit'] or 'unknown')[:12]}"),
    ]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = _base64
    return environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
