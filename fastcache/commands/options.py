"""The flags that several commands share, and the files they name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastcache.bundle.manifest import Manifest
    from fastcache.loop.plan import CachePlan


# How much of a build is done when a stage begins: the bundled model's, in whose place a larger one's will do.
BUILD_SHARES = {
    "starting": 0.0,
    "backend": 0.09,
    "loading": 0.2,
    "exporting full": 0.26,
    "exporting a U-Net": 0.26,
    "building full": 0.8,
    "checking": 0.8,
    "exporting the text": 0.82,
    "exporting the VAE decoder": 0.86,
    "exporting the VAE encoder": 0.93,
    "making": 0.96,
    "sealing": 0.99,
}
STARTING = "starting: PyTorch and diffusers are imported, which takes some seconds"


def generate_with(engines: Path, model: str, flags: str) -> str:
    """A command that draws with a bundle, to be typed next."""
    prompt = "a large blue square at the right on a white background" if model == "demo" else "..."
    return f'fastcache generate --engines {engines} --prompt "{prompt}" {flags} --output picture.png'


def existing(folder: Path | None, flag: str = "DIR") -> Path | None:
    """Raises: `ValueError` for a folder that is not there; what is wrong with one that is, its reader says."""
    if folder is not None and not folder.exists():
        raise ValueError(
            f"expected {flag} to be a bundle's folder, got {folder}, which is not there; make one with build-engines"
        )
    return folder


def existing_of(param: typer.CallbackParam, folder: Path | None) -> Path | None:
    """As `existing`, of the flag at hand."""
    return existing(folder, param.metavar or param.opts[0])


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document, and nothing else.")]
EnginesOption = Annotated[
    Path,
    typer.Option(
        "--engines",
        envvar="FASTCACHE_ENGINES",
        help="The folder of a bundle, as build-engines makes it.",
        callback=existing_of,
    ),
]
TrustedKey = Annotated[
    Path | None,
    typer.Option(
        envvar="FASTCACHE_TRUSTED_KEY",
        help="A public key (Ed25519, PEM). A bundle that it has not signed is refused.",
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(help="ddim, pndm, euler, euler_a, dpm++_2m, unipc, heun, lms, lcm, ...; if left out the model's own."),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="How closely to follow the prompt; 1 or less switches guidance off. If left out the model's own."
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights", help="Take a preset's shape without its weights: good for timing, not for pictures."
    ),
]
Revision = Annotated[str | None, typer.Option(help="The commit, tag or branch of a model on the hub.")]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")]
Height = Annotated[int | None, typer.Option(help="Image height in pixels; the model's own if left out.")]
Width = Annotated[int | None, typer.Option(help="Image width in pixels; the model's own if left out.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. If left out, a GPU where there is one.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to draw.")]
CacheInterval = Annotated[
    int | None,
    typer.Option(
        min=1, help="Run the whole U-Net every N steps, and in the others only its shallow layers; 1 means no caching."
    ),
]
PlanFile = Annotated[Path | None, typer.Option(help="A plan file, made by `fastcache plan`, instead of an interval.")]
OutputFolder = Annotated[Path, typer.Option("--output", help="The folder to write.")]


def named(ctx: typer.Context, *parameters: str) -> list[str]:
    """Those of some parameters that stand on the command line."""
    sources = {name: ctx.get_parameter_source(name) for name in parameters}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def flags_of(*parameters: str) -> str:
    """Parameters as they are written on the command line: `--json and --plan`."""
    return " and ".join(f"--{name.replace('_', '-')}" for name in sorted(parameters))


def check_writable(*outputs: Path | None) -> None:
    """Ask before long work whether files or folders can be written; nothing is left behind.

    Raises: `ValueError` for one that cannot.
    """
    for output in filter(None, outputs):
        there = next(place for place in (output, *output.absolute().parents) if place.exists())
        try:
            with tempfile.TemporaryFile(dir=there.parent if there == output and there.is_file() else there):
                pass
        except OSError as error:
            raise ValueError(
                f"expected a place that can be written, got {output}: {error.strerror}; name another"
            ) from None


def require_blocks(manifest: Manifest, engines: Path) -> None:
    """Raises: `ValueError` for a bundle without blocks."""
    if not manifest.blocks:
        raise ValueError(f"expected a bundle of blocks, got {engines}; build one with --blocks transformer")


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
    from fastcache.files import read_lines

    prompts = [line.strip() for line in read_lines(path) if line.strip()]
    if not prompts:
        raise ValueError(f"expected a file of prompts, one a line, got {path} without any")
    return prompts


def prompts_or_own(file: Path | None, manifest: Manifest, own: Callable[[], list[str]]) -> list[str]:
    """The prompts in a file, or for the bundled model its own. Raises: `ValueError` where there is neither."""
    if file is not None:
        return read_prompts(file)
    if manifest.model.name != "demo":
        raise ValueError("expected --prompts with a model other than the bundled one, got none")
    return own()
