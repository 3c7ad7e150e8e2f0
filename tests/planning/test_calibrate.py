"""Calibrations: errors and gains against loops that diffusers' own scheduler steps, engines against eager modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

import fastcache
from fastcache.analysis.subject import find_subject
from fastcache.bundle.bundle import Bundle
from fastcache.compile.models import find_model
from fastcache.planning.calibrate import GAIN_LAG, MeasuredBatch, calibrate, calibrate_bundle, passes_of
from fastcache.planning.calibration import Calibration, Conditions
from fastcache.planning.eager import EagerDenoiser
from fastcache.planning.trajectory import draw_noise
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import compile_sampler
from small_unets import small_unet
from tiny_model import save_tiny_sdxl

STEPS, SCALE, BRANCHES = 6, 3.0, (0, 2)


@pytest.fixture(scope="module")
def conditioning() -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(5))}


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet("sd15", sample_size=8)


@pytest.fixture(scope="module")
def measured(unet: Any, conditioning: dict[str, Tensor]) -> MeasuredBatch:
    denoiser = EagerDenoiser(unet, conditioning, 2, (8, 8), BRANCHES)
    table = compile_sampler(DDIMScheduler(clip_sample=False), STEPS)
    return calibrate(denoiser, table, [3, 4], guidance_scale=SCALE, guidance=True)


class Oracle:
    """The same trajectory with diffusers' scheduler and the cut modules, one image and one pass at a time."""

    def __init__(self, unet: Any, conditioning: dict[str, Tensor], image: int) -> None:
        self.text = conditioning["encoder_hidden_states"][[image, 2 + image]]
        self.cuts = {branch: fastcache.partition_unet(unet, branch_id=branch) for branch in BRANCHES}
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.scheduler.set_timesteps(STEPS)
        self.noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3 + image))

    def full(self, x: Tensor, step: int, branch: int = 0) -> tuple[Tensor, Tensor]:
        t = self.scheduler.timesteps[step]
        noise_pred, feature = self.cuts[branch].full(torch.cat([x, x]), t, self.text)
        return self.guided(noise_pred), feature

    def shallow(self, x: Tensor, step: int, branch: int, feature: Tensor) -> Tensor:
        t = self.scheduler.timesteps[step]
        return self.guided(self.cuts[branch].shallow(torch.cat([x, x]), t, self.text, cached_feature=feature))

    @staticmethod
    def guided(noise_pred: Tensor) -> Tensor:
        return noise_pred[:1] + SCALE * (noise_pred[1:] - noise_pred[:1])

    def trajectory(self, error_at: int | None = None, error: Tensor | None = None) -> list[Tensor]:
        xs = [self.noise]
        for step in range(STEPS):
            noise_pred, _ = self.full(xs[-1], step)
            if step == error_at:
                noise_pred = noise_pred + error
            xs.append(self.scheduler.step(noise_pred, self.scheduler.timesteps[step], xs[-1]).prev_sample)
        return xs


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("image", [0, 1])
def test_errors_are_those_of_the_shallow_pass_on_older_features(
    unet: Any, conditioning: dict[str, Tensor], measured: MeasuredBatch, image: int
) -> None:
    oracle = Oracle(unet, conditioning, image)
    xs = oracle.trajectory()
    torch.testing.assert_close(measured.latents[image], xs[-1][0], atol=1e-4, rtol=1e-4)
    for b, branch in enumerate(BRANCHES):
        for j, s in [(1, 0), (3, 2), (5, 1), (4, 0)]:
            wanted, _ = oracle.full(xs[j], j)
            _, feature = oracle.full(xs[s], s, branch)
            assert measured.errors[image, b, j, s] == pytest.approx(
                rms(oracle.shallow(xs[j], j, branch, feature) - wanted), rel=1e-3
            )
            assert measured.noise_rms[image, j] == pytest.approx(rms(wanted), rel=1e-4)


@pytest.mark.parametrize("j", [1, 4, STEPS - 1])
def test_gains_are_those_of_a_run_with_the_error_put_in(
    unet: Any, conditioning: dict[str, Tensor], measured: MeasuredBatch, j: int
) -> None:
    oracle = Oracle(unet, conditioning, 1)
    xs, old = oracle.trajectory(), max(0, j - GAIN_LAG)
    _, feature = oracle.full(xs[old], old)
    error = oracle.shallow(xs[j], j, 0, feature) - oracle.full(xs[j], j)[0]
    moved = oracle.trajectory(j, error)[-1] - xs[-1]
    assert measured.gains[1, j] == pytest.approx(rms(moved) / rms(error), rel=1e-2)


