"""A model draws its own way where nobody says: with diffusers' defaults of its pipeline, and its own scheduler."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import fastcache
from fastcache import Bundle, CachePlan, FastCachePipeline
from fastcache.compile.describe import defaults_of
from fastcache.compile.models import find_model
from fastcache.demo import MODEL_DIRECTORY
from fastcache.evaluate.quality import psnr_db
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler, own_sampler

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning", "ignore:no table for this scheduler")

# As runwayml/stable-diffusion-v1-5 has it.
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SCHEDULERS: list[tuple[Any, str]] = [
    (diffusers.PNDMScheduler(**SD15), "pndm"),
    (diffusers.DDIMScheduler(clip_sample=False), "ddim"),
    (diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"), "euler"),
    (diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True), "dpm++_2m_karras"),
    (diffusers.DPMSolverMultistepScheduler(solver_order=3), "DPMSolverMultistepScheduler"),
    (diffusers.DDIMScheduler(clip_sample=False, thresholding=True), "DDIMScheduler"),
    (diffusers.TCDScheduler(), "TCDScheduler"),
]


def of_model(bundle: Bundle, folder: Path) -> FastCachePipeline:
    """The bundle's engines as if they had been built from a folder that differs in its settings alone."""
    source = find_model(str(folder))
    own = {"scheduler": source.scheduler, "defaults": defaults_of(source)}
    manifest = bundle.manifest.model_copy(update={"model": bundle.manifest.model.model_copy(update=own)})
    return FastCachePipeline(replace(bundle, manifest=manifest), threads=1)


def with_settings(folder: Path, model: Path, scheduler: Any = None, **index: Any) -> Path:
    """A copy of a model with another scheduler and other entries of its `model_index.json`."""
    shutil.copytree(model, folder)
    known = json.loads((folder / "model_index.json").read_text())
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
        known["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps({**known, **index}))
    return folder


def drawn(pipe: Any, **arguments: Any) -> Tensor:
    return pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images


@pytest.mark.parametrize(("scheduler", "name"), SCHEDULERS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bundle_draws_what_its_models_pipeline_draws_by_default(
    scheduler: Any, name: str, tiny_bundle: Bundle, tiny_model: Path, tmp_path: Path
) -> None:
    folder = with_settings(tmp_path / "model", tiny_model, scheduler)
    reference = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    pipe = of_model(tiny_bundle, folder)
    assert own_sampler(pipe.bundle.manifest.model.scheduler) == name
    ours = drawn(pipe)
    assert psnr_db(ours, drawn(reference)) >= 50
    assert psnr_db(ours, drawn(pipe, sampler="ddpm")) < 50
    assert psnr_db(ours, drawn(pipe, guidance_scale=4.0)) < 50


@pytest.mark.parametrize(
    ("pipeline", "steps", "guidance"),
    [
        ("StableDiffusionPipeline", 50, 7.5),
        ("StableDiffusionImg2ImgPipeline", 50, 7.5),
        ("StableDiffusionInstructPix2PixPipeline", 100, 7.5),
        ("StableDiffusionXLPipeline", 50, 5.0),
    ],
)
def test_a_bundle_takes_steps_and_guidance_from_its_models_pipeline(
    pipeline: str, steps: int, guidance: float, tiny_model: Path, tmp_path: Path
) -> None:
    found = find_model(str(with_settings(tmp_path / "model", tiny_model, _class_name=pipeline)))
    own = defaults_of(found)
    assert (own.num_inference_steps, own.guidance_scale, own.image_guidance_scale) == (steps, guidance, 1.5)


def test_a_folder_says_what_its_model_draws_best_with(tiny_model: Path, tmp_path: Path) -> None:
    assert defaults_of(find_model("demo")).guidance_scale == 4.0
    assert (MODEL_DIRECTORY / "fastcache.json").is_file()
    folder = with_settings(tmp_path / "model", tiny_model)
    before = find_model(str(folder)).weights_sha256
    (folder / "fastcache.json").write_text('{"num_inference_steps": 4, "guidance_scale": 1.0}')
    found = find_model(str(folder))
    assert found.weights_sha256 != before  # so that a bundle built before is not up to date
    own = defaults_of(found)
    assert (own.num_inference_steps, own.guidance_scale) == (4, 1.0)
    (folder / "fastcache.json").write_text('{"steps": 4}')
    with pytest.raises(ValueError, match=r"fastcache.json to say num_inference_steps, .*, got steps: "):
        defaults_of(find_model(str(folder)))


def test_a_named_sampler_is_its_own_name() -> None:
    for name in SAMPLERS:
        config = dict(make_scheduler(name, {}).config) | {"_class_name": SAMPLERS[name].class_name}
        assert own_sampler(config) == {"plms": "pndm"}.get(name, name)
    assert own_sampler({}) == "ddim"  # an architecture preset
    with pytest.raises(ValueError, match="one of diffusers, got 'AutoencoderKL'"):
        make_scheduler("AutoencoderKL", {"_class_name": "AutoencoderKL"})


@pytest.mark.parametrize(("sampler", "calls", "steps"), [("ddim", 6, 6), ("pndm", 7, 6), ("heun", 11, 6)])
def test_a_plan_that_names_its_sampler_needs_no_steps(
    sampler: str, calls: int, steps: int, tiny_bundle: Bundle
) -> None:
    pipe = fastcache.load(tiny_bundle.path, threads=1)
    plan = CachePlan(CachePlan.uniform(calls, 2).passes, sampler=sampler)
    output = pipe("a cat", plan=plan, seed=1, output_type="latent")
    said = pipe("a cat", plan=plan, seed=1, output_type="latent", sampler=sampler, num_inference_steps=steps)
    assert torch.equal(output.images, said.images)
    assert (output.made["sampler"], output.made["steps"]) == (sampler, steps)
    with pytest.raises(ValueError, match="as many U-Net calls as its sampler makes, got 12"):
        pipe("a cat", plan=CachePlan(CachePlan.uniform(12, 2).passes, sampler="heun"))
