"""`export-triton`: a bundle as a model of Triton Inference Server."""

from __future__ import annotations

from typing import Annotated

import typer

from fastcache.commands.options import EnginesOption, Json, OutputFolder
from fastcache.console import print_json


def export_triton(
    engines: EnginesOption,
    output: OutputFolder,
    name: Annotated[str, typer.Option(help="The model's name, and its folder's in --output.")] = "fastcache",
    json_: Json = False,
) -> None:
    """Write a model repository for Triton Inference Server: config.pbtxt, model.py and the bundle.

    Example: fastcache export-triton --engines demo-output/engines --output repository
    """
    from fastcache.serve.cluster.triton import export_repository

    model = export_repository(engines, output, name)
    files = sorted(str(path.relative_to(output)) for path in model.rglob("*") if path.is_file())
    if json_:
        print_json({"model": str(model), "files": files})
    else:
        typer.echo(f"{model}: start Triton with --model-repository={output}")
