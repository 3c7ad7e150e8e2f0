"""What this machine's GPU makes of fastcache: python tools/gpu_check.py plan

`plan` prints what a quarter of an hour on a rented card runs, and the commands; `carry` gathers what that card lacks,
for it has no network. `check` runs the steps there, or with `--device cpu` on a small model as a rehearsal. Each step
has a process and a limit of its own, and its result is on disk at once: the same command goes on where the last one
stopped (`pieces.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import gpu_carry
import platformdirs
import torch
import typer
from gpu_plan import (
    CALL_S,
    SIZES,
    START_S,
    WHOLE_S,
    Subject,
    calls,
    check_command,
    further,
    quarter_hour,
    seconds,
    targets,
)
from gpu_steps import run_step
from gpu_task import ROOT, Task, say
from pieces import Board, Piece, end_with_parent, run_pieces

from fastcache.bench.arms import parse_dtype
from fastcache.bench.kernels import KernelResult, kernel_table
from fastcache.bench.machine import commit, environment, gpus
from fastcache.console import figure, print_table
from fastcache.files import write_json

LEAST_S = 30.0  # before anything is measured, Python, torch and diffusers are loaded twice
CARRIED = "build/gpu-carry"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Minutes = Annotated[float, typer.Option(min=0.5, help="Stop after so long; the next call goes on from there.")]
Output = Annotated[Path, typer.Option(help="The JSON file, written after each step; the log lies beside it.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds.")]


@app.command()
def plan() -> None:
    """Print what a quarter of an hour on a rented card runs, in order, with each step's limit, and the commands.

    Example: python tools/gpu_check.py plan
    """
    groups = calls(quarter_hour(Subject()))
    rows = [
        [str(number), piece.name, f"{piece.limit_s:.0f}"] for number, group in enumerate(groups, 1) for piece in group
    ]
    print_table("steps on the card", ["call", "step", "at most s"], rows)
    whole = sum(map(seconds, groups)) + START_S * len(groups)
    typer.echo(f"{whole:.0f} s of {WHOLE_S}, with {START_S} s for each call's start; a call takes at most {CALL_S} s.")
    typer.echo(
        "Once: python tools/gpu_check.py carry. Each call brings its portions and begins with the lines it prints."
    )
    for number, group in enumerate(groups, 1):
        # All but the last go on with the next one's steps, where theirs took less than they might.
        left_s = seconds(group) if number == len(groups) else CALL_S - START_S
        typer.echo(f"call {number}: {check_command(known_commit(None), CARRIED, left_s)}")
    typer.echo(f"Between calls: copy the gpu-check.json that came back into {CARRIED}, and bring that along.")


@app.command()
def carry(
    folder: Annotated[Path, typer.Option(help="Where the portions go; git must ignore it.")] = ROOT / CARRIED,
    also: Annotated[str, typer.Option("--with", help="Further packages, by commas, as onnxruntime-gpu==1.28.0.")] = "",
    most_mib: Annotated[int, typer.Option(min=1, help="What travels in a call, the checkout included.")] = 64,
) -> None:
    """Gather the wheels that the card lacks, in portions that travel with the checkout, and print a line for each call.

    Example: python tools/gpu_check.py carry
    """
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    try:
        packages = gpu_carry.missing(gpu_carry.WANTED)
        for text in filter(None, also.split(",")):
            name, _, version = text.partition("==")
            if not version:
                raise ValueError(f"expected NAME==VERSION in --with, got {text}; name the version")
            packages[name] = version
        gpu_carry.download(packages, wheels)
        checkout = gpu_carry.checkout_bytes(ROOT)
        room = most_mib * 2**20 - checkout - gpu_carry.LEFT_BYTES
        made = gpu_carry.pack(sorted(wheels.iterdir()), folder, room)
    except (ValueError, RuntimeError) as error:
        say(f"error: {error}")
        raise typer.Exit(2) from None
    size = sum(file.stat().st_size for file in wheels.iterdir())
    typer.echo(
        f"{len(packages)} packages, {size / 2**20:.1f} MiB, in portions: {len(made)}, beside a checkout of "
        f"{checkout / 2**20:.1f} MiB: {', '.join(f'{name} {version}' for name, version in packages.items())}"
    )
    for number, portion in enumerate(made, 1):
        place = portion.relative_to(ROOT) if portion.is_relative_to(ROOT) else portion
        typer.echo(f"portion {number}: bring {place}, and run: {gpu_carry.bring_command(place, number == len(made))}")


@app.command()
def check(
    minutes: Minutes = 9.5,
    output: Output = ROOT / "build" / "gpu-check.json",
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cpu for a rehearsal.")] = "cuda",
    model: Annotated[str, typer.Option(help="A preset, or a folder: whose loop is timed.")] = "sd15",
    small: Annotated[str, typer.Option(help="demo, or a folder: what draws whole pictures.")] = "demo",
    backend: Annotated[str, typer.Option(help="Whose engines take part.")] = "inductor",
    dtype: Annotated[str | None, typer.Option(help="fp16 on a GPU and fp32 elsewhere if left out.")] = None,
    size: Annotated[int, typer.Option(help="The model's picture, in pixels.")] = 512,
    small_size: Annotated[int, typer.Option(help="The small model's.")] = 64,
    steps: Steps = 50,
    repeats: Repeats = 3,
    commit: Annotated[str | None, typer.Option(help="What the results are of, where there is no history.")] = None,
    before: Annotated[Path | None, typer.Option(help="Results of an earlier call, to go on from.")] = None,
    only: Annotated[str, typer.Option(help="These steps alone, by commas.")] = "",
    more: Annotated[str, typer.Option(help="And all backends on these models, by commas: sd15, sdxl.")] = "",
) -> None:
    """Run the steps of `plan` that have no result yet, in order.

    Example: python tools/gpu_check.py check --minutes 9.5 --output build/gpu-check.json
    """
    if device == "cuda" and not torch.cuda.is_available():
        say("error: expected a CUDA GPU that this build of PyTorch sees, got none; run this on a machine with one")
        raise typer.Exit(3)
    own = parse_dtype(dtype or ("fp16" if device == "cuda" else "fp32"))
    subject = Subject(device, model, small, backend, own, size, small_size, steps, repeats)
    work = chosen(quarter_hour(subject) + further(subject, models_of(more)), only)
    if before is not None and before.is_file() and not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(before, output)
    board = new_board(output, known_commit(commit))
    run_pieces(Path(__file__), work, board, minutes, LEAST_S, say)
    board.result["environment"]["gpus"]["after"] = gpus()
    board.save()
    found = {piece.name: board.result["pieces"][piece.name] for piece in work}
    show_check(found)
    raise typer.Exit(4 if any(has_failed(one, device) for one in found.values()) else 0)


@app.command(hidden=True)
def piece(description: str, answer: Path, folder: Path) -> None:
    """Do one step of the commands above, and write its answer."""
    end_with_parent()
    task = Task.from_json(json.loads(description))
    bundles = platformdirs.user_cache_path("fastcache") / "engines" if task.keeps else folder / "engines"
    write_json(answer, run_step(task, bundles))


def has_failed(found: dict[str, Any], device: str) -> bool:
    """Whether a step ended badly, or its tests did; on a GPU also where not one of them ran."""
    nothing_ran = device == "cuda" and found.get("passed") == 0
    return bool(found.get("failed") or found.get("errors") or found.get("log")) or nothing_ran


def models_of(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in SIZES]:
        raise typer.BadParameter(f"expected models out of {', '.join(SIZES)}, got {', '.join(unknown)}")
    return names


def chosen(work: Sequence[Piece], only: str) -> list[Piece]:
    """The steps named, or all."""
    names = [name for name in only.split(",") if name]
    known = [piece.name for piece in work]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"expected steps out of {', '.join(known)}, got {', '.join(unknown)}")
    return [piece for piece in work if not names or piece.name in names]


def known_commit(given: str | None) -> str:
    """What results are of: a result without it is nobody's."""
    found = given or commit()
    if found is None:
        raise typer.BadParameter(
            "expected --commit where the checkout came without its history, got none; `plan` says it"
        )
    return found


