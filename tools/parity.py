"""FastCacheHelper in diffusers' own pipelines, as docs/parity.md's table: python tools/parity.py [--json FILE]

Each row draws with one pipeline (`parity_pipelines.py`) in several ways and compares what comes out.
`DeepCacheSDHelper` is the least agreement with it over the settings; `all FULL` compares with the pipeline without a
helper; `shallow = full` is the largest error over all branch ids, given the feature of the same call, relative to the
largest prediction; `engines` compares the helper's engines with its torch modules at N=3, or where a bundle draws alone
(`fastcache.load`) its picture with the pipeline's, all FULL, and with the helper's at N=3, of which it is the lesser.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffusers.utils import logging
from parity_pipelines import PIPELINES
from parity_subjects import STEPS, Subject, seeded
from rich.console import Console
from torch import Tensor

import fastcache
from fastcache.bundle.parity import relative_error
from fastcache.bundle.recipe import recipe_from
from fastcache.demo import MODEL_DIRECTORY

SETTINGS = ((2, 0), (3, 0), (3, 1), (5, 3))  # cache_interval and cache_branch_id


@dataclass(frozen=True)
class Row:
    """What one pipeline shows. Agreements in dB over the range of what they are compared with, infinite where equal."""

    pipeline: str
    class_name: str
    weights: str
    deepcache_db: float | None
    deepcache_error: str | None
    all_full_db: float
    shallow_vs_full: float
    branches: int
    engines_db: float | None

    def markdown(self) -> str:
        deepcache = self.deepcache_error if self.deepcache_db is None else _db(self.deepcache_db)
        engines = "" if self.engines_db is None else _db(self.engines_db)
        shallow = "exact" if self.shallow_vs_full == 0 else f"{self.shallow_vs_full:.0e}"
        cells = [
            f"{self.pipeline} (`{self.class_name}`)",
            self.weights,
            deepcache,
            _db(self.all_full_db),
            f"{shallow} ({self.branches})",
            engines,
        ]
        return f"| {' | '.join(map(str, cells))} |"

    def to_json(self) -> dict[str, Any]:
        """With infinity, which JSON does not have, as a word."""
        return {k: "inf" if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(self).items()}


def _db(value: float) -> str:
    return "bit-exact" if math.isinf(value) else f"{value:.0f} dB"


def agreement_db(got: Tensor, expected: Tensor) -> float:
    """PSNR over the range of what is expected."""
    mse = float((got.double() - expected.double()).square().mean())
    span = float(expected.max() - expected.min())
    return math.inf if mse == 0 else 10 * math.log10(span**2 / mse)


@contextlib.contextmanager
def helped(helper: Any, interval: int = 1, branch_id: int = 0) -> Generator[None]:
    helper.set_params(cache_interval=interval, cache_branch_id=branch_id)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def measure(name: str, make: Callable[[], Subject], engines: Callable[[Subject], Path] | None = None) -> Row:
    """One pipeline's row; `engines` builds what the helper is given where the pipeline's model can be compiled."""
    subject = make()
    pipe = subject.pipe
    pipe.set_progress_bar_config(disable=True)
    with first_call(pipe) as arguments:
        plain = subject.draw()
    shallow_vs_full, branches = worst_branch(pipe.unet, arguments)
    with fastcache.FastCacheHelper(pipe):
        all_full = agreement_db(subject.draw(), plain)
    deepcache_db, deepcache_error = against_deepcache(subject, [s for s in SETTINGS if s[1] < branches])
    engines_db = None
    if engines and subject.engines:
        engines_db = against_engines(subject, engines(subject))
    elif engines and subject.bundle is not None:
        engines_db = of_bundle(subject, engines(subject), plain)
    return Row(
        name,
        type(pipe).__name__,
        subject.weights,
        deepcache_db,
        deepcache_error,
        all_full,
        shallow_vs_full,
        branches,
        engines_db,
    )


@contextlib.contextmanager
def first_call(pipe: Any) -> Generator[dict[str, Any]]:
    """The arguments of the run's first U-Net call, by name."""
    found: dict[str, Any] = {}
    signature = inspect.signature(pipe.unet.forward)

    def keep(unet: Any, args: Any, kwargs: Any) -> None:
        if not found:
            given = signature.bind(*args, **kwargs).arguments.items()
            # A list of T2I-Adapter's residuals is emptied by the U-Net.
            found.update({k: [*v] if isinstance(v, list) else v for k, v in given if v is not None})
            found.pop("return_dict", None)

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def worst_branch(unet: Any, arguments: dict[str, Any]) -> tuple[float, int]:
    """Invariant 2 of the design at every branch id, and how many there are."""
    errors: list[float] = []
    count = fastcache.partition_unet(unet).num_branches
    for branch_id in range(count):
        cut = fastcache.partition_unet(unet, branch_id)
        with torch.no_grad():
            noise_pred, feature = cut.full(**arguments)
            errors.append(relative_error(cut.shallow(**arguments, cached_feature=feature), noise_pred))
    return max(errors), count


