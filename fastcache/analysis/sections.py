"""What an analysis and its experiments measured -> the sections of the report: a figure, a table, and what they say.

A section's text tells what is measured, in which unit, and after which source. It draws no conclusion.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastcache.analysis import figures
from fastcache.analysis.dit import DiTStudy
from fastcache.analysis.experiments import GuidedInterval, PromptSwitch
from fastcache.analysis.measure import ALIKE, SIMILARITY_COLUMNS, Analysis, SimilarityFacts, share_alike
from fastcache.analysis.probes import FOLDS, GRID, Probes
from fastcache.analysis.recorder import Array, FeatureMeasures
from fastcache.planning.calibrate import GAIN_LAG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURES = 8  # of a strip
_PLURALS = {
    "resnet": "resnets",
    "transformer": "transformers",
    "attention": "attention layers",
    "feed-forward": "feed-forward layers",
}


@dataclass(frozen=True)
class Experiments:
    """The options asked for beside the analysis itself."""

    switches: Sequence[PromptSwitch] = ()
    intervals: Sequence[GuidedInterval] = ()
    probes: Probes | None = None
    dit: DiTStudy | None = None


@dataclass(frozen=True)
class Section:
    """A part of the report: `name` is the figure's file, less its ending, and the section's anchor."""

    name: str
    title: str
    text: str
    png: bytes | None = None
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])


def sections(analysis: Analysis, experiments: Experiments) -> Iterator[Section]:
    """All that there is to show, in the order of the report."""
    yield from _similarity(analysis.recorded, "", "up blocks and cached features")
    yield from _change(analysis.recorded, analysis.kinds, "")
    yield from _errors(analysis)
    if experiments.switches:
        yield _switches(experiments.switches)
    if experiments.intervals:
        yield _intervals(experiments.intervals)
    if experiments.probes is not None:
        yield _probes(experiments.probes)
    if experiments.dit is not None:
        yield from _dit(analysis, experiments.dit)


def _similarity(recorded: FeatureMeasures, prefix: str, what: str) -> Iterator[Section]:
    similarity = recorded.similarity
    means = {name: values.mean(0) for name, values in similarity.items()}
    yield Section(
        f"{prefix}similarity",
        f"Similarity of every pair of steps: {what}",
        "Cosine similarity (no unit, at most 1) between a feature at one step and the same feature at another, both "
        "halves under guidance, mean over the samples; after DeepCache (arXiv 2312.00858), figure 2b. Features are in "
        "the order in which they are computed. The table counts pairs of different steps; the dip is the step that is "
        "least like the one before it.",
        _png(figures.similarity_maps(means)),
        SIMILARITY_COLUMNS,
        [SimilarityFacts.of(values).row(name) for name, values in similarity.items()],
    )
    yield Section(
        f"{prefix}similarity-by-step",
        "Similarity from step to step, and how many steps are alike",
        f"Left, each step's cosine similarity to the step before. Right, the share of all other steps whose feature "
        f"is above {ALIKE} alike to this step's, in percent, mean over the samples; after DeepCache, figure 2.",
        _png(
            figures.similarity_curves(
                {name: np.concatenate([[np.nan], np.diagonal(mean, 1)]) for name, mean in means.items()},
                {name: share_alike(values).mean(0) for name, values in similarity.items()},
            )
        ),
    )


def _change(recorded: FeatureMeasures, kinds: dict[str, str], prefix: str) -> Iterator[Section]:
    panels: dict[str, dict[str, tuple[Array, Array]]] = {}
    for name, values in recorded.change.items():
        panel = panels.setdefault(f"{name.split()[0]}: {_PLURALS[kinds[name]]}", {})
        panel[".".join(re.findall(r"\d+", name))] = values.mean(0), values.std(0)
    yield Section(
        f"{prefix}change",
        "Change from step to step, block by block",
        "Relative L1 change of a block's residual output C from the step before, ||C(t) - C(t-1)||1 / ||C(t)||1 "
        "(no unit), mean over the samples with a band of one standard deviation; after Block Caching "
        "(arXiv 2312.03209), L1rel. C is what a block adds to its input: of a resnet its second convolution's output, "
        "of a transformer its last projection's. A line's name is its block's number and its own.",
        _png(figures.change_curves(panels)),
        ("blocks", "number", "mean change", "least", "most"),
        [_change_row(title, panel) for title, panel in panels.items()],
    )


def _change_row(title: str, panel: dict[str, tuple[Array, Array]]) -> tuple[str, ...]:
    means = np.stack([mean for mean, _ in panel.values()])[:, 1:]
    return title, str(len(panel)), f"{means.mean():.3f}", f"{means.min():.3f}", f"{means.max():.3f}"


def _errors(analysis: Analysis) -> Iterator[Section]:
    calibration = analysis.calibration
    relative = dict(zip(calibration.branch_ids, calibration.relative_error, strict=True))
    yield Section(
        "errors",
        "The error of reuse, e(j, s)",
        "The root mean square error of step j's guided noise prediction where its shallow pass runs on the feature "
        "that step s stored, by the root mean square of the prediction itself, mean over the samples. All other steps "
        "run in full. In calibration.json the same errors are not divided by the prediction.",
        _png(figures.error_maps(relative)),
        ("branch", *(f"{age} old" for age in (1, 2, 4) if age < calibration.num_calls)),
        [
            (str(b), *(f"{np.diagonal(matrix, -age).mean():.3f}" for age in (1, 2, 4) if age < len(matrix)))
            for b, matrix in relative.items()
        ],
    )
    if calibration.has_gains:
        yield Section(
            "gains",
            "The closed-loop gain",
            f"How far the final latents move, root mean square, for each unit of error in the noise prediction of one "
            f"step, when all later steps run in full and react to it; the error put in is that of a feature of branch "
            f"{calibration.branch_ids[0]} that is {GAIN_LAG} steps old. Mean over the samples, band: one standard "
            f"deviation.",
            _png(figures.gain_curve(calibration.gain, calibration.gains.std(0))),
        )


def _switches(switches: Sequence[PromptSwitch]) -> Section:
    curves = {s.at: {name: np.nanmean(v[:, 1:], 0) for name, v in s.followed.items()} for s in switches}
    padded = {at: {name: np.insert(curve, 0, np.nan) for name, curve in c.items()} for at, c in curves.items()}
    known = any(switch.shows_a is not None for switch in switches)
    return Section(
        "switch-prompt",
        "The prompt switched on the way",
        "Each sample's prompt A is replaced by the next sample's prompt B from one step on, with the same noise. A "
        "feature's value is its place on the line from run A's feature (0) to run B's (1) at the same step, of the "
        "conditional half, mean over the samples; so it tells when a block's feature follows the new prompt, and the "
        "dashed line when the latents do."
        + (" The table counts the final pictures that show everything one of the prompts asks for." if known else ""),
        _png(figures.switch_curves(padded)),
        ("switched at step", "pictures that show A", "pictures that show B") if known else (),
        [(str(s.at), f"{s.shows_a:.0%}", f"{s.shows_b:.0%}") for s in switches if s.shows_a is not None],
    )


def _intervals(intervals: Sequence[GuidedInterval]) -> Section:
    return Section(
        "guidance-interval",
        "Guidance in an interval of steps only",
        "Guidance counts in the steps named and is 1 elsewhere, where the unconditional half need not be computed: "
        "the share is of U-Net rows that are left. PSNR of the decoded pictures, in dB, to those guided throughout.",
        None,
        ("guided steps", "rows computed", "PSNR", "pictures that show all their prompt asks for"),
        [
            (
                "none" if i.start == i.stop else f"{i.start} to {i.stop - 1}",
                f"{i.rows_share:.0%}",
                "the reference" if np.isinf(i.psnr_db) else f"{i.psnr_db:.1f} dB",
                "-" if i.shows is None else f"{i.shows:.0%}",
            )
            for i in intervals
        ],
    )


def _probes(probes: Probes) -> Section:
    return Section(
        "probes",
        "What linear probes can tell, by step and depth",
        f"Pictures are drawn from the empty prompt, so what they show is settled on the way. A ridge regression on a "
        f"step's feature (of each channel the means over {GRID}x{GRID} cells, and mean, deviation and extremes of "
        f"all) tells an attribute of the final picture as the bundled model's reader sees it; accuracy in percent on "
        f"held-out pictures ({FOLDS} folds). Place, size, colour and "
        f"shape are asked of pictures with one object. The dotted line always names the commonest value.",
        _png(figures.probe_curves(probes.steps, probes.accuracy, probes.chance)),
        ("attribute", "pictures", "commonest value", *(f"step {s}, best feature" for s in _some(probes.steps))),
        [
            (
                attribute,
                str(probes.pictures[attribute]),
                f"{probes.chance[attribute]:.0%}",
                *(f"{max(c[probes.steps.index(s)] for c in curves.values()):.0%}" for s in _some(probes.steps)),
            )
            for attribute, curves in probes.accuracy.items()
        ],
    )


def _some(steps: Sequence[int]) -> list[int]:
    """The first, the last and three between."""
    return [steps[k] for k in sorted({round(k * (len(steps) - 1) / 4) for k in range(5)})]


def _dit(analysis: Analysis, study: DiTStudy) -> Iterator[Section]:
    with torch.no_grad():
        pictures = analysis.subject.decode(study.latents[:_PICTURES]).permute(0, 2, 3, 1).numpy()
    state = (
        "trained on the bundled scenes"
        if study.trained
        else "of random weights: its figures say nothing of trained ones"
    )
    yield Section(
        "dit-pictures",
        f"A diffusion transformer beside the U-Net, {'trained' if study.trained else 'random weights'}",
        f"A DiT (arXiv 2212.09748) of 8 blocks on the same latents and noise schedule, {state}; what it draws, one "
        f"class of colour and shape each. The measures below are those of the U-Net above.",
        _png(figures.picture_rows({"drawn": pictures})),
    )
    yield from _similarity(study.recorded, "dit-", "the transformer's blocks")
    yield from _change(study.recorded, study.kinds, "dit-")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