def new_board(output: Path, commit: str | None) -> Board:
    machine = environment(torch.get_num_threads())
    return Board(output, machine | {"commit": commit, "gpus": {"before": gpus()}})


def show_check(pieces: dict[str, Any]) -> None:
    """The benchmarks as one table, the kernels, the loops, the tests, what was skipped, and what was aimed at."""
    keys = ("loop_ms_p50", "full_step_ms_p50", "shallow_step_ms_p50", "overhead_ms_per_step")
    rows = [
        [
            name,
            arm["name"],
            *(figure(arm.get(key), ".2f") for key in keys),
            figure(arm.get("speedup_vs_eager"), ".2f", "x"),
        ]
        for name, found in pieces.items()
        for arm in found.get("arms", [])
        if "skipped" not in arm
    ]
    if rows:
        print_table("milliseconds", ["step", "arm", "loop", "full", "shallow", "rest", "x eager"], rows)
    timed = pieces.get("kernels", {})
    if "kernels" in timed:
        print_table(*kernel_table(timed["settings"], [KernelResult(**row) for row in timed["kernels"]]))
    if rows := pieces.get("loop", {}).get("rows"):
        columns = [name for name in rows[0] if name != "steps"]
        told = [[str(row[name]).replace("_", " ") for name in columns] for row in rows]
        print_table("the loop alone, microseconds a step", [name.replace("_", " ") for name in columns], told)
    for name, found in pieces.items():
        if "passed" in found:
            counts = f"{found['passed']} passed, {len(found['failed'])} failed, {len(found['errors'])} errors"
            typer.echo(f"{name}: {counts}, {found['left_out']} left out {' '.join(found['failed'] + found['errors'])}")
        for loop in found.get("loops", []):
            typer.echo(f"{name}: {json.dumps(loop)}")
        if "start_s" in found:
            typer.echo(f"{name}: {json.dumps({key: value for key, value in found.items() if key.endswith('_s')})}")
    show_skipped(pieces)
    for line in targets(pieces):
        typer.echo(line)


def show_skipped(pieces: dict[str, Any]) -> None:
    for name, found in pieces.items():
        if "skipped" in found:
            typer.echo(f"{name}: skipped, {found['skipped']}")
        for arm in found.get("arms", []):
            if "skipped" in arm:
                typer.echo(f"{name}, {arm['name']}: skipped, {arm['skipped']}")


if __name__ == "__main__":
    app()
