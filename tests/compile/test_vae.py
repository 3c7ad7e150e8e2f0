"""Other VAEs than a model's own, decoding in tiles, and the dtypes of `auto` and of what is around a bf16 U-Net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import fastcache
import fastcache_engines
from build_store import BuildStore
from fastcache.bundle.recipe import recipe_from
from fastcache.compile import components, worker
from fastcache.compile.builder import Job, resolve
from fastcache.compile.calibrate import token_ids
from fastcache.compile.models import find_model
from fastcache.compile.workshop import LEAST_TEXT_SNR_DB, LEAST_VAE_PSNR_DB, OutOfTolerance
from fastcache.demo import MODEL_DIRECTORY
from fastcache.evaluate.quality import psnr_db
from fastcache.loop.steps import foretold
from fastcache.pipeline.images import in_tiles
from fastcache.pipeline.request import Request
from fastcache_engines import LoadOptions, registry


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny of random weights, for four latent channels of 8 pixels."""
    return saved_vae(tmp_path_factory.mktemp("vae"), seed=0)


def saved_vae(folder: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks, each = (8, 8, 8, 8), (1, 1, 1, 1)
        AutoencoderTiny(
            encoder_block_out_channels=blocks,
            decoder_block_out_channels=blocks,
            num_encoder_blocks=each,
            num_decoder_blocks=each,
        ).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_tiny_vae_is_what_diffusers_makes_of_it(tiny_vae: Path) -> None:
    vae: Any = AutoencoderTiny.from_pretrained(tiny_vae)
    decoder = components.exportable_vae_decoder(vae, 4, 6, 8)
    wanted = (vae.decode(decoder.inputs["latents"]).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(decoder.module(decoder.inputs), wanted)
    encoder = components.exportable_vae_encoder(vae, 4, 6, 8)
    mean, deviation = encoder.module(encoder.inputs)
    assert torch.equal(mean, vae.encode(encoder.inputs["image"]).latents)
    assert not deviation.any()


def test_another_vae_is_another_model(tiny_model: Path, tiny_vae: Path, tmp_path: Path) -> None:
    own, other = (find_model(str(tiny_model), vae=vae) for vae in (None, str(tiny_vae)))
    assert own.weights_sha256 != other.weights_sha256
    assert isinstance(own.load_vae(), AutoencoderKL)
    assert isinstance(other.load_vae(), AutoencoderTiny)
    with pytest.raises(ValueError, match=r"expected vae to be a VAE's folder \(with config.json\)"):
        find_model(str(tiny_model), vae=str(tmp_path))
    beside = find_model(str(tiny_model), preview_vae=str(tiny_vae))
    assert isinstance(beside.load_vae(), AutoencoderKL)
    assert isinstance(beside.load_preview_vae(), AutoencoderTiny)
    assert len({own.weights_sha256, other.weights_sha256, beside.weights_sha256}) == 3
    with pytest.raises(
        ValueError, match=r"expected AutoencoderKL or AutoencoderTiny as vae in .*, got UNet2DConditionModel"
    ):
        find_model(str(tiny_model), vae=str(tiny_model / "unet"))


@given(st.integers(8, 40), st.integers(8, 40))
def test_tiles_of_a_local_decoder_are_the_whole_picture(height: int, width: int) -> None:
    latents = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))

    def decode(part: Tensor) -> Tensor:
        assert part.shape[2:] == (8, 8)
        return functional.interpolate(part, scale_factor=2)

    assert torch.allclose(in_tiles(decode, latents, 8, 2), functional.interpolate(latents, scale_factor=2), atol=1e-6)


@torch.no_grad()
def test_tiles_leave_no_seam() -> None:
    """The bundled VAE's norms look at all that they are given; where tiles meet it is as smooth as elsewhere."""
    vae = AutoencoderKL.from_pretrained(MODEL_DIRECTORY, subfolder="vae", torch_dtype=torch.float32)
    decoder, latents = components.VAEDecoder(vae), components.example_latents(vae, 128, 128)
    whole = decoder({"latents": latents})
    tiled = in_tiles(lambda part: decoder({"latents": part}), latents, 24, 4)
    assert tiled.shape == whole.shape
    assert psnr_db(tiled, whole) > 20
    off = (tiled - whole).diff(dim=-1).abs().mean(dim=(0, 1, 2))  # from column to column, of what tiles change
    assert off.max() < 6 * off.median()