@pytest.mark.parametrize("steps", [(0,), (2, STEPS - 1)])
def test_what_missing_guidance_does_is_seen_in_runs_without_it(
    unet: Any, conditioning: dict[str, Tensor], measured: MeasuredBatch, steps: tuple[int, ...]
) -> None:
    oracle = Oracle(unet, conditioning, 1)
    xs, moved = oracle.trajectory(), torch.zeros(())
    for step in steps:
        text = oracle.text[1:]
        alone, _ = oracle.cuts[0].full(xs[step], oracle.scheduler.timesteps[step], text)
        moved = moved + oracle.trajectory(step, alone - oracle.full(xs[step], step)[0])[-1] - xs[-1]
    found = measured.unguided[1][np.ix_(steps, steps)].sum()
    assert np.sqrt(found) == pytest.approx(rms(moved), rel=1e-2)


def test_a_feature_of_the_same_step_is_no_error_and_none_comes_from_later_ones(measured: MeasuredBatch) -> None:
    same = np.diagonal(measured.errors, axis1=2, axis2=3)
    assert same.max() < 1e-5 < np.nanmax(measured.errors)
    later = np.triu_indices(STEPS, 1)
    assert np.isnan(measured.errors[:, :, *later]).all()
    assert (measured.gains[:, 0] == 0).all()
    assert (measured.gains[:, 1:] > 0).all()


