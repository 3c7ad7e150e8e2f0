"""What works of diffusers with fastcache, found out by running it: python tools/compatibility.py [--check]

Each row of docs/compatibility.md is a call of one of diffusers' own pipelines, of the bundled model or small random
weights. It is made by diffusers alone, under `FastCacheHelper`, and with a bundle that was built of the same model. A
row that works draws what diffusers draws where nothing is cached, and draws where something is; one that is refused
says its line. `--check` writes nothing and ends with 1 where the document is not what comes out.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import diffusers
import typer
from compatibility_cases import ARGUMENTS, CALLED, FUNCTIONS, OFFICIAL, Called
from compatibility_subjects import IMG2IMG, SD, SUBJECTS
from compatibility_trials import WORKS, Trials, outcome_of
from diffusers import callbacks
from diffusers.utils import logging
from parity_subjects import STEPS

from fastcache import FastCacheHelper
from fastcache.pipeline.request import Request
from fastcache.sampler.scheduler import SAMPLERS
from fastcache.sampler.table import SamplerTable

DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"
# What came after the first version, by the row's name; the only thing here that is not found out by running.
SINCE: dict[str, str] = {}
FIRST = "0.1.0"


@dataclass(frozen=True)
class Row:
    """A line of a table: what was tried, and what came out in each of its columns."""

    name: str
    cells: tuple[str, ...]

    def markdown(self) -> str:
        since = SINCE.get(self.name, FIRST) if WORKS in self.cells else "-"
        return f"| {' | '.join((self.name, *(_escaped(cell) for cell in self.cells), since))} |"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def schedulers(trials: Trials, say: Callable[[str], None]) -> tuple[list[Row], dict[str, str]]:
    """A row for each scheduler of diffusers that its pipeline runs, and why others have none."""
    rows, others = list[Row](), dict[str, str]()
    bundle = trials.bundle(SD)
    if isinstance(bundle, str):
        raise RuntimeError(f"expected a bundle of {SD}, got: {bundle}")
    for name in sorted(name for name in dir(diffusers) if re.fullmatch(r"(?!Flax)\w+Scheduler", name)):
        say(name)
        kind = getattr(diffusers, name)
        try:
            scheduler = kind.from_config(trials.subject(SD).pipe.scheduler.config)
        except ImportError as error:
            others[name] = " ".join(str(error).split()).partition(". ")[0]
            continue
        except (TypeError, ValueError):  # its configuration is of another kind
            scheduler = None
        found = None if scheduler is None else trials.all_three(SD, kind)
        if found is None:
            others[name] = "Stable Diffusion's pipeline in diffusers does not run with it"
            continue
        begun = trials.all_three(IMG2IMG, kind)
        names = [f"`{key}`" for key, choice in SAMPLERS.items() if choice.class_name == name]
        how = "-"
        if found[1] == WORKS:
            tabled = isinstance(bundle.schedule(scheduler, STEPS).sampler, SamplerTable)
            how = "a table" if tabled else "its own `step`"
        rows.append(
            Row(f"`{name}` {' '.join(names)}".strip(), (*found, "diffusers cannot" if begun is None else begun[1], how))
        )
    return rows, others


def pipelines(trials: Trials, say: Callable[[str], None]) -> list[Row]:
    """A row for each pipeline that is tried."""
    rows = list[Row]()
    for name in SUBJECTS:
        say(name)
        found = trials.all_three(name)
        if found is None:
            raise RuntimeError(f"expected diffusers to draw {name}, got an error")
        rows.append(Row(f"{name} (`{type(trials.subject(name).pipe).__name__}`)", found))
    return rows


def other_pipelines() -> tuple[list[str], int, str]:
    """The pipelines with a U-Net that nothing here tries; how many there are without, and what the helper says then."""
    tried = {type(make().pipe).__name__ for make in SUBJECTS.values()}
    untried, without = list[str](), 0
    for name in sorted(name for name in dir(diffusers) if re.fullmatch(r"(?!Flax|Onnx|Auto)\w+Pipeline", name)):
        kind = getattr(diffusers, name)
        parts = inspect.signature(kind.__init__).parameters
        if (
            isinstance(kind, type)
            and issubclass(kind, diffusers.DiffusionPipeline)
            and kind is not diffusers.DiffusionPipeline
        ):
            if "unet" not in parts:
                without += 1
            elif name not in tried:
                untried.append(name)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8
    )
    live = SUBJECTS[SD]().pipe
    pipe = diffusers.DiTPipeline(transformer, live.vae, live.scheduler)
    return untried, without, outcome_of(lambda: FastCacheHelper(pipe))


def calls_back(trials: Trials, say: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """A row for each callback, and the names of diffusers' own that are not tried."""
    rows = list[Row]()

    def row(name: str, case: Called) -> None:
        say(name)
        shown = {"callback_on_step_end": case.callback, "callback_on_step_end_tensor_inputs": list(case.shown)}
        found = trials.all_three(case.subject, **shown)
        if found is None:
            raise RuntimeError(f"expected diffusers to draw with {name}, got an error")
        rows.append(Row(name, found))

    for name, case in FUNCTIONS.items():
        row(f"a function that {name}", case)
    for name, case in OFFICIAL.items():
        row(f"`{name}`", case)
    known = {
        name
        for name, kind in vars(callbacks).items()
        if inspect.isclass(kind) and kind.__module__ == callbacks.__name__
    }
    return rows, sorted(known - OFFICIAL.keys() - {"PipelineCallback"})


