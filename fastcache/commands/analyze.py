"""`analyze`: how a model's features change along the trajectory, and the experiments around it, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastcache.commands.options import (
    Device,
    Guidance,
    Height,
    Json,
    OutputFolder,
    RandomWeights,
    Revision,
    Sampler,
    Width,
    check_writable,
    read_prompts,
)
from fastcache.console import next_step, print_json, print_table, progress

if TYPE_CHECKING:
    from fastcache.analysis.measure import Analysis


def analyze(  # as long as its flags are many
    model: Annotated[str, typer.Option(help="A folder in diffusers' layout, a hub id, demo, or a preset.")],
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Denoising steps.")],
    output: OutputFolder,
    sampler: Sampler = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt a line.")] = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, max=10**6, help="Without --prompts: how many of the bundled model's own to take.")
    ] = 8,
    seeds: Annotated[int, typer.Option(min=1, max=10**6, help="How many pictures to draw of each prompt.")] = 1,
    branch_id: Annotated[
        list[int] | None,
        typer.Option(
            help="The cut to measure reuse at, 0 being the shallowest. Give it again for more; 0 if left out."
        ),
    ] = None,
    guidance_scale: Guidance = None,
    gains: Annotated[
        bool,
        typer.Option(
            "--gains", help="Also measure how much an error in each step changes the final picture, for optimal plans."
        ),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures measured at once; memory grows with it.")] = 1,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    random_weights: RandomWeights = False,
    revision: Revision = None,
    switch_prompt_at: Annotated[
        list[int] | None,
        typer.Option(help="Also measure what a new prompt changes when it comes at this step. Give it again for more."),
    ] = None,
    guidance_interval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A:B", help="Also measure runs with guidance in steps A to B-1 only. Give it again for more."
        ),
    ] = None,
    probes: Annotated[
        bool,
        typer.Option("--probes", help="Also measure what can be read off the features, and when (bundled model only)."),
    ] = False,
    probe_images: Annotated[int, typer.Option(min=20, max=10**6, help="How many pictures --probes learns from.")] = 512,
    dit: Annotated[bool, typer.Option("--dit", help="Also measure a small diffusion transformer.")] = False,
    dit_weights: Annotated[
        Path | None, typer.Option(help="Its weights, by tools/train_dit.py; random if left out.")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure how a model's features change from step to step, and write a report that opens offline.

    Example: fastcache analyze --model demo --steps 50 --sampler ddim --output build/analysis
    """
    from fastcache.analysis.dit import study_dit
    from fastcache.analysis.experiments import guide_in_intervals, switch_prompt
    from fastcache.analysis.measure import AnalysisSettings, analyse
    from fastcache.analysis.probes import probe
    from fastcache.analysis.report import document, write_report
    from fastcache.analysis.sections import Experiments
    from fastcache.analysis.subject import find_subject
    from fastcache.compile.describe import defaults_of
    from fastcache.evaluate.chart import require_matplotlib
    from fastcache.sampler.scheduler import own_sampler

    require_matplotlib()
    check_writable(output)
    intervals = [_interval(text) for text in guidance_interval or ()]
    with progress() as say:
        say(f"loading {model}")
        subject = find_subject(
            model,
            random_weights=random_weights,
            revision=revision,
            height=height,
            width=width,
            prompts=None if prompts is None else read_prompts(prompts),
            num_prompts=num_prompts,
            seeds=seeds,
            device=device,
        )
        scale = defaults_of(subject.source).guidance_scale if guidance_scale is None else guidance_scale
        sampler = sampler or own_sampler(subject.source.scheduler)
        settings = AnalysisSettings(sampler, steps, scale, tuple(dict.fromkeys(branch_id or [0])), batch, gains)
        # The short experiments first: what they refuse is said before the long measurement.
        experiments = Experiments(
            switches=switch_prompt(subject, settings, switch_prompt_at) if switch_prompt_at else (),
            intervals=guide_in_intervals(subject, settings, intervals) if intervals else (),
            dit=study_dit(dit_weights, subject, settings, num_prompts, say) if dit or dit_weights else None,
            probes=probe(subject, settings, probe_images, say) if probes else None,
        )
        analysis = analyse(subject, settings, say)
        say("drawing the report")
        page = write_report(analysis, experiments, output)
    if json_:
        print_json(document(analysis, experiments))
    else:
        _show(analysis)
        typer.echo(f"report: {page}")
        next_step(f"open {page} in a browser; fastcache plan --help lists the plans that can be made from a bundle")


def _interval(text: str) -> tuple[int, int]:
    start, colon, stop = text.partition(":")
    if not colon or not start.isdecimal() or not stop.isdecimal():
        raise ValueError(f"expected --guidance-interval A:B with two step numbers, got {text!r}")
    return int(start), int(stop)


def _show(analysis: Analysis) -> None:
    from fastcache.analysis.measure import SIMILARITY_COLUMNS, SimilarityFacts

    weights = ", random weights: no conclusions" if analysis.subject.source.random_weights else ""
    similarity = analysis.recorded.similarity
    print_table(
        f"{analysis.subject.name}, {analysis.settings.steps} {analysis.settings.sampler} steps, "
        f"samples: {len(analysis.subject.prompts)}{weights}; cosine similarity between steps",
        SIMILARITY_COLUMNS,
        [SimilarityFacts.of(values).row(name) for name, values in similarity.items()],
    )
