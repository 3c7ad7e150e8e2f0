"""Oracle: the pipeline against diffusers' on the bundled model (invariant 3), and against DeepCache (invariant 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

import fastcache
from build_store import BuildStore
from fastcache import BundleError, CachePlan, FastCachePipeline
from fastcache.demo import MODEL_DIRECTORY
from fastcache.evaluate.quality import psnr_db
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler
from repeats import mostly_slow

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

PROMPT = "a large red circle at the left on a white background"
OTHER_PROMPT = "a small blue ring at the top on a black background"
STEPS = 8
FEW = {"num_inference_steps": 4}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def pipe(demo_bundle: Callable[[int], fastcache.Bundle]) -> FastCachePipeline:
    return fastcache.load(demo_bundle(0).path)


@pytest.fixture(scope="module")
def loaded_reference() -> StableDiffusionPipeline:
    reference = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture
def reference(loaded_reference: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """diffusers' pipeline with the model's own scheduler, DDIM."""
    loaded_reference.scheduler = DDIMScheduler.from_pretrained(MODEL_DIRECTORY, subfolder="scheduler")
    return loaded_reference


def use_sampler(reference: StableDiffusionPipeline, name: str) -> None:
    reference.scheduler = make_scheduler(name, reference.scheduler.config)


def images(pipeline: Any, *, prompt: Any = PROMPT, **arguments: Any) -> Tensor:
    """What either pipeline draws. Shapes: returns (N, 3, H, W) in [0, 1]."""
    usual = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "pt", "generator": seeded(0)[0]}
    arguments = {**usual, **arguments}
    return pipeline(prompt, **arguments).images


def test_all_full_draws_what_diffusers_draws(pipe: FastCachePipeline, reference: StableDiffusionPipeline) -> None:
    expected = images(reference, num_inference_steps=25)
    assert psnr_db(images(pipe, num_inference_steps=25), expected) >= 50
    assert psnr_db(images(pipe, generator=seeded(1)[0]), expected) < 40


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("branch_id", [0, 1, 3])
def test_uniform_plans_draw_what_deepcache_draws(
    branch_id: int,
    sampler: str,
    demo_bundle: Callable[[int], fastcache.Bundle],
    pipe: FastCachePipeline,
    reference: StableDiffusionPipeline,
) -> None:
    cut = pipe if branch_id == 0 else fastcache.load(demo_bundle(branch_id).path)
    use_sampler(reference, sampler)
    helper = DeepCacheSDHelper(pipe=reference)
    embeds = {
        "prompt_embeds": pipe.encode_prompt([PROMPT]),
        "negative_prompt_embeds": pipe.encode_prompt([""]),
    }

    def decoded(pipeline: Any, **arguments: Any) -> Tensor:
        latents = images(pipeline, prompt=None, **embeds, num_inference_steps=12, output_type="latent", **arguments)
        return torch.from_numpy(np.stack([np.asarray(image) for image in pipe.decode(latents)])) / 255

    drawn = {interval: decoded(cut, sampler=sampler, cache_interval=interval) for interval in (2, 3, 5)}
    for interval in drawn:
        helper.set_params(cache_interval=interval, cache_branch_id=branch_id)
        helper.enable()
        try:
            expected = decoded(reference)
        finally:
            helper.disable()
        assert psnr_db(drawn[interval], expected) >= 50
        assert all(psnr_db(drawn[other], expected) < 45 for other in drawn if other != interval)


def test_a_picture_does_not_depend_on_its_neighbours(pipe: FastCachePipeline) -> None:
    prompts = [PROMPT, OTHER_PROMPT, PROMPT]
    together = images(pipe, prompt=prompts, generator=seeded(0, 1, 2), cache_interval=3, sampler="euler_a")
    for i, prompt in enumerate(prompts):
        alone = images(pipe, prompt=prompt, generator=seeded(i), cache_interval=3, sampler="euler_a")
        assert psnr_db(together[i : i + 1], alone) >= 60
    assert psnr_db(together[0], together[2]) < 40


def embeds_of(reference: StableDiffusionPipeline, **texts: str) -> dict[str, Tensor]:
    """Embeddings from diffusers' own text encoder, by argument name."""
    return {name: reference.encode_prompt(text, "cpu", 1, False)[0] for name, text in texts.items()}


