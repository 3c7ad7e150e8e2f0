"""What the programs behind docs/findings.md share: the model, what is asked of it, and where plans and results lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import fastcache
from fastcache import CachePlan, FastCachePipeline

STEPS, SAMPLER, GUIDANCE = 50, "ddim", 4.0
FIRST_SEED = 5000  # of the held-out pictures
BATCH = 8
Work = Annotated[Path, typer.Option(help="Where the bundle and finished batches are kept.")]
Results = Annotated[Path, typer.Option(help="Where results go.")]
WORK, RESULTS = Path("build/findings"), Path("tools/results/findings")


@dataclass(frozen=True)
class Setting:
    """What fitted plans are made for: the engines' dtype, the reference's sampler, and the costs of a shallow step.

    None costs what this machine's passes take.
    """

    dtype: str = "fp32"
    sampler: str = "ddim"
    shallow: float | None = 0.1


FITTED = {"fitted": Setting(), "fitted-bf16": Setting("bf16", shallow=None), "fitted-dpm": Setting(sampler="dpm++_2m")}


def say(message: str) -> None:
    typer.echo(message, err=True)


def pipeline(work: Path, *, depths: bool = False, dtype: str = "fp32") -> FastCachePipeline:
    """The bundled model on OpenVINO, built once; with branch 2 beside branch 0, or that alone."""
    name, branches = ("depths", [0, 2]) if depths else ("engines" if dtype == "fp32" else f"engines-{dtype}", 0)
    bundle = fastcache.build_engines(
        "demo", work / name, backend="openvino", dtype=dtype, batch="1:4:16", branch_id=branches, progress=say
    )
    return FastCachePipeline(bundle)


def write_plans(file: Path, made: dict[str, CachePlan]) -> None:
    lines = ",\n".join(f'"{name}": {plan.to_json()}' for name, plan in made.items())
    file.write_text(f"{{\n{lines}\n}}\n")


def read_plans(file: Path) -> dict[str, CachePlan]:
    return {name: CachePlan.from_json(json.dumps(plan)) for name, plan in json.loads(file.read_text()).items()}
