"""A request: each argument is checked in one place and named in one line; the pipeline's signature is the request's."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import fastcache
from fastcache import Bundle, CachePlan, FastCachePipeline, Forecast
from fastcache.pipeline.request import Request
from odd_values import ODD, refusal

STEPS = 3


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Bundle) -> FastCachePipeline:
    return fastcache.load(tiny_bundle.path, threads=1)


def latents(pipe: FastCachePipeline, **arguments: Any) -> Tensor:
    usual = {"num_inference_steps": STEPS, "seed": 3, "output_type": "latent"}
    return pipe("a cat", **{**usual, **arguments}).images


def test_the_pipelines_signature_is_the_requests(pipe: FastCachePipeline) -> None:
    named = inspect.signature(pipe.__call__).parameters
    assert list(named) == list(inspect.signature(Request).parameters)
    assert {"prompt", "cache_interval", "plan", "sampler", "generator", "seed"} <= named.keys()
    assert named["cache_interval"].annotation == int | None
    assert not [each for each in named.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
    assert list(inspect.signature(pipe.stream).parameters) == list(named)


def test_every_field_has_its_check() -> None:
    hints = get_type_hints(Request, include_extras=True)
    assert all(callable(hints[field.name].__metadata__[0]) for field in fields(Request))


def test_a_seed_is_a_generator_for_each_image(pipe: FastCachePipeline) -> None:
    each = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = latents(pipe, seed=None, generator=each, num_images_per_prompt=2)
    assert torch.equal(latents(pipe, num_images_per_prompt=2), expected)
    assert torch.equal(latents(pipe, seed=[4, 3], num_images_per_prompt=2), expected.flip(0))
    with pytest.raises(ValueError, match="one seed, or one for each of 2 images, got 3"):
        latents(pipe, seed=[1, 2, 3], num_images_per_prompt=2)


def test_a_tuple_in_place_of_an_output(pipe: FastCachePipeline) -> None:
    drawn: Any = pipe("a cat", num_inference_steps=STEPS, seed=3, cache_interval=2, return_dict=False)
    images, plan = drawn
    assert isinstance(images[0], Image.Image)
    assert plan == CachePlan.uniform(STEPS, 2)


def test_a_copy_and_a_pickle_are_loaded_again(pipe: FastCachePipeline) -> None:
    expected = latents(pipe)
    for again in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert again is not pipe
        assert again.bundle.path == pipe.bundle.path.resolve()
        assert torch.equal(latents(again), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_own_tensors_are_not_of_the_default_dtype(dtype: torch.dtype, pipe: FastCachePipeline) -> None:
    calls: list[dict[str, Any]] = [{}, {"sampler": "euler_a", "guidance_rescale": 0.5}]
    calls += [{"image": torch.full((1, 3, 32, 32), 0.5), "strength": 0.7}]
    expected = [latents(pipe, **call) for call in calls]
    torch.set_default_dtype(dtype)
    try:
        fresh = copy.deepcopy(pipe)
        found = [latents(fresh, **call) for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta"), torch.enable_grad])
def test_a_callers_modes_do_not_reach_the_buffers(context: Callable[[], Any], pipe: FastCachePipeline) -> None:
    expected, fresh = latents(pipe, sampler="euler_a"), copy.deepcopy(pipe)
    with context():
        found = latents(fresh, sampler="euler_a")
    assert torch.equal(found, expected)
    assert torch.equal(latents(fresh, sampler="euler_a"), expected)


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
def test_timesteps_and_sigmas_are_those_asked_for(name: str, pipe: FastCachePipeline, tiny_model: Any) -> None:
    places: list[Any] = [900, 500, 100] if name == "timesteps" else [12.0, 3.0, 0.5]
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = diffusers.EulerDiscreteScheduler.from_config(reference.scheduler.config)
    common: dict[str, Any] = {name: places, "output_type": "latent"}
    expected = reference("a cat", generator=torch.Generator().manual_seed(3), **common).images
    ours = pipe("a cat", seed=3, sampler="euler", **common).images
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=f"no {name} for DDIMScheduler, which makes its own"):
        pipe("a cat", sampler="ddim", **common)


@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
def test_an_eta_is_passed_on_also_where_it_is_0(eta: float | None, pipe: FastCachePipeline, tiny_model: Any) -> None:
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = diffusers.TCDScheduler.from_config(reference.scheduler.config)
    common: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"} | ({} if eta is None else {"eta": eta})
    expected = reference("a cat", generator=torch.Generator().manual_seed(3), **common).images
    ours = pipe("a cat", generator=torch.Generator().manual_seed(3), sampler=reference.scheduler, **common).images
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


NAMES = list(inspect.signature(Request).parameters)
USUAL: dict[str, Any] = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_taken_or_refused_in_one_line_that_names_it(name: str, pipe: FastCachePipeline) -> None:
    calls_back = name == "callback_on_step_end"  # what is called may raise what it likes
    for value in ODD:
        if not (calls_back and callable(value)):
            said = refusal(pipe, **{**USUAL, name: value})
            assert said is None or (said.startswith("expected ") and name in said), said


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, derandomize=True)
@given(names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=4, unique=True), seed=st.integers(0, 10**6))
def test_any_values_together_are_taken_or_refused_in_one_line(
    names: list[str], seed: int, pipe: FastCachePipeline
) -> None:
    values = {name: ODD[(seed * 31 + k * 17) % len(ODD)] for k, name in enumerate(names)}
    if callable(values.get("callback_on_step_end")):
        del values["callback_on_step_end"]
    said = refusal(pipe, **{**USUAL, **values})
    assert said is None or said.startswith("expected "), said


PLANS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "CachePlan": (CachePlan, {"passes": ("full", "shallow-0")}),
    "all_full": (CachePlan.all_full, {"num_steps": 4}),
    "uniform": (CachePlan.uniform, {"num_steps": 4, "interval": 2}),
    "nonuniform": (CachePlan.nonuniform, {"num_steps": 4, "interval": 2, "center": 1, "power": 1.2}),
    "from_refresh_steps": (CachePlan.from_refresh_steps, {"num_steps": 4, "refresh_steps": (0, 2)}),
    "from_branches": (CachePlan.from_branches, {"branches": (None, 0)}),
    "from_json": (CachePlan.from_json, {"text": CachePlan.all_full(2).to_json()}),
    "guided_within": (CachePlan.all_full(4).guided_within, {"first": 1, "end": 2}),
    "Forecast": (Forecast, {}),
}


@pytest.mark.parametrize("name", PLANS)
def test_any_value_makes_a_plan_or_is_refused_in_one_line(name: str) -> None:
    make, usual = PLANS[name]
    for argument in inspect.signature(make).parameters:
        for value in ODD:
            # A plan of a great many steps is one, if there is room for it; `fields` are the plan's others, by name.
            if argument != "fields" and not (isinstance(value, int) and value > 10**6):
                said = refusal(make, **{**usual, argument: value})
                assert said is None or said.startswith("expected "), f"{argument}: {said}"