@pytest.fixture(scope="module")
def by_default(pipe: FastCachePipeline) -> Tensor:
    return images(pipe, **FEW)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": OTHER_PROMPT, "negative_prompt": PROMPT},
        {"prompt": [PROMPT, OTHER_PROMPT], "negative_prompt": ["", "a cross"], "generator": (5, 6)},
        {"num_images_per_prompt": 3},
        {"prompt": [PROMPT, OTHER_PROMPT], "num_images_per_prompt": 2, "generator": (1, 2, 3, 4)},
        {"latents": 9},
        {"prompt": None, "prompt_embeds": OTHER_PROMPT},
        {
            "prompt": None,
            "prompt_embeds": PROMPT,
            "negative_prompt_embeds": "a green cross",
            "num_images_per_prompt": 2,
        },
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "prompt": [PROMPT, OTHER_PROMPT]},
        {"guidance_rescale": 0.7, "guidance_scale": 4.0, "num_images_per_prompt": 2},
        {"height": 64, "width": 64},
    ],
    ids=lambda arguments: ",".join(arguments),
)
def test_arguments_mean_what_they_mean_in_diffusers(
    arguments: dict[str, Any], pipe: FastCachePipeline, reference: StableDiffusionPipeline, by_default: Tensor
) -> None:
    texts = {name: value for name, value in arguments.items() if name.endswith("_embeds")}
    given = {**arguments, **embeds_of(reference, **texts)}
    if "latents" in given:
        given["latents"] = torch.randn(1, 4, 16, 16, generator=seeded(given["latents"])[0])

    def drawn(pipeline: Any) -> Tensor:
        seeds = {"generator": seeded(*given["generator"])} if "generator" in given else {}
        return images(pipeline, **FEW, **{**given, **seeds})

    result, expected = drawn(pipe), drawn(reference)
    assert result.shape == expected.shape
    assert psnr_db(result, expected) >= 50
    if arguments != {"height": 64, "width": 64}:  # the bundle's own size
        assert psnr_db(result, by_default.expand_as(result)) < 40


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(output_type: str, pipe: FastCachePipeline, reference: StableDiffusionPipeline) -> None:
    result, expected = (images(p, output_type=output_type) for p in (pipe, reference))
    assert type(result) is type(expected)
    if output_type == "pil":
        assert isinstance(result[0], Image.Image)
        assert result[0].size == expected[0].size == (64, 64)
        result, expected = (np.asarray(x[0]) / 255 for x in (result, expected))
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, atol=1e-2 if output_type == "pil" else 1e-3)


SAMPLERS_THAT_DRAW = [("euler_a", 0.0), ("ddpm", 0.0), ("ddim", 1.0)]


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS_THAT_DRAW)
def test_noise_is_drawn_as_diffusers_draws_it(
    sampler: str, eta: float, pipe: FastCachePipeline, reference: StableDiffusionPipeline
) -> None:
    use_sampler(reference, sampler)
    for seeds in ((3,), (3, 4)):
        given = {"eta": eta, "prompt": [PROMPT] * len(seeds), **FEW}
        result = images(pipe, generator=seeded(*seeds), **given, sampler=sampler)
        assert psnr_db(result, images(reference, generator=seeded(*seeds), **given)) >= 50
    one_for_all = images(pipe, generator=seeded(3)[0], **given, sampler=sampler)
    expected = images(reference, generator=seeded(3)[0], **given)
    assert psnr_db(one_for_all, expected) >= 50
    assert psnr_db(one_for_all, result) < 40


CALLBACK_SAMPLERS = [
    "ddim",
    "euler",
    "euler_a",
    "dpm++_2m",
    "pndm",
    "lms",
    "heun",
]  # unipc's corrector holds every x so far


@pytest.mark.parametrize("sampler", mostly_slow(CALLBACK_SAMPLERS, lambda name: name in ("ddim", "heun")))
def test_a_callback_sees_and_replaces_the_latents(
    sampler: str, pipe: FastCachePipeline, reference: StableDiffusionPipeline
) -> None:
    use_sampler(reference, sampler)
    seen: list[tuple[int, float]] = []

    def callback(_: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, float(timestep)))
        return {"latents": values["latents"].flip(-1)} if step in (0, 4) else {}

    expected = images(reference, callback_on_step_end=callback)
    theirs, seen[:] = seen.copy(), []
    result = images(pipe, callback_on_step_end=callback, sampler=sampler)
    np.testing.assert_allclose(seen, theirs)
    assert psnr_db(result, expected) >= 50
    assert psnr_db(result, images(pipe, sampler=sampler)) < 40


def test_nothing_is_kept_between_calls(pipe: FastCachePipeline, demo_bundle: Callable[[int], fastcache.Bundle]) -> None:
    calls: list[dict[str, Any]] = [
        {},
        {"prompt": OTHER_PROMPT},
        {"guidance_scale": 3.0},
        {"guidance_scale": 1.0},
        {"prompt": [PROMPT, OTHER_PROMPT], "generator": (0, 1)},
        {"sampler": "dpm++_2m", "num_inference_steps": 5},
        {"sampler": "euler_a"},
        {"cache_interval": 5},
        {},
    ]
    for call in calls:
        call = {"cache_interval": 3, "num_inference_steps": 6, **call}
        first, again = (
            images(p, **{**call, "generator": seeded(*call.get("generator", (0,)))})
            for p in (pipe, fastcache.load(demo_bundle(0).path))
        )
        assert torch.equal(first, again), call


