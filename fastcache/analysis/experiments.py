"""A subject and an intervention -> what it changes: the prompt switched at a step, guidance on in an interval only.

All arms of an experiment start from the same noise and run in full: nothing is cached here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.analysis.measure import AnalysisSettings, sampler_table
from fastcache.analysis.recorder import Array, Capture
from fastcache.analysis.subject import Subject
from fastcache.analysis.taps import unet_taps
from fastcache.demo.reader import matches
from fastcache.evaluate.judges import read_scenes
from fastcache.evaluate.quality import psnr_db
from fastcache.planning.eager import EagerDenoiser
from fastcache.planning.trajectory import draw_noise, run_uncached

LATENTS = "latents"


@dataclass(frozen=True, eq=False)
class PromptSwitch:
    """What follows when the prompt changes from A to B at step `at`.

    `followed` says of each feature, the latents among them, how far along the way from run A's to run B's it is: 0 as
    in A, 1 as in B; of the conditional half. Shapes: each (N, T). `shows_a` and `shows_b` are the shares of the final
    pictures that show all that A or B asks for, where that is known.
    """

    at: int
    followed: dict[str, Array]
    shows_a: float | None
    shows_b: float | None


def switch_prompt(subject: Subject, settings: AnalysisSettings, steps: Sequence[int]) -> list[PromptSwitch]:
    """Switch each prompt to the next one's at each of `steps`, beside runs that keep the one or the other throughout.

    Raises: `ValueError` for random weights, all prompts the same, or a step that the run does not have.
    """
    table, images = sampler_table(subject, settings), len(subject.prompts)
    _refuse_random(subject, "--switch-prompt-at")
    if len(set(subject.prompts)) < 2:
        raise ValueError("expected two different prompts or more to switch between, got one")
    for step in steps:
        if not 0 < step < table.num_calls:
            raise ValueError(f"expected --switch-prompt-at from 1 to {table.num_calls - 1}, got {step}")
    switches = [table.num_calls, 0, *steps]  # the first two runs never switch, and switch before they begin
    texts = _SwitchedTexts(subject, switches)
    followed: dict[str, list[Tensor]] = {}

    def predict(samples: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        call = len(followed.get(LATENTS, ()))
        noise_preds, found = texts.predict(call, samples, timestep, guidance_scale)
        for name, rows in {LATENTS: samples.flatten(2), **found}.items():
            followed.setdefault(name, []).append(_progress(rows))
        return noise_preds

    noise, generators = draw_noise(texts.latent_shape, range(images), texts.device)
    start = noise.expand(len(switches), *noise.shape), generators
    *_, latents = run_uncached(predict, table, start, lambda _: settings.guidance_scale)
    results: list[PromptSwitch] = []
    for arm, step in enumerate(steps, 2):
        curves = {name: torch.stack([row[arm] for row in rows], 1).cpu().numpy() for name, rows in followed.items()}
        shows_a, shows_b = (_share_showing(subject, latents[arm], shift) for shift in (0, 1))
        results.append(PromptSwitch(step, curves, shows_a, shows_b))
    return results


class _SwitchedTexts:
    """The U-Net on several runs at once, each with prompts A until its own step and prompts B from there on."""

    def __init__(self, subject: Subject, switches: Sequence[int]) -> None:
        self._subject, self._switches, self._images = subject, switches, len(subject.prompts)
        following = [*subject.prompts[1:], subject.prompts[0]]
        self._before, self._after = subject.conditioning(subject.prompts), subject.conditioning(following)
        self._capture = Capture([tap for tap in unet_taps(subject.unet, ()) if tap.measure == "similarity"])
        denoiser = self._denoiser(0)
        self.latent_shape, self.device = denoiser.latent_shape, denoiser.device

    def _denoiser(self, call: int) -> EagerDenoiser:
        runs = [self._after if call >= step else self._before for step in self._switches]
        rows = {
            name: torch.cat([run[name].chunk(2)[half] for half in range(2) for run in runs]) for name in self._before
        }
        images = len(runs) * self._images
        return EagerDenoiser(self._subject.unet, rows, images, self._subject.latent_size, branch_ids=())

    def predict(
        self, call: int, samples: Tensor, timestep: float, guidance_scale: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The noise predictions, and the conditional half's features. Shapes: (runs, P, C, H, W); (runs, P, -1)."""
        with self._capture:
            together = samples.flatten(0, 1)[None]
            guided = self._denoiser(call).full(together, timestep, guidance_scale)[0]
        shape = (len(self._switches), self._images)
        found = {name: rows.chunk(2)[1].flatten(1).unflatten(0, shape) for name, rows in self._capture.found.items()}
        return guided.unflatten(0, shape), found