def test_tiles_must_fit(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vae_tile of 32 pixels or fewer"):
        worker.build(resolve(recipe_from({"model": str(tiny_model), "vae_tile": 64})), tmp_path, lambda _: None)


@pytest.mark.slow
def test_a_bundle_with_another_vae_draws_what_diffusers_draws(
    tiny_model: Path, tiny_vae: Path, builds: BuildStore, tmp_path: Path
) -> None:
    """Also image to image, where latents are no distribution, so that no noise is drawn for them."""
    other = saved_vae(tmp_path, seed=1)
    pipe = fastcache.load(builds.bundle(tiny_model, vae=str(tiny_vae), preview_vae=str(other)).path)
    assert not pipe.bundle.manifest.model.vae_draws
    vae = AutoencoderTiny.from_pretrained(tiny_vae)
    theirs: Any = StableDiffusionPipeline.from_pretrained(tiny_model, vae=vae, dtype=torch.float32)
    common: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 4, "output_type": "pt"}

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    wanted = theirs(**common, generator=generator())
    assert psnr_db(pipe(**common, generator=generator()).images, wanted.images) > 60
    picture = torch.rand(1, 3, 64, 64, generator=generator())
    common |= {"image": picture, "strength": 0.75}
    wanted = StableDiffusionImg2ImgPipeline(**theirs.components)(**common, generator=generator())
    assert psnr_db(pipe(**common, generator=generator()).images, wanted.images) > 60
    # A picture on its way is decoded by the VAE for that.
    run = pipe.begin(Request(prompt="a red circle", num_inference_steps=4, generator=generator()))
    (preview,) = [pipe.preview(run, step.index) for step in run.steps][3:]
    small: Any = AutoencoderTiny.from_pretrained(other)
    latents = foretold(run, 3, pipe.bundle.manifest.model.scheduler.get("prediction_type", "epsilon"))
    with torch.no_grad():
        shown = (small.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    off = torch.from_numpy(np.asarray(preview) / 255).permute(2, 0, 1)[None] - shown
    assert off.abs().max() < 1 / 255


def job_of(**fields: Any) -> Job:
    return resolve(recipe_from({"model": "demo", **fields}))


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_the_fastest_dtype(fast: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "fast_bf16", lambda: fast)
    job = job_of()
    assert job.dtype == dtype
    assert f"dtype {dtype}: this processor has" in job.reason
    assert job.key == job_of(dtype=dtype).key
    assert job_of(backend="onnxruntime").dtype == "fp32"
    assert ("onnxruntime computes no bf16 on a CPU" in job_of(backend="onnxruntime").reason) is fast


@pytest.mark.slow
def test_a_text_encoder_runs_in_bf16_where_that_says_the_same_of_prompts(tiny_model: Path, builds: BuildStore) -> None:
    bundle = builds.bundle(tiny_model, backend="openvino", device="cpu", dtype="bf16")
    entry = bundle.manifest.engines["text_encoder"]
    assert entry.dtype == ("bf16" if registry.fast_bf16() else "fp32")
    source = find_model(str(tiny_model))
    ids = token_ids(source.load_tokenizer("text_encoder"), ["", "a red circle"])
    with torch.no_grad():
        wanted = source.load_text_encoder("text_encoder")(ids).last_hidden_state
    run = fastcache_engines.backend("openvino").evaluate
    given = run(bundle.path / entry.file, {"input_ids": ids}, LoadOptions("cpu", entry.dtype))
    off = given["hidden_states"][:, 0] - wanted
    assert 10 * torch.log10(wanted.square().sum() / off.square().sum()) > LEAST_TEXT_SNR_DB


@pytest.mark.slow
def test_a_vae_encoder_in_bf16_gives_latents_of_nearly_the_same_pictures(tiny_model: Path, builds: BuildStore) -> None:
    bundle = builds.bundle(tiny_model, backend="openvino", device="cpu", dtype="bf16")
    engines, run = bundle.manifest.engines, fastcache_engines.backend("openvino").evaluate
    vae = find_model(str(tiny_model)).load_vae()
    size = bundle.manifest.height, bundle.manifest.width
    wanted, given = components.example_latents(vae, *size), {"image": components.example_pictures(*size)}
    options = LoadOptions("cpu", engines["vae_encoder"].dtype)
    latents = run(bundle.path / engines["vae_encoder"].file, given, options)["latent_mean"]
    decoder = components.VAEDecoder(vae)
    with torch.no_grad():
        pictures = [decoder({"latents": one}) for one in (latents, wanted)]
    assert psnr_db(*pictures) > LEAST_VAE_PSNR_DB - 1  # two runtimes' float32 decoders lie between
    assert options.dtype == ("bf16" if registry.fast_bf16() else "fp32")


def test_what_does_not_pass_in_bf16_is_built_in_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried, said = list[tuple[str, str]](), list[str]()

    def build(job: Job, key: str, folder: Path, say: Callable[[str], None]) -> None:
        assert list(folder.iterdir()) == []
        (folder / "made").write_text(job.dtype)
        tried.append((job.dtype, key))
        if job.dtype == "bf16":
            raise OutOfTolerance("expected engines within 0.1 of the model, got more")

    monkeypatch.setattr(worker, "_build", build)
    job = replace(job_of(backend="openvino"), dtype="bf16")
    worker.build(job, tmp_path, said.append)
    assert tried == [("bf16", job.key), ("fp32", job.key)]
    assert said == ["bf16 does not pass its check, so fp32 it is: expected engines within 0.1 of the model, got more"]
    asked_for = replace(job, recipe=job.recipe.model_copy(update={"dtype": "bf16"}))
    (tmp_path / "made").unlink()
    with pytest.raises(OutOfTolerance):
        worker.build(asked_for, tmp_path, said.append)
