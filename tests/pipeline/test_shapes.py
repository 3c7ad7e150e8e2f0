"""One bundle at several sizes and prompt lengths; clip_skip, long and weighted prompts as in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

import fastcache
from build_store import BuildStore
from fastcache import BackendUnavailable, FastCachePipeline
from fastcache.bundle.recipe import Size
from fastcache.evaluate.quality import psnr_db

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning", "ignore:.*tokens of the prompt"),
]

SIZES = ("32x32", "48x32", "64x64")
STEPS = 6
MOST_TOKENS = 24


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def pipe(request: pytest.FixtureRequest, tiny_model: Path, builds: BuildStore) -> Any:
    bundle = builds.bundle(tiny_model, backend=request.param, sizes=SIZES, max_tokens=MOST_TOKENS)
    return fastcache.load(bundle.path)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    found = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def images(pipeline: Any, prompt: Any = "a cat", **arguments: Any) -> Tensor:
    own = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": STEPS, "output_type": "pt", "generator": own, "height": 32, "width": 32}
    return pipeline(prompt, **{**given, **arguments}).images


def test_every_size_of_a_bundle_draws_what_diffusers_draws(pipe: FastCachePipeline, reference: Any) -> None:
    for text in (*SIZES, SIZES[0]):
        size = Size.model_validate(Size.parse(text))
        given: dict[str, Any] = {"height": size.height, "width": size.width, "num_images_per_prompt": 2}
        drawn = images(pipe, **given)
        assert drawn.shape == (2, 3, size.height, size.width)
        assert psnr_db(drawn, images(reference, **given)) >= 50
        cached = images(pipe, **given, cache_interval=2)
        assert cached.isfinite().all()
        assert not torch.equal(cached, drawn)
    assert images(pipe, height=None, width=None).shape == (1, 3, 32, 32)  # the first is the usual one


def test_the_manifest_names_the_sizes(pipe: FastCachePipeline) -> None:
    manifest = pipe.bundle.manifest
    assert [str(size) for size in manifest.sizes] == list(SIZES)
    profiles = {name: str(profile) for name, profile in manifest.profiles.items()}
    assert profiles == {"batch": "1:1:4", "height": "32:32:64", "width": "32:32:64", "tokens": "8:8:24"}
    assert [spec.shape for spec in manifest.engines["vae_decoder"].outputs] == [("batch", 3, "height", "width")]


@pytest.mark.parametrize("asked", [(32, 48), (64, 48), (48, 48), (96, 96)])
def test_another_size_is_refused_with_the_list(asked: tuple[int, int], pipe: FastCachePipeline) -> None:
    width, height = asked
    sizes = ", ".join(SIZES)
    with pytest.raises(ValueError, match=rf"^expected {sizes}, .* got {width}x{height}; build .*--sizes"):
        images(pipe, height=height, width=width)


def test_image_to_image_at_a_size_of_its_own(pipe: FastCachePipeline) -> None:
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    drawn = images(pipe, image=image, strength=0.5, height=None, width=None)
    assert drawn.shape == image.shape


@pytest.mark.parametrize("tokens", [8, 16, MOST_TOKENS])
def test_long_prompts_by_embeddings(tokens: int, pipe: FastCachePipeline, reference: Any) -> None:
    embeds = torch.randn(2, 1, tokens, 16, generator=torch.Generator().manual_seed(2))
    given = {"prompt": None, "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    assert psnr_db(images(pipe, **given), images(reference, **given)) >= 50


@pytest.mark.parametrize("tokens", [7, MOST_TOKENS + 1])
def test_prompts_beyond_the_bundle_are_refused(tokens: int, pipe: FastCachePipeline) -> None:
    embeds = torch.zeros(1, tokens, 16)
    with pytest.raises(ValueError, match=rf"prompts of 8 to {MOST_TOKENS} tokens, got {tokens}; build with --max-tok"):
        images(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=embeds)


def test_weighted_prompts_by_embeddings(pipe: FastCachePipeline, reference: Any) -> None:
    positive, negative = reference.encode_prompt("a cat", "cpu", 1, True, negative_prompt="dog")
    given = {"prompt": None, "prompt_embeds": 1.3 * positive, "negative_prompt_embeds": negative}
    drawn = images(pipe, **given)
    assert psnr_db(drawn, images(reference, **given)) >= 50
    assert not torch.allclose(drawn, images(pipe, "a cat", negative_prompt="dog"), atol=1e-4)


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_clip_skip_leaves_out_layers_as_in_diffusers(
    clip_skip: int | None, pipe: FastCachePipeline, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers 0.42 asks for an attribute that text encoders of transformers 5 no longer have.
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    given = {"clip_skip": clip_skip, "negative_prompt": "dog"}
    drawn = images(pipe, **given)
    assert psnr_db(drawn, images(reference, **given)) >= 50
    assert torch.allclose(drawn, images(pipe, negative_prompt="dog"), atol=1e-5) == (not clip_skip)


def test_a_clip_skip_that_is_not_there(pipe: FastCachePipeline) -> None:
    for clip_skip, what in ((-1, "to be a whole number of 0 or more"), (3, "from 0 to 2")):
        with pytest.raises(ValueError, match=f"expected clip_skip {what}, got {clip_skip}"):
            images(pipe, clip_skip=clip_skip)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sizes": ("32x32", "32x32")}, "recipe: expected sizes to name each once, got 32x32, 32x32"),
        ({"sizes": ("32x32",), "height": 32}, "recipe: expected either sizes or height and width, got both"),
        ({"sizes": ("32",)}, "sizes.0: expected WIDTHxHEIGHT, got '32'"),
        ({"sizes": ("4x32",)}, "sizes.0.width: .* 8, got 4"),
    ],
)
def test_bad_sizes(fields: dict[str, Any], expected: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{expected}"):
        fastcache.build_engines(tiny_model, output=tmp_path / "out", **fields)


def test_a_backend_of_one_prompt_length_says_so(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"serve several prompt lengths, got inductor; leave max_tokens out"):
        fastcache.build_engines(tiny_model, output=tmp_path / "out", backend="inductor", max_tokens=24)