def test_a_stream_gives_each_step_and_may_be_dropped(pipe: FastCachePipeline) -> None:
    def stream() -> Iterator[Any]:
        return pipe.stream(PROMPT, num_inference_steps=STEPS, cache_interval=3, generator=seeded(0)[0])

    expected = pipe(PROMPT, num_inference_steps=STEPS, cache_interval=3, generator=seeded(0)[0])
    steps = [(step.index, step.full, step.latents.clone()) for step in stream()]
    assert [index for index, _, _ in steps] == list(range(STEPS))
    assert [full for _, full, _ in steps] == [i % 3 == 0 for i in range(STEPS)]
    assert pipe.decode(steps[-1][2])[0] == expected.images[0]

    assert len(list(islice(stream(), 4))) == 4  # dropped between two refreshes
    assert pipe(PROMPT, num_inference_steps=STEPS, cache_interval=3, generator=seeded(0)[0]).images == expected.images


def test_a_stream_whose_buffers_were_taken_does_not_go_on(pipe: FastCachePipeline) -> None:
    steps = pipe.stream(PROMPT, num_inference_steps=STEPS)
    next(steps)
    images(pipe)
    with pytest.raises(RuntimeError, match="a newer run"):
        next(steps)


def test_a_nonlinear_scheduler_runs_its_own_step(pipe: FastCachePipeline, reference: StableDiffusionPipeline) -> None:
    clipping = DDIMScheduler.from_config(reference.scheduler.config, clip_sample=True)
    before = dict(vars(clipping))
    given = {"eta": 1.0, "prompt": [PROMPT] * 2, **FEW}
    with pytest.warns(UserWarning, match=r"clip_sample=True"):
        result = images(pipe, sampler=clipping, generator=seeded(0, 1), **given)
    assert vars(clipping) == before
    plain = images(reference, generator=seeded(0, 1), **given)
    reference.scheduler = clipping
    assert psnr_db(result, images(reference, generator=seeded(0, 1), **given)) >= 50
    assert psnr_db(result, plain) < 40


