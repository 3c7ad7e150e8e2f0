"""Oracle: image to image and inpainting against diffusers' pipelines, on the bundled model and one of 9 channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    IPNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.utils import load_image
from PIL import Image
from torch import Tensor

import fastcache
from build_store import BuildStore
from fastcache import FastCachePipeline
from fastcache.demo import MODEL_DIRECTORY
from fastcache.evaluate.quality import psnr_db
from fastcache.pipeline.images import of_bytes, read_image
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler
from tiny_model import save_tiny_model

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning", "ignore:You have passed 2 text prompts")

PROMPT = "a large red circle at the left on a white background"
STEPS = 6


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(seed: int, size: int) -> Image.Image:
    """Soft random colours."""
    noise = torch.rand(1, 3, 4, 4, generator=seeded(seed)[0])
    smooth = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy())


def half(size: int) -> Image.Image:
    """A mask: the right half is to be drawn."""
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (size // 2, 0, size, size))
    return mask


@pytest.fixture(scope="module")
def pipe(demo_bundle: Callable[[int], fastcache.Bundle]) -> FastCachePipeline:
    return fastcache.load(demo_bundle(0).path)


def diffusers_pipeline(kind: Any, folder: Path) -> Any:
    reference = kind.from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="module")
def img2img() -> Any:
    return diffusers_pipeline(StableDiffusionImg2ImgPipeline, MODEL_DIRECTORY)


@pytest.fixture(scope="module")
def inpaint() -> Any:
    return diffusers_pipeline(StableDiffusionInpaintPipeline, MODEL_DIRECTORY)


def images(pipeline: Any, *, seeds: tuple[int, ...] | int = 0, prompt: Any = PROMPT, **arguments: Any) -> Tensor:
    """What either pipeline draws. Shapes: returns (N, 3, H, W) in [0, 1]."""
    own = seeded(*seeds) if isinstance(seeds, tuple) else seeded(seeds)[0]
    usual = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "pt", "generator": own}
    return pipeline(prompt, **(usual | arguments)).images


def use_sampler(reference: Any, name: str) -> None:
    reference.scheduler = make_scheduler(
        name, DDIMScheduler.from_pretrained(MODEL_DIRECTORY, subfolder="scheduler").config
    )


@pytest.fixture(scope="module")
def of_noise(pipe: FastCachePipeline) -> Tensor:
    """What is drawn where no image is given."""
    return images(pipe, sampler="ddim")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_begins_as_in_diffusers_for_every_sampler(
    sampler: str, pipe: FastCachePipeline, img2img: Any, of_noise: Tensor
) -> None:
    use_sampler(img2img, sampler)
    given = {"image": picture(0, 64), "strength": 0.55}
    drawn = images(pipe, **given, sampler=sampler)
    assert psnr_db(drawn, images(img2img, **given)) >= 50
    assert psnr_db(drawn, of_noise) < 40


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"strength": 1.0},
        {"strength": 0.2, "guidance_scale": 1.0},
        {"image": [0, 1], "prompt": [PROMPT, "a blue ring"], "seeds": (5, 6)},
        {"num_images_per_prompt": 2, "seeds": (3, 4)},
        {"num_images_per_prompt": 2, "sampler": "euler_a"},
        {"image": "latents", "strength": 0.4},
    ],
    ids=lambda arguments: ",".join(map(str, arguments)) or "default",
)
def test_img2img_arguments_mean_what_they_mean_in_diffusers(
    arguments: dict[str, Any], pipe: FastCachePipeline, img2img: Any
) -> None:
    given = dict(arguments)
    sampler = given.pop("sampler", "ddim")
    use_sampler(img2img, sampler)
    which = given.pop("image", 0)
    if which == "latents":
        given["image"] = torch.randn(1, 4, 16, 16, generator=seeded(8)[0])
    else:
        given["image"] = [picture(i, 64) for i in which] if isinstance(which, list) else picture(which, 64)
    assert psnr_db(images(pipe, **given, sampler=sampler), images(img2img, **given)) >= 50


def test_an_image_is_resized_where_a_size_is_asked_for(pipe: FastCachePipeline, inpaint: Any) -> None:
    use_sampler(inpaint, "ddim")
    given = {"image": picture(1, 100), "mask_image": half(90), "height": 64, "width": 64}
    assert psnr_db(images(pipe, **given), images(inpaint, **given)) >= 50


INPAINT_SAMPLERS = ["ddim", "euler", "euler_a", "dpm++_2m", "pndm", "unipc", "heun"]


@pytest.mark.parametrize("sampler", INPAINT_SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_mask_keeps_the_rest_as_in_diffusers(
    sampler: str, strength: float, pipe: FastCachePipeline, inpaint: Any
) -> None:
    use_sampler(inpaint, sampler)
    given = {"image": picture(0, 64), "mask_image": half(64), "strength": strength}
    assert psnr_db(images(pipe, **given, sampler=sampler), images(inpaint, **given)) >= 50


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_another_mask_is_another_picture(strength: float, pipe: FastCachePipeline) -> None:
    given = {"image": picture(0, 64), "strength": strength}
    drawn, all_new = (images(pipe, **given, mask_image=m) for m in (half(64), Image.new("L", (64, 64), 255)))
    assert psnr_db(drawn, all_new) < 40


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_images_per_prompt": 2, "seeds": (1, 2)},
        {"num_images_per_prompt": 2, "eta": 1.0},
        {"prompt": [PROMPT] * 2, "two": True, "seeds": (1, 2), "eta": 1.0},
        {"guidance_scale": 1.0, "strength": 0.7},
    ],
    ids=lambda arguments: ",".join(arguments),
)
def test_inpaint_arguments_mean_what_they_mean_in_diffusers(
    arguments: dict[str, Any], pipe: FastCachePipeline, inpaint: Any
) -> None:
    use_sampler(inpaint, "ddim")
    given = dict(arguments)
    given["image"] = [picture(0, 64), picture(1, 64)] if given.pop("two", False) else picture(0, 64)
    given["mask_image"] = half(64)
    assert psnr_db(images(pipe, **given), images(inpaint, **given)) >= 50


def test_caching_works_from_an_image_and_under_a_mask(pipe: FastCachePipeline) -> None:
    given: dict[str, Any] = {"image": picture(0, 64), "strength": 0.8, "num_inference_steps": 20}
    full = images(pipe, **given)
    cached = images(pipe, **given, cache_interval=3)
    assert 20 <= psnr_db(cached, full) < 60
    kept, again = (images(pipe, **given, mask_image=half(64), cache_interval=n, output_type="latent") for n in (3, 1))
    assert torch.equal(kept[..., :8], again[..., :8])  # the image's own, whatever was drawn beside it
    assert not torch.equal(kept[..., 8:], again[..., 8:])


@pytest.fixture(scope="module")
def nine_channels(builds: BuildStore) -> tuple[FastCachePipeline, Any]:
    """A small inpainting model of 9 channels, both as a bundle and in diffusers."""
    model = builds.model("tiny-inpaint", lambda folder: save_tiny_model(folder, in_channels=9))
    bundle = builds.bundle(model, components=("unet", "vae"))
    return fastcache.load(bundle.path), diffusers_pipeline(StableDiffusionInpaintPipeline, model)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"strength": 0.5}, {"num_images_per_prompt": 2, "seeds": (1, 2)}], ids=str)
def test_a_unet_of_nine_channels_is_told_what_the_mask_leaves(
    arguments: dict[str, Any], nine_channels: tuple[FastCachePipeline, Any]
) -> None:
    pipe, reference = nine_channels
    embeds = torch.randn(2, 1, 8, 16, generator=seeded(3)[0])
    given = {
        "prompt": None,
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "image": picture(0, 32),
        "mask_image": half(32),
        **arguments,
    }
    drawn = images(pipe, **given)
    assert psnr_db(drawn, images(reference, **given)) >= 50
    assert psnr_db(drawn, images(pipe, **{**given, "image": picture(1, 32)})) < 50
    with pytest.raises(ValueError, match=r"expected image and mask_image for .*, whose U-Net takes 9 channels"):
        images(pipe, **{**given, "mask_image": None})


@pytest.fixture(scope="module")
def editor(builds: BuildStore) -> tuple[FastCachePipeline, Any]:
    """A small InstructPix2Pix, both as a bundle and in diffusers."""
    model = builds.model("tiny-editor", lambda folder: save_tiny_model(folder, in_channels=8))
    bundle = builds.bundle(model, components=("unet", "vae"))
    return fastcache.load(bundle.path), diffusers_pipeline(StableDiffusionInstructPix2PixPipeline, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"image_guidance_scale": 1.1, "guidance_scale": 3.0},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2, "seeds": (1, 2)},
        {"sampler": "euler"},
    ],
    ids=str,
)
def test_an_image_is_edited_as_in_diffusers(arguments: dict[str, Any], editor: tuple[FastCachePipeline, Any]) -> None:
    pipe, reference = editor
    embeds = torch.randn(2, 1, 8, 16, generator=seeded(3)[0])
    own = {"sampler": arguments.get("sampler", "ddim")}
    reference.scheduler = make_scheduler(own["sampler"], pipe.bundle.manifest.model.scheduler)
    given: dict[str, Any] = {
        "prompt": None,
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "image": picture(0, 32),
        **{name: value for name, value in arguments.items() if name != "sampler"},
    }
    drawn = images(pipe, **given, **own)
    assert psnr_db(drawn, images(reference, **given)) >= 50
    assert psnr_db(drawn, images(pipe, **{**given, "image": picture(1, 32)}, **own)) < 50
    cached = images(pipe, **given, **own, cache_interval=2)
    assert cached.isfinite().all()
    for more, message in (({"strength": 0.5}, "no strength"), ({"image": None}, "expected image for")):
        with pytest.raises(ValueError, match=message):
            images(pipe, **{**given, **more})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"strength": 1.5}, "strength to be a finite number from 0 to 1, got 1.5"),
    ({"strength": 0.01}, "a part of 6 steps with a step in it, got strength 0.01"),
    ({"image": None, "strength": 0.5}, "an image with strength, got none"),
    ({"image": None, "mask_image": half(64)}, "an image with mask_image, got none"),
    ({"image": picture(0, 80)}, "an image of 64x64, .* got 80x80; give height and width to resize it"),
    ({"latents": torch.zeros(1, 4, 16, 16)}, "latents or image, got both"),
    ({"image": "cat.png"}, "image as PIL images"),
    ({"image": [picture(0, 64)] * 3}, "one image, or as many as divide 1 pictures, got 3"),
    ({"image": torch.zeros(1, 4, 8, 8)}, r"got 32x32|latents of size \[16, 16\], got \[8, 8\]"),
    ({"image": torch.zeros(1, 4, 16, 16), "mask_image": half(64)}, "an image beside a mask_image, got latents"),
    ({"denoising_start": 1.0}, "denoising_start between 0 and 1, got 1.0"),
    ({"denoising_start": 0.8, "denoising_end": 0.5}, "denoising_start below denoising_end"),
    ({"original_size": (64, 64)}, "no original_size, which only models of SDXL's kind are told"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_images_are_refused_in_one_line(arguments: dict[str, Any], message: str, pipe: FastCachePipeline) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        images(pipe, **{"image": picture(0, 64), **arguments})
    assert "\n" not in str(caught.value)


def saved(folder: Path, name: str, image: Image.Image, **how: Any) -> Path:
    image.save(folder / name, **how)
    return folder / name


def test_a_picture_in_a_file_is_upright_and_of_8_bits(tmp_path: Path) -> None:
    lying = picture(3, 64).crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # held so that it must be turned by a quarter
    file = saved(tmp_path, "phone.jpg", lying, exif=exif, quality=95)
    upright = read_image(file)
    assert upright.size == (32, 64)
    assert np.abs(np.asarray(upright).astype(int) - np.asarray(load_image(str(file))).astype(int)).max() <= 1

    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    deep = Image.fromarray(ramp)
    for found in (read_image(saved(tmp_path, "deep.png", deep)), deep):
        pixels = np.asarray(found.convert("L") if found is not deep else of_bytes(deep))
        assert np.abs(pixels.astype(int) - ramp // 257).max() <= 1
    with pytest.raises(ValueError, match="a picture of mode F, which says nothing of its range; convert it"):
        of_bytes(Image.new("F", (8, 8)))


def test_pictures_without_values_are_refused(pipe: FastCachePipeline) -> None:
    nan = torch.full((1, 3, 64, 64), torch.nan)
    for arguments in ({"image": nan}, {"image": picture(0, 64), "mask_image": nan[:, :1]}):
        with pytest.raises(ValueError, match=f"expected {list(arguments)[-1]} to be finite"):
            images(pipe, **arguments)
    with pytest.raises(ValueError, match="image to be finite"):
        images(pipe, image=torch.full((1, 4, 16, 16), torch.inf), height=64, width=64)


def test_a_scheduler_that_cannot_begin_with_an_image_says_so(pipe: FastCachePipeline) -> None:
    given = {"image": picture(0, 64), "sampler": IPNDMScheduler()}
    with pytest.raises(ValueError, match="with add_noise to begin with an image, got IPNDMScheduler; choose another"):
        images(pipe, **given)