def _progress(rows: Tensor) -> Tensor:
    """How far along the line from run 0's to run 1's each run's feature is. Shapes: (runs, P, elements) to (runs, P).

    nan where the two do not differ, as the latents before the first step.
    """
    way = (rows[1] - rows[0]).double()
    return ((rows.double() - rows[0]) * way).sum(-1) / way.square().sum(-1)


@dataclass(frozen=True)
class GuidedInterval:
    """What guidance in the steps from `start` up to, not including, `stop` makes of the pictures; without it, 1.

    `rows_share` is what of the U-Net's rows is still to be computed, where the unconditional half is left out without
    guidance. `shows` is the share of pictures that show all that their prompt asks for, where that is known.
    """

    start: int
    stop: int
    rows_share: float
    psnr_db: float
    shows: float | None


def guide_in_intervals(
    subject: Subject, settings: AnalysisSettings, intervals: Sequence[tuple[int, int]]
) -> list[GuidedInterval]:
    """Draw with guidance throughout, nowhere, and in each interval; likeness is to the pictures guided throughout.

    Raises: `ValueError` for random weights or an interval that is not within the run.
    """
    table, images = sampler_table(subject, settings), len(subject.prompts)
    _refuse_random(subject, "--guidance-interval")
    for start, stop in intervals:
        if not 0 <= start < stop <= table.num_calls:
            raise ValueError(f"expected --guidance-interval A:B, 0 <= A < B <= {table.num_calls}, got {start}:{stop}")
    denoiser = EagerDenoiser(
        subject.unet, subject.conditioning(subject.prompts), images, subject.latent_size, branch_ids=()
    )

    def draw_pictures(start: int, stop: int) -> tuple[Tensor, Tensor]:
        *_, latents = run_uncached(
            lambda sample, timestep, scale: denoiser.full(sample[None], timestep, scale)[0],
            table,
            draw_noise(denoiser.latent_shape, range(images), denoiser.device),
            lambda call: settings.guidance_scale if start <= call < stop else 1.0,
        )
        return latents, subject.decode(latents)

    _, reference = draw_pictures(0, table.num_calls)
    results: list[GuidedInterval] = []
    for start, stop in [(0, table.num_calls), *intervals, (0, 0)]:
        latents, pictures = draw_pictures(start, stop)
        share = (table.num_calls + stop - start) / (2 * table.num_calls)
        shows = _share_showing(subject, latents, 0)
        results.append(GuidedInterval(start, stop, share, psnr_db(pictures, reference), shows))
    return results


def _share_showing(subject: Subject, latents: Tensor, shift: int) -> float | None:
    """The share of pictures that show what the prompt `shift` further on asks for."""
    if subject.scenes is None:
        return None
    wanted = [*subject.scenes[shift:], *subject.scenes[:shift]]
    seen = read_scenes(subject.decode(latents))
    return sum(map(matches, seen, wanted)) / len(wanted)


def _refuse_random(subject: Subject, option: str) -> None:
    if subject.source.random_weights:
        raise ValueError(f"expected a trained model for {option}, got random weights")
