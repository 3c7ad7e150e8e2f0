"""Presets that take something else than a prompt: they build, draw what diffusers draws, and can be timed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, StableDiffusionPipeline
from torch import Tensor

import fastcache
from build_store import BuildStore
from fastcache.bench.bench import document, run_bench
from fastcache.bench.lineup import Wishes, of_bundle, of_model
from fastcache.bench.work import empty_unet
from fastcache.bundle.bundle import Bundle
from fastcache.bundle.recipe import recipe_from
from fastcache.compile.describe import describe, shapes
from fastcache.compile.models import find_model
from fastcache.compile.presets import PRESETS
from fastcache.evaluate.quality import psnr_db
from fastcache.health.verify import verify_bundle
from fastcache.pipeline.images import Start
from fastcache.pipeline.request import Request
from fastcache.sampler.scheduler import make_scheduler
from small_presets import SMALL_PRESETS, python_path

DDPM, LDM, REFINER, EDITS = "small-ddpm256", "small-ldm4g", "small-sdxl-refiner", "small-instruct-pix2pix"
ONCE_MORE = pytest.mark.slow  # a build takes 10 s of one core, nearly all of it the exporter's
STEPS = 6
COMMON: dict[str, Any] = {
    "cache_interval": 2,
    "steps": 4,
    "batch": 2,
    "sampler": "ddim",
    "warmup": 0,
    "repeats": 1,
    "threads": 1,
}
Built = Callable[..., Bundle]


@pytest.fixture(scope="module")
def built(builds: BuildStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """Builds a small preset for a backend, while this process and those it starts know them."""
    folder = tmp_path_factory.mktemp("presets")
    with pytest.MonkeyPatch.context() as patch:
        for name, preset in SMALL_PRESETS.items():
            patch.setitem(PRESETS, name, preset)
        patch.setenv("PYTHONPATH", python_path(folder))

        def build(name: str, backend: str = "onnxruntime") -> Bundle:
            return builds.bundle(name, backend=backend, random_weights=True, batch="1:1:2")

        yield build


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def drawn(
    bundle: Bundle, cache_interval: int = 1, *, guided: bool, start: Start | None = None, **arguments: Any
) -> Tensor:
    """`arguments` are a request's, and the U-Net's inputs; `start` takes the place of noise."""
    pipe = fastcache.load(bundle.path, threads=1)
    own = {name: arguments.pop(name) for name in list(arguments) if name in inspect.signature(Request).parameters}
    request = Request(**own, sampler="ddim", num_inference_steps=STEPS, cache_interval=cache_interval)
    run = pipe.start(request, arguments, guided=guided)
    if start is not None:
        start.fill(run)
    *_, last = run.steps
    return last.latents.clone()


def agreement_db(ours: Tensor, theirs: Tensor) -> float:
    """PSNR of latents, scaled to the range that pictures have."""
    low, high = theirs.min(), theirs.max()
    return psnr_db((ours - low) / (high - low), (theirs - low) / (high - low))


def pipeline_of(kind: Any, bundle: Bundle, **parts: Any) -> Any:
    """diffusers' own pipeline of the bundle's model."""
    model = find_model(bundle.manifest.recipe.model, random_weights=True)
    pipe = kind(unet=model.load_unet(), scheduler=make_scheduler("ddim", model.scheduler), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_image_model_without_conditioning_draws_what_diffusers_draws(built: Built, backend: str) -> None:
    bundle = built(DDPM, backend)
    model = bundle.manifest.model
    assert (model.tokens, model.unconditional, model.guided_rows) == (0, True, 1)
    assert "tokens" not in bundle.manifest.profiles
    assert [spec.name for spec in bundle.manifest.engines["full"].inputs] == ["sample", "timestep"]
    assert verify_bundle(bundle.path).problems == []

    theirs = pipeline_of(DDIMPipeline, bundle)(
        batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=STEPS, output_type="np"
    ).images
    generators = [torch.Generator().manual_seed(3), torch.Generator()]
    noise = torch.randn(2, 3, 16, 16, generator=generators[0])
    ours = drawn(bundle, guided=False, latents=noise)
    pictures = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert psnr_db(pictures, torch.from_numpy(theirs)) >= 50
    assert 20 < agreement_db(drawn(bundle, 2, guided=False, latents=noise), ours) < 200
    assert drawn(bundle, guided=False, generator=generators).shape == noise.shape
    with pytest.raises(ValueError, match=f"guided=False for {DDPM}"):
        drawn(bundle, guided=True, latents=noise)
    with pytest.raises(ValueError, match="expected the inputs none, got encoder_hidden_states"):
        drawn(bundle, guided=False, encoder_hidden_states=random(2, 1, 24))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_class_conditional_model_draws_what_diffusers_draws(built: Built, backend: str) -> None:
    """LDM-4-G attends to one token, the class's embedding."""
    bundle = built(LDM, backend)
    assert bundle.manifest.profiles["tokens"].max == bundle.manifest.model.tokens == 1
    assert (bundle.manifest.height, bundle.manifest.width) == (64, 64)
    assert verify_bundle(bundle.path).problems == []

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    no_class, classes, noise = random(1, 1, 24).expand(2, 1, 24), random(2, 1, 24), random(2, 3, 16, 16)
    theirs = pipeline_of(StableDiffusionPipeline, bundle, **parts)(
        prompt_embeds=classes,
        negative_prompt_embeds=no_class,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
    ).images
    draw = partial(
        drawn, bundle, encoder_hidden_states=torch.cat([no_class, classes]), latents=noise, guidance_scale=3.0
    )
    assert agreement_db(draw(guided=True), theirs) >= 50
    assert agreement_db(draw(guided=False, encoder_hidden_states=no_class), theirs) < 40
    with pytest.raises(ValueError, match="prompts of 1 tokens, got 77"):
        drawn(bundle, guided=False, encoder_hidden_states=random(2, 77, 24))


