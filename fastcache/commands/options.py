"""The flags that several commands share, and the files they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastcache.loop.plan import CachePlan

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
EnginesOption = Annotated[Path, typer.Option("--engines", help="A bundle, as build-engines makes it.")]
Sampler = Annotated[
    str | None,
    typer.Option(help="ddim, pndm, ddpm, euler, euler_a, dpm++_2m, unipc, heun, lms, lcm, ...; the model's own."),
]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance; 1 or less switches it off; the model's own.")
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="A preset's shape, for speed only.")]
OutputFolder = Annotated[Path, typer.Option("--output", help="The folder to write.")]


def read_plan(path: Path) -> CachePlan:
    """The plan in a file. Raises: `ValueError` naming the file."""
    from fastcache.loop.plan import CachePlan

    try:
        return CachePlan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a plan file, got {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, one a line, empty lines left out. Raises: `ValueError` naming the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a file of prompts, one a line, got {path}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"expected a file of prompts, one a line, got {path} without any")
    return prompts