def test_a_scheduler_of_diffusers_is_a_sampler(pipe: FastCachePipeline) -> None:
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.bundle.manifest.model.scheduler)
    assert torch.equal(images(pipe, sampler=scheduler), images(pipe, sampler="euler"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_diffusers_draws(
    sampler: str, pipe: FastCachePipeline, reference: StableDiffusionPipeline
) -> None:
    use_sampler(reference, sampler)
    given = {"num_inference_steps": 8, "guidance_scale": 7.5, "output_type": "pt"}
    output = pipe(PROMPT, sampler=sampler, generator=seeded(0)[0], **given)
    assert output.plan.num_steps == {"heun": 15, "pndm": 9, "plms": 9}.get(sampler, 8)
    assert psnr_db(output.images, images(reference, num_inference_steps=8)) >= 50


def plan_for(**named: Any) -> CachePlan:
    return replace(CachePlan.uniform(STEPS, 2), **named)


def test_a_plan_made_for_this_model_and_sampler_runs(pipe: FastCachePipeline) -> None:
    plan = CachePlan.from_json(plan_for(model=pipe.bundle.manifest.model.name, sampler="ddim").to_json())
    assert torch.equal(images(pipe, plan=plan), images(pipe, cache_interval=2))
    other_name = CachePlan.uniform(STEPS + 1, 2).passes  # pndm calls the U-Net once more
    assert images(pipe, plan=CachePlan(other_name, sampler="pndm"), sampler="plms").isfinite().all()


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "either prompt or prompt_embeds, got neither"),
    ({"prompt_embeds": torch.zeros(1, 32, 128)}, "either prompt or prompt_embeds, got both"),
    ({"prompt": []}, "prompt to be a string or a list of strings"),
    ({"prompt": [3]}, r"prompt\[0\] to be text, got 3"),
    ({"prompt": 5}, "prompt to be a string or a list of strings, got 5"),
    ({"prompt": "a \ud800"}, "prompt to be text"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 31, 128)}, r"shape \[1, 32, 128\]|shape \[1, 31, 128\]"),
    ({"negative_prompt_embeds": torch.zeros(1, 31, 128)}, "negative_prompt_embeds of shape"),
    ({"negative_prompt": ["a", "b"]}, "one negative_prompt, or one for each of 1 prompts, got 2"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt to be a whole number of 1 or more, got 0"),
    ({"num_images_per_prompt": 5}, "at most 4 images at once, got num_images_per_prompt 5; build with --batch"),
    ({"num_images_per_prompt": 1.0}, "num_images_per_prompt to be a whole number of 1 or more, got 1.0"),
    ({"num_images_per_prompt": "2"}, "num_images_per_prompt to be a whole number of 1 or more, got '2'"),
    ({"num_inference_steps": 0}, "num_inference_steps to be a whole number from 1 to 1000, got 0"),
    ({"num_inference_steps": "3"}, "num_inference_steps to be a whole number from 1 to 1000, got '3'"),
    ({"num_inference_steps": 2.0}, "num_inference_steps to be a whole number from 1 to 1000, got 2.0"),
    ({"num_inference_steps": True}, "num_inference_steps to be a whole number from 1 to 1000, got True"),
    ({"guidance_scale": "7.5"}, "guidance_scale to be a finite number of 0 or more, got '7.5'"),
    ({"guidance_scale": -2.0}, "guidance_scale to be a finite number of 0 or more, got -2.0"),
    ({"guidance_scale": True}, "guidance_scale to be a finite number of 0 or more, got True"),
    ({"num_inference_steps": 5000}, "num_inference_steps to be a whole number from 1 to 1000, got 5000"),
    ({"cache_interval": 0}, "interval"),
    ({"cache_interval": 2, "plan": plan_for()}, "cache_interval or plan, got both"),
    ({"plan": plan_for(), "num_inference_steps": 9}, "9 U-Net calls, got one for 8"),
    ({"plan": plan_for(model="another")}, "made for model demo, got 'another'"),
    ({"plan": plan_for(sampler="euler"), "sampler": "ddim"}, "made for sampler ddim, got 'euler'"),
    ({"plan": CachePlan.uniform(STEPS, 2, branch_id=3)}, "of the passes full, shallow-0"),
    ({"sampler": "magic"}, "a sampler out of"),
    ({"sampler": "eulr"}, "a sampler out of .*, got 'eulr'; did you mean euler"),
    ({"sampler": 3}, "sampler to be a name, or a scheduler of diffusers, got 3"),
    ({"seed": 1}, "expected generator or seed, got both"),
    ({"generator": seeded(0, 1)}, "one for each of 1 images, got 2"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents of shape \[1, 4, 16, 16\]"),
    ({"output_type": "jpeg"}, "output_type out of pil, np, pt, latent, got 'jpeg'"),
    ({"height": 128}, "64x64, which this bundle was built for, got 64x128; build another with --sizes"),
    ({"height": 0}, "height to be a whole number of 1 or more, got 0"),
    ({"height": "64"}, "height to be a whole number of 1 or more, got '64'"),
    ({"clip_skip": 9}, "clip_skip from 0 to"),
    ({"eta": float("nan")}, "eta to be a finite number from 0 to 1, got nan"),
    ({"eta": 5.0}, "eta to be a finite number from 0 to 1, got 5"),
    ({"eta": None}, "eta to be a finite number from 0 to 1, got None"),
    ({"latents": torch.full((1, 4, 16, 16), torch.nan)}, "latents to be finite"),
    ({"cache_intervall": 2}, "which cache_intervall is not, got 2; did you mean cache_interval"),
    ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs is not, .*; adapters are merged"),
    ({"callback": print}, "callback is not, .*; give callback_on_step_end"),
    ({"timesteps": [3, 2, 1]}, "no timesteps for DDIMScheduler, which makes its own"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_one_line(
    arguments: dict[str, Any], message: str, pipe: FastCachePipeline
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        images(pipe, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [{"plan": plan_for(sampler="euler"), "sampler": "ddim"}, {"cache_interval": 0}, {"colour": torch.zeros(2)}],
)
def test_a_stream_refuses_bad_arguments_before_its_first_step(
    arguments: dict[str, Any], pipe: FastCachePipeline
) -> None:
    with pytest.raises(ValueError, match="expected"):
        pipe.stream(PROMPT, num_inference_steps=STEPS, **arguments)


def test_a_bundle_without_text_and_vae_says_so(tiny_model: Path, builds: BuildStore) -> None:
    unet_only = fastcache.load(builds.bundle(tiny_model, branch_id=[0, 2], components=("unet",)).path)
    embeds = torch.zeros(2, 1, 8, 16)
    with pytest.raises(BundleError, match="text_encoder"):
        unet_only(PROMPT, output_type="latent")
    with pytest.raises(BundleError, match="vae_decoder"):
        unet_only(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])


def test_words_past_the_encoders_length_are_left_out_aloud(pipe: FastCachePipeline) -> None:
    with pytest.warns(UserWarning, match="only the first 32 tokens"):
        pipe.encode_prompt(["red " * 40])