@pytest.mark.parametrize(
    ("name", "backend", "rows"),
    [
        pytest.param(DDPM, "onnxruntime", 1, marks=ONCE_MORE),
        pytest.param(LDM, "openvino", 2, marks=ONCE_MORE),
        pytest.param(REFINER, "onnxruntime", 2, marks=ONCE_MORE),
        pytest.param(EDITS, "onnxruntime", 3, marks=ONCE_MORE),
    ],
)
def test_all_arms_of_a_benchmark_run_the_same_loop(name: str, backend: str, rows: int, built: Built) -> None:
    """They share their inputs: the engines leave eager's latents, and with caching those of DeepCache's helper."""
    bundle = built(name, backend)
    settings, lineup, bundles = of_bundle(bundle.path, Wishes(arms="eager,deepcache,engine,engine+cache"), COMMON)
    assert settings.guided_rows == rows
    measured = run_bench(settings, lineup, bundles, lambda _: None)
    results: dict[str, Any] = {result.name: result for result in measured.results}
    assert [result.skipped for result in measured.results] == [None] * 4
    assert all(result.loop_ms_p50 for result in measured.results)
    assert results["engine"].latents_error_vs_eager < 1e-3
    cached, theirs = results["engine+cache"].latents_error_vs_eager, results["deepcache"].latents_error_vs_eager
    assert cached == pytest.approx(theirs, rel=1e-2, abs=1e-5)
    assert cached > 1e-4
    conditions = document(settings, bundles, measured)["settings"]
    assert conditions["guidance_scale"] == {DDPM: None, REFINER: 5.0}.get(name, 7.5)


@pytest.mark.slow
def test_an_edited_picture_counts(built: Built) -> None:
    """InstructPix2Pix: three rows an image, and the picture to edit beside the latents."""
    bundle = built(EDITS)
    text, noise, picture = random(3, 77, 24), random(1, 4, 16, 16), random(3, 4, 16, 16)
    draw = partial(drawn, bundle, encoder_hidden_states=text, guided=True, image_guidance_scale=1.5)
    blank = draw(start=Start(noise, torch.zeros_like(picture)))
    assert torch.equal(draw(start=Start(noise, torch.zeros_like(picture))), blank)
    assert agreement_db(draw(start=Start(noise, picture)), blank) < 40


def test_the_size_is_the_presets_own() -> None:
    for name, size in (("ldm4g", 256), ("ddpm256", 256), ("sdxl-refiner", 1024)):
        settings, _ = of_model(name, True, Wishes(arms="eager"), COMMON)
        assert (settings.height, settings.width) == (size, size)


def test_videos_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="svd-xt, a model of videos"):
        fastcache.build_engines("svd-xt", tmp_path / "none", random_weights=True)
    with pytest.raises(ValueError, match="svd-xt, a model of videos"):
        of_model("svd-xt", True, Wishes(), COMMON)


def test_longer_prompts_of_a_model_without_text_are_refused() -> None:
    model = find_model("ddpm256", random_weights=True)
    unet: Any = empty_unet(model)
    recipe = recipe_from({"model": "ddpm256", "random_weights": True, "max_tokens": 8})
    with pytest.raises(ValueError, match="no max_tokens for ddpm256"):
        shapes(unet, recipe, describe(model, unet))