def against_deepcache(subject: Subject, settings: list[tuple[int, int]]) -> tuple[float | None, str | None]:
    """The least agreement over the settings, or what is wrong with the old helper there."""
    from DeepCache import DeepCacheSDHelper

    if subject.old_fault:
        return None, subject.old_fault
    agreements: list[float] = []
    for setting in settings:
        with helped(fastcache.FastCacheHelper(subject.pipe), *setting):
            ours = subject.draw()
        try:
            with helped(DeepCacheSDHelper(pipe=subject.pipe), *setting):
                agreements.append(agreement_db(ours, subject.draw()))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return None, f"it raises {type(error).__name__}"
        finally:
            for module in subject.pipe.unet.modules():  # it leaves every module with a `forward` of its own
                module.__dict__.pop("forward", None)
    return min(agreements), None


def against_engines(subject: Subject, bundle: Path) -> float:
    drawn: list[Tensor] = []
    for engines in (None, bundle):
        with helped(fastcache.FastCacheHelper(subject.pipe, engines=engines), 3):
            drawn.append(subject.draw())
    return agreement_db(drawn[1], drawn[0])


def of_bundle(subject: Subject, bundle: Path, plain: Tensor) -> float:
    """How near a bundle alone comes to its pipeline, and at N=3 to the helper there."""
    with helped(fastcache.FastCacheHelper(subject.pipe), 3):
        cached = subject.draw()
    names, loaded = subject.bundle or {}, fastcache.load(bundle)
    given: dict[str, Any] = {names.get(name, name): value for name, value in subject.arguments.items()}
    given |= {"num_inference_steps": STEPS, "output_type": "latent", "sampler": subject.pipe.scheduler}
    usual = (
        inspect.signature(subject.pipe.__call__).parameters["guidance_scale"].default
    )  # a bundle's is its model's own
    given.setdefault("guidance_scale", usual)
    drawn = [loaded(**given, generator=seeded(1), cache_interval=n).images for n in (1, 3)]
    return min(agreement_db(own, expected) for own, expected in zip(drawn, (plain, cached), strict=True))


class Engines:
    """Bundles for the rows, the bundled model's built once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bundled: Path | None = None

    def __call__(self, subject: Subject) -> Path:
        if subject.weights == "bundled" and subject.bundle is None:
            self._bundled = self._bundled or self._build(MODEL_DIRECTORY, "bundled", 64)
            return self._bundled
        name = f"{type(subject.pipe).__name__}-{len(list(self._folder.iterdir()))}"
        model = self._folder / f"{name}-model"
        subject.pipe.save_pretrained(model)
        beside: dict[str, Any] = {"controlnet": tuple(map(str, sorted(model.glob("controlnet*"))))}
        if (model / "adapter").is_dir():
            beside["t2i_adapter"] = str(model / "adapter")
        components = ("unet",) if subject.bundle is None else ("unet", "text")
        return self._build(model if subject.bundle is None else MODEL_DIRECTORY, name, 64, components, **beside)

    def _build(
        self, model: Path, name: str, pixels: int, components: tuple[str, ...] = ("unet",), **beside: Any
    ) -> Path:
        recipe = recipe_from(
            {"model": str(model), "components": components, "height": pixels, "width": pixels, **beside}
        )
        return fastcache.build_engines(recipe, output=self._folder / name).path


def main(
    only: Annotated[str, typer.Option(help="Rows whose name holds this text.")] = "",
    engines: Annotated[bool, typer.Option(help="Build engines for the rows that have some.")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Print the parity table in Markdown.

    Example: python tools/parity.py --json parity.json
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(file=sys.stderr)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        build = Engines(Path(folder)) if engines else None
        for name, make in PIPELINES.items():
            if only in name:
                console.print(name)
                rows.append(measure(name, make, build))
    settings = ", ".join(f"N={interval} branch {branch}" for interval, branch in SETTINGS)
    heads = [
        "pipeline",
        "weights",
        f"DeepCacheSDHelper, {settings}",
        "all FULL, plain pipeline",
        "shallow = full (branches)",
        "engines, eager helper",
    ]
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|")
    print("\n".join(row.markdown() for row in rows))
    if output is not None:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        document = {"versions": versions, "settings": SETTINGS, "rows": [row.to_json() for row in rows]}
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
