"""Oracle: SDXL's base and refiner through bundles against diffusers' pipelines, small and with random weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

import fastcache
from build_store import BuildStore
from fastcache import FastCachePipeline
from fastcache.cli import main
from fastcache.evaluate.quality import psnr_db
from fastcache.sampler.scheduler import make_scheduler
from tiny_model import save_tiny_sdxl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning", "ignore:.*tokens of the prompt"),
]

PROMPT = "a red"
STEPS = 8
Both = tuple[FastCachePipeline, Any]


def built(builds: BuildStore, name: str, kind: Any, *, refiner: bool) -> Both:
    """A model's bundle, and diffusers' pipeline of it."""
    model = builds.model(name, lambda folder: save_tiny_sdxl(folder, refiner=refiner))
    bundle = builds.bundle(model)
    reference = kind.from_pretrained(model, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return fastcache.load(bundle.path), reference


@pytest.fixture(scope="module")
def base(builds: BuildStore) -> Both:
    return built(builds, "tiny-sdxl", StableDiffusionXLPipeline, refiner=False)


@pytest.fixture(scope="module")
def refiner(builds: BuildStore) -> Both:
    return built(builds, "tiny-refiner", StableDiffusionXLImg2ImgPipeline, refiner=True)


def images(pipeline: Any, *, seeds: tuple[int, ...] = (0,), prompt: Any = PROMPT, **arguments: Any) -> Tensor:
    """What either pipeline draws, with the sampler of the model."""
    own: Any = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler = {"sampler": "euler"} if isinstance(pipeline, FastCachePipeline) else {}
    given = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt", "height": 32, "width": 32}
    return pipeline(prompt, **{**given, **sampler, "generator": own if len(own) > 1 else own[0], **arguments}).images


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"negative_prompt": "blue"},
        {"negative_prompt": ""},
        {"prompt_2": "a cat", "negative_prompt": "b", "negative_prompt_2": "c"},
        {"prompt": ["a", "b"], "prompt_2": ["c", "d"], "seeds": (1, 2)},
        {"num_images_per_prompt": 2, "seeds": (1, 2), "guidance_rescale": 0.5},
        {"guidance_scale": 1.0},
        {"clip_skip": 1, "negative_prompt": "b"},
        {"original_size": (64, 48), "crops_coords_top_left": (8, 4), "target_size": (40, 40)},
        {
            "negative_original_size": (16, 16),
            "negative_target_size": (64, 64),
            "negative_crops_coords_top_left": (2, 2),
        },
        {"denoising_end": 0.7, "output_type": "latent"},
    ],
    ids=lambda arguments: ",".join(arguments) or "default",
)
def test_base_arguments_mean_what_they_mean_in_diffusers(arguments: dict[str, Any], base: Both) -> None:
    pipe, reference = base
    drawn = images(pipe, **arguments)
    assert psnr_db(drawn, images(reference, **arguments)) >= 50
    if arguments and arguments.get("output_type") != "latent":
        assert not torch.allclose(drawn, images(pipe).expand_as(drawn), atol=1e-4)


def test_embeddings_come_with_their_pooled_ones(base: Both) -> None:
    pipe, reference = base
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    found = dict(zip(names, reference.encode_prompt("a cat", negative_prompt="dog"), strict=True))
    assert psnr_db(images(pipe, prompt=None, **found), images(reference, prompt=None, **found)) >= 50
    del found["pooled_prompt_embeds"]
    with pytest.raises(ValueError, match=r"expected pooled_prompt_embeds with prompt_embeds for "):
        images(pipe, prompt=None, **found)


def test_invariant_2_holds_for_both(base: Both, refiner: Both) -> None:
    for pipe, _ in (base, refiner):
        parity = pipe.bundle.manifest.parity
        assert max(parity.full_vs_model, parity.shallow_vs_full) < 1e-4
    assert set(base[0].bundle.manifest.engines) >= {"text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"}
    assert "text_encoder" not in refiner[0].bundle.manifest.engines


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"negative_prompt": "blue", "strength": 0.6},
        {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0, "strength": 0.6},
        {"num_images_per_prompt": 2, "seeds": (4, 5), "strength": 0.5},
        {"denoising_start": 0.6},
        {"denoising_start": 0.3, "denoising_end": 0.8, "output_type": "latent"},
    ],
    ids=lambda arguments: ",".join(arguments) or "default",
)
def test_refiner_arguments_mean_what_they_mean_in_diffusers(arguments: dict[str, Any], refiner: Both) -> None:
    pipe, reference = refiner
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    if "denoising_start" in arguments:
        image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    size = {"height": None, "width": None}
    drawn = images(pipe, image=image, **size, **arguments)
    expected = pipe_without_size(reference, image=image, **arguments)
    assert psnr_db(drawn, expected) >= 50


def pipe_without_size(reference: Any, **arguments: Any) -> Tensor:
    """diffusers' image to image pipelines take their size from the image alone."""
    return images(lambda prompt, height, width, **others: reference(prompt, **others), **arguments)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++_2m"])
def test_the_base_hands_over_to_the_refiner(sampler: str, base: Both, refiner: Both) -> None:
    for _, reference in (base, refiner):
        reference.scheduler = make_scheduler(sampler, reference.scheduler.config)
    given: dict[str, Any] = {"num_inference_steps": 12}
    names = {"sampler": sampler}
    handed = images(base[0], denoising_end=0.75, output_type="latent", **given, **names)
    drawn = images(refiner[0], image=handed, denoising_start=0.75, **given, **names)
    theirs = images(base[1], denoising_end=0.75, output_type="latent", **given)
    expected = pipe_without_size(refiner[1], image=theirs, denoising_start=0.75, **given)
    assert psnr_db(drawn, expected) >= 50
    cached = images(base[0], denoising_end=0.75, output_type="latent", cache_interval=3, **given, **names)
    assert not torch.allclose(cached, handed)


def test_generate_hands_over_to_a_refiner(
    base: Both, refiner: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.png"
    flags = ["--prompt", PROMPT, "--prompt-2", "a cat", "--steps", 12, "--sampler", "euler", "--guidance-scale", 5]
    flags += ["--original-size", 64, 48, "--aesthetic-score", 7, "--cache-interval", 2, "--denoising-end", 0.75]
    engines = ["--engines", base[0].bundle.path, "--refiner", refiner[0].bundle.path]
    monkeypatch.setattr(sys, "argv", ["fastcache", "generate", *map(str, engines + flags), "--output", str(file)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    given: dict[str, Any] = {"num_inference_steps": 12, "cache_interval": 2, "prompt_2": "a cat"}
    given |= {"original_size": (64, 48), "aesthetic_score": 7.0}
    generator = torch.Generator().manual_seed(0)
    handed = images(base[0], **given, denoising_end=0.75, output_type="latent", generator=[generator])
    drawn = images(refiner[0], **given, image=handed, denoising_start=0.75, output_type="pil", generator=[generator])
    with Image.open(file) as found:
        assert found.tobytes() == drawn[0].tobytes()
        assert found.info["refiner"] == refiner[0].bundle.manifest.bundle_sha256