def test_what_is_batched_is_what_is_measured_alone(
    unet: Any, conditioning: dict[str, Tensor], measured: MeasuredBatch
) -> None:
    alone = {name: rows[[1, 3]] for name, rows in conditioning.items()}
    table = compile_sampler(DDIMScheduler(clip_sample=False), STEPS)
    single = calibrate(EagerDenoiser(unet, alone, 1, (8, 8), BRANCHES), table, [4], guidance_scale=SCALE)
    np.testing.assert_allclose(single.errors[0], measured.errors[1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(single.gains[0], measured.gains[1], rtol=1e-2)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler_a", "dpm++_2m_sde", "unipc", "heun"])
def test_trajectories_are_the_pipelines(tiny_bundle: Bundle, tiny_model: Path, sampler: str) -> None:
    pipe = fastcache.load(tiny_bundle.path)
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    wanted = pipe(
        ["abc", "de"], num_inference_steps=4, guidance_scale=SCALE, sampler=sampler, generator=generators,
        output_type="latent",
    ).images  # fmt: skip
    subject = find_subject(str(tiny_model), num_prompts=1)
    denoiser = EagerDenoiser(subject.unet, subject.conditioning(["abc", "de"]), 2, subject.latent_size)
    table = compile_sampler(make_scheduler(sampler, subject.source.scheduler), 4)
    found = calibrate(denoiser, table, [0, 1], guidance_scale=SCALE, gains=False).latents
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


def test_sdxl_is_conditioned_as_in_diffusers(tmp_path: Path) -> None:
    folder = save_tiny_sdxl(tmp_path / "xl")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    noise, _ = draw_noise((4, 8, 8), [0, 1], "cpu")
    sizes = {"height": 32, "width": 32, "num_inference_steps": 4}
    wanted = pipe(["ab", "c"], **sizes, guidance_scale=SCALE, latents=noise, output_type="latent").images
    subject = find_subject(str(folder), num_prompts=1)
    denoiser = EagerDenoiser(subject.unet, subject.conditioning(["ab", "c"]), 2, subject.latent_size)
    table = compile_sampler(make_scheduler("euler", subject.source.scheduler), 4)
    found = calibrate(denoiser, table, [0, 1], guidance_scale=SCALE, gains=False)
    torch.testing.assert_close(found.latents, wanted, atol=2e-3, rtol=2e-3)


def test_a_model_that_draws_from_a_picture_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_sdxl(tmp_path / "refiner", refiner=True)
    with pytest.raises(ValueError, match="expected a text-to-image model"):
        find_subject(str(folder))


def test_of_a_long_run_few_steps_are_tried_and_the_rest_is_near(
    unet: Any, conditioning: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = EagerDenoiser(unet, conditioning, 2, (8, 8))
    table = compile_sampler(DDIMScheduler(clip_sample=False), 16)
    found = calibrate(denoiser, table, [3, 4], guidance_scale=SCALE)
    full, shallow = passes_of(16, 1)
    monkeypatch.setattr("fastcache.planning.calibrate._TRIED", 16)
    every = calibrate(denoiser, table, [3, 4], guidance_scale=SCALE)
    assert full < 0.6 * passes_of(16, 1)[0]
    assert shallow < 16 * 17 / 2
    np.testing.assert_allclose(found.gains, every.gains, rtol=0.35)
    diagonals = [np.sqrt(np.diagonal(each.couplings, axis1=1, axis2=2)) for each in (found, every)]
    np.testing.assert_allclose(diagonals[0], diagonals[1], rtol=0.35)


def test_a_bundles_calibration_is_its_models(tiny_bundle: Bundle, tiny_model: Path) -> None:
    prompts = ["a", "bc", "def", "g", "hij"]  # more than the bundle takes at once
    pipe = fastcache.load(tiny_bundle.path)
    found = calibrate_bundle(pipe, prompts, num_steps=4, guidance_scale=SCALE)
    subject = find_subject(str(tiny_model), num_prompts=1)
    denoiser = EagerDenoiser(subject.unet, subject.conditioning(prompts), 5, subject.latent_size)
    table = compile_sampler(make_scheduler("ddim", find_model(str(tiny_model)).scheduler), 4)
    eager = calibrate(denoiser, table, range(5), guidance_scale=SCALE)
    assert found.branch_ids == (0,)
    assert found.conditions == Conditions(
        pipe.bundle.manifest.model.name, pipe.bundle.manifest.weights_sha256, "ddim", 4, SCALE, 32, 32
    )
    np.testing.assert_allclose(found.errors, eager.errors, rtol=0.05, atol=1e-4)
    np.testing.assert_allclose(found.gains, eager.gains, rtol=0.05, atol=1e-3)


def calibration(measured: MeasuredBatch) -> Calibration:
    conditions = Conditions("small", "0" * 64, "ddim", STEPS, SCALE, 64, 64)
    return Calibration.of(conditions, BRANCHES, ["a (seed 3)", "b (seed 4)"], [measured])


def test_json_keeps_what_was_measured(measured: MeasuredBatch) -> None:
    made = calibration(measured)
    read = Calibration.from_json(made.to_json())
    assert (read.conditions, read.branch_ids, read.samples) == (made.conditions, made.branch_ids, made.samples)
    for name in ("errors", "gains", "noise_rms", "changes", "couplings", "unguided"):
        np.testing.assert_allclose(getattr(read, name), getattr(made, name), rtol=1e-4)
    np.testing.assert_allclose(read.error[1], made.errors[:, 1].mean(0), rtol=1e-4)
    assert read.branch(2) == 1
    with pytest.raises(ValueError, match="expected a branch out of"):
        read.branch(1)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("calibration/1", "calibration/9", "expected schema"),
        ('"branch_ids": [0, 2]', '"branch_ids": [0]', "expected errors of shape"),
        ('"sampler"', '"sampled"', "expected a calibration as fastcache writes it"),
        ('"noise_rms"', '"rms"', "expected a calibration as fastcache writes it"),
    ],
)
def test_json_that_was_changed_is_refused(measured: MeasuredBatch, old: str, new: str, says: str) -> None:
    text = calibration(measured).to_json()
    assert old in text
    with pytest.raises(ValueError, match=says):
        Calibration.from_json(text.replace(old, new))


def test_without_gains_there_are_none(unet: Any, conditioning: dict[str, Tensor]) -> None:
    denoiser = EagerDenoiser(unet, conditioning, 2, (8, 8))
    table = compile_sampler(DDIMScheduler(clip_sample=False), 2)
    conditions = Conditions("small", "0" * 64, "ddim", 2, SCALE, 64, 64)
    parts = [calibrate(denoiser, table, [0, 1], guidance_scale=SCALE, gains=False)]
    made = Calibration.of(conditions, (0,), ["a", "b"], parts)
    assert not made.has_gains
    assert not made.has_unguided
    assert not Calibration.from_json(made.to_json()).has_gains