def arguments(trials: Trials, say: Callable[[str], None]) -> tuple[list[Row], list[str], list[str], list[str]]:
    """A row for each argument; those not tried; those that diffusers itself fails at; those of a bundle alone."""
    names = dict.fromkeys(name for kind in CALLED for name in inspect.signature(kind.__call__).parameters)
    names = [name for name in dict.fromkeys((*names, "callback", "callback_steps")) if name not in ("self", "kwargs")]
    rows, failing = list[Row](), list[str]()
    for name in names:
        if name in ARGUMENTS:
            say(name)
            trial = ARGUMENTS[name]
            scheduler = None if trial.scheduler is None else getattr(diffusers, trial.scheduler)
            found = trials.all_three(trial.subject, scheduler, **{**trial.beside, name: trial.value})
            if found is None:
                failing.append(name)
                continue
            rows.append(Row(f"`{name}`", (trial.subject, *found)))
    own = [name for name in inspect.signature(Request).parameters if name not in names]
    return rows, [name for name in names if name not in ARGUMENTS], failing, own


def table(heads: tuple[str, ...], rows: list[Row]) -> str:
    lines = [f"| {' | '.join((*heads, 'since'))} |", "|" + "---|" * (len(heads) + 1)]
    return "\n".join([*lines, *(row.markdown() for row in rows)])


def listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def document(folder: Path, say: Callable[[str], None]) -> str:
    """The whole of docs/compatibility.md, from runs of everything that it names."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trials = Trials(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samplers, unrun = schedulers(trials, say)
        kinds, called = pipelines(trials, say), calls_back(trials, say)
        taken, untaken, failing, own = arguments(trials, say)
        untried, without, refusal = other_pipelines()
    reasons = dict.fromkeys(unrun.values())
    not_run = "\n".join(f"- {listed([k for k, v in unrun.items() if v == reason])}: {reason}." for reason in reasons)
    return f"""# What works with diffusers

`python tools/compatibility.py` makes this page. It runs every row on small models and writes down what came out.
It was made with diffusers {diffusers.__version__}, in fp32, on a CPU; the bundles are of ONNX Runtime.

- **works**: without a cache the picture is the one that diffusers draws. With `cache_interval=2` there is one, too.
- **refused**: nothing is drawn. The line is the error's.
- **helper**: diffusers' own pipeline under `FastCacheHelper`, in PyTorch.
- **bundle**: `fastcache.load(...)` of a bundle of the same model.
- **since**: the version of fastcache from which on it works.

## Schedulers

The model is Stable Diffusion's kind. The scheduler is set as `pipeline.scheduler`, and given to a bundle as `sampler=`.
Names in small letters are those that a bundle also takes.
A bundle runs a linear scheduler as a table of numbers, which is fast. It calls the `step` of any other one, and warns.

{table(("scheduler", "helper", "bundle", "bundle, image to image", "a bundle runs"), samplers)}

These have no row:

{not_run}

## Pipelines

{table(("pipeline", "helper", "bundle"), kinds)}

What steers a bundle is built into it: `build-engines --controlnet`, `--t2i-adapter`, `--ip-adapter`, `--lora`.
Its pictures are then `control_image`, `adapter_image` and `ip_adapter_image`.

{without} pipelines of diffusers have no U-Net. The helper says to them: {refusal.removeprefix("refused: ")}

These have one and were not tried: {listed(untried)}.

## Callbacks

They are given as `callback_on_step_end`.

{table(("callback", "helper", "bundle"), called[0])}

Not tried: {listed(called[1]) or "none"}.

## Arguments of `pipe(...)`

Under the helper it is diffusers that takes the arguments.

{table(("argument", "tried on", "helper", "bundle"), taken)}

Not tried: {listed(untaken) or "none"}. diffusers itself fails at these here, so there is nothing to compare: {
        listed(failing) or "none"
    }.

A bundle takes these besides: {listed(own)}.
"""


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; end with 1 if the document is stale.")] = False,
) -> None:
    """Write docs/compatibility.md, or see whether it is up to date.

    Example: python tools/compatibility.py --check
    """
    with tempfile.TemporaryDirectory() as folder:
        text = document(Path(folder), lambda name: print(name, file=sys.stderr))
    if not check:
        DOCUMENT.write_text(text, encoding="utf-8")
        return
    stale = differences(text)
    print("\n".join(stale) or f"{DOCUMENT} is up to date")
    raise typer.Exit(1 if stale else 0)


def differences(text: str) -> list[str]:
    """What the document would have otherwise, line by line; nothing where it is up to date."""
    there = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.is_file() else ""
    return list(
        difflib.unified_diff(there.splitlines(), text.splitlines(), str(DOCUMENT), "what comes out", lineterm="")
    )


if __name__ == "__main__":
    typer.run(main)
