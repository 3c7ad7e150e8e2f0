"""What the programs behind docs/findings.md share: the model, what is asked of it, and where plans and results lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
    """What plans are made for: the engines, the reference run, and the costs of a shallow step.

    None costs what this machine's passes take. `engines` are those of `pipeline`.
    """

    engines: str = "fp32"
    sampler: str = "ddim"
    shallow: float | None = 0.1
    steps: int = STEPS


CONVERGED = 150  # steps of a run that more steps change no more
FITTED = {
    "fitted": Setting(),
    "fitted-bf16": Setting("bf16", shallow=None),
    "fitted-int8": Setting("int8", shallow=None),
    "fitted-dpm": Setting(sampler="dpm++_2m"),
    "fitted-converged": Setting(steps=CONVERGED),
}
DTYPES = {"fp32": "fitted", "bf16": "fitted-bf16", "int8": "fitted-int8"}  # engines, and the plans made for them
BLOCKS = {
    f"blocks-{short}-{steps}": Setting("blocks", sampler, None, steps)
    for short, sampler in (("ddim", "ddim"), ("dpm", "dpm++_2m"))
    for steps in (20, 50)
}
FRONTIER = {"blocks-frontier": Setting("blocks", shallow=None)}
_ENGINES = {
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "int8": {"dtype": "bf16", "quantize": "int8"},
    "depths": {"branch_id": [0, 2]},
    "blocks": {"blocks": "transformer"},
}


def say(message: str) -> None:
    typer.echo(message, err=True)


def pipeline(work: Path, engines: str = "fp32") -> FastCachePipeline:
    """The bundled model on OpenVINO, built once: in bf16, in 8 bits, with branch 2 beside branch 0, or with blocks."""
    folder = work / ("engines" if engines == "fp32" else engines)
    fields: dict[str, Any] = {"backend": "openvino", "dtype": "fp32", "batch": "1:4:16"} | _ENGINES[engines]
    return FastCachePipeline(fastcache.build_engines("demo", folder, **fields, progress=say))


def write_plans(file: Path, made: dict[str, CachePlan]) -> None:
    lines = ",\n".join(f'"{name}": {plan.to_json()}' for name, plan in made.items())
    file.write_text(f"{{\n{lines}\n}}\n")


def read_plans(file: Path) -> dict[str, CachePlan]:
    return {name: CachePlan.from_json(json.dumps(plan)) for name, plan in json.loads(file.read_text()).items()}
