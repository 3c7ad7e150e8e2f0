"""Oracle: guidance in an interval, forecasts and several depths, against a plain loop over diffusers' own scheduler."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eager_engines import BRANCHES, IMAGES, conditioning, generators, plain_run, small_cuts, small_lane, start
from fastcache import CachePlan, Forecast, compile_sampler
from fastcache.loop.features import check_reuse, extrapolate, moves
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCALE, STEPS = 3.0, 9


def loop(sampler: str, plan: CachePlan, rescale: float = 0.0) -> Tensor:
    """What fastcache's loop leaves."""
    table = compile_sampler(make_scheduler(sampler, CONFIG), STEPS)
    options = {"guidance_scale": SCALE, "guidance_rescale": rescale, "generator": generators()}
    *_, last = plain_run(small_lane(), table, plan, **options).steps
    return last.latents.clone()


@dataclass
class Kept:
    step: int
    guided: bool
    tensors: dict[str, Tensor]


def newton(stored: list[tuple[float, Tensor]], step: float) -> Tensor:
    """The polynomial through points, by divided differences in float64."""
    steps, values = [s for s, _ in stored], [v.double() for _, v in stored]
    result = values[0].clone()
    factor = 1.0
    for order in range(1, len(values)):
        values = [(values[i + 1] - values[i]) / (steps[i + order] - steps[i]) for i in range(len(values) - 1)]
        factor *= step - steps[order - 1]
        result += factor * values[0]
    return result


def reused(
    plan: CachePlan, kept: list[Kept], names: list[str], step: int, guided: bool, places: list[float]
) -> dict[str, Tensor]:
    order = plan.forecast.order if plan.forecast else 0
    recent = kept[-order - 1 :]
    while guided and not all(k.guided for k in recent):
        recent = recent[1:]
    recent = [k for i, k in enumerate(recent) if all(places[k.step] != places[l.step] for l in recent[i + 1 :])]
    rows = slice(None) if guided else slice(-IMAGES, None)
    features: dict[str, Tensor] = {}
    for name in names:
        last = recent[-1].tensors[name][rows]
        whole = newton([(places[k.step], k.tensors[name][rows]) for k in recent], places[step])
        damping = plan.forecast.damping if plan.forecast else 0.0
        features[name] = (last + damping * (whole - last)).float()
    return features


@torch.no_grad()
def plain_loop(sampler: str, plan: CachePlan, rescale: float = 0.0) -> Tensor:
    """The same run, step by step with diffusers' scheduler, batches put together anew at each step."""
    cuts, scheduler = small_cuts(), make_scheduler(sampler, CONFIG)
    scheduler.set_timesteps(STEPS)
    accepted = inspect.signature(scheduler.step).parameters
    noise = {"generator": generators()} if "generator" in accepted else {}
    x = start() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    kept: dict[int, list[Kept]] = {branch_id: [] for branch_id in BRANCHES}
    places = [float(step) for step in range(len(scheduler.timesteps))]
    if plan.forecast is not None and plan.forecast.by == "sigma":
        alphas = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
        places = ((1 - alphas) / alphas).sqrt().tolist()
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        guided, branch = plan.is_guided(step), plan.branches[step]
        sample = torch.cat([scaled, scaled]) if guided else scaled
        text = conditioning() if guided else conditioning()[IMAGES:]
        if branch is None:
            results = cuts.full(sample, timestep.float(), text)
            stored = dict(zip(("noise_pred", *cuts.cached), results, strict=True))
        else:
            cut = cuts.at[branch]
            features = reused(plan, kept[branch], list(cut.cached), step, guided, places)
            given = {name.removesuffix(f"_{branch}"): feature for name, feature in features.items()}
            results = cut.shallow(sample, timestep.float(), text, **given)
            results = results if isinstance(results, tuple) else (results,)
            stored = dict(zip(("noise_pred", *cut.refreshes), results, strict=True))
        for branch_id, cut in cuts.at.items():
            if all(name in stored for name in cut.cached):
                kept[branch_id].append(Kept(step, guided, stored))
        noise_pred = stored["noise_pred"]
        if guided:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + SCALE * (conditional - unconditional)
            if rescale:
                factor = conditional.std((1, 2, 3), keepdim=True) / noise_pred.std((1, 2, 3), keepdim=True)
                noise_pred = rescale * noise_pred * factor + (1 - rescale) * noise_pred
        x = scheduler.step(noise_pred, timestep, x, return_dict=False, **noise)[0]
    return x


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    assert float((got - expected).abs().max() / expected.abs().max()) < tolerance


def num_calls(sampler: str) -> int:
    return compile_sampler(make_scheduler(sampler, CONFIG), STEPS).num_calls


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"plms"}))
def test_guidance_in_an_interval(sampler: str) -> None:
    plan = CachePlan.uniform(num_calls(sampler), 3).guided_within(3, 7)
    assert_same(loop(sampler, plan), plain_loop(sampler, plan))


def test_an_interval_changes_the_picture() -> None:
    plan = CachePlan.uniform(STEPS, 3)
    throughout, within = plain_loop("ddim", plan), plain_loop("ddim", plan.guided_within(3, 7))
    assert float((throughout - within).abs().max()) > 0.1


def test_rescaled_guidance_in_an_interval() -> None:
    plan = CachePlan.uniform(STEPS, 3).guided_within(3, 7)
    assert_same(loop("ddim", plan, 0.7), plain_loop("ddim", plan, 0.7))


@pytest.mark.parametrize(
    "forecast", [Forecast(1), Forecast(1, 0.4), Forecast(2), Forecast(2, 0.7), Forecast(2, 0.7, "sigma")], ids=str
)
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++_2m"])
def test_forecasts(sampler: str, forecast: Forecast) -> None:
    plan = CachePlan.from_refresh_steps(num_calls(sampler), (0, 2, 5))  # unequal distances
    forecasted = loop(sampler, replace(plan, forecast=forecast))
    assert_same(forecasted, plain_loop(sampler, replace(plan, forecast=forecast)))
    assert float((forecasted - loop(sampler, plan)).abs().max()) > 1e-3


def test_a_forecast_that_counts_for_nothing_is_plain_reuse() -> None:
    plan = CachePlan.uniform(STEPS, 3)
    assert torch.equal(loop("ddim", replace(plan, forecast=Forecast(2, 0))), loop("ddim", plan))


def test_a_forecast_ends_where_guidance_was_off() -> None:
    """Step 5 runs unguided on a forecast, step 7 is guided again: the conditional half must be as step 6 stored it."""
    plan = CachePlan.from_branches(
        (None, 0, None, 0, None, 0, None, 0, 0), unguided_steps=(0, 1, 2, 3, 5, 8), forecast=Forecast(2)
    )
    found = moves(plan, small_lane().passes, None)["cached_feature"]
    assert found.makes[7][0] == [found.keeps[4], found.keeps[6]]
    assert_same(loop("ddim", plan), plain_loop("ddim", plan))


def test_a_guided_step_after_an_unguided_forecast_reuses_what_was_stored() -> None:
    plan = CachePlan.from_branches((None, None, 0, 0, None), unguided_steps=(0, 2), forecast=Forecast(1))
    made = moves(plan, small_lane().passes, None)["cached_feature"].makes
    assert [made[step][1] for step in (2, 3)] == [[-1.0, 2.0], [1.0]]
    padded = replace(plan, passes=plan.passes + ("shallow-0",) * (STEPS - 5))
    assert_same(loop("ddim", padded), plain_loop("ddim", padded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extrapolating(dtype: torch.dtype) -> None:
    features = [torch.randn(2, 3, 4, 4).to(dtype) for _ in range(3)]
    for weights in ([1.0], [-0.5, 1.5], [1.0, -3.0, 3.0]):
        out = torch.empty_like(features[0])
        extrapolate(features[-len(weights) :], weights, out)
        expected = sum(w * f.double() for w, f in zip(weights, features[-len(weights) :], strict=True))
        assert torch.is_tensor(expected)
        assert_same(out.double(), expected, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_several_depths(sampler: str) -> None:
    plan = CachePlan.from_branches((None, 0, 2, 0, 5, 0, 2, 5, 0))
    expected = plain_loop(sampler, plan)
    assert_same(loop(sampler, plan), expected)
    same_refreshes = CachePlan.from_refresh_steps(STEPS, (0,))
    assert float((loop(sampler, same_refreshes) - expected).abs().max()) > 1e-3


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    branches = (None, *draw(st.lists(st.sampled_from((None, *BRANCHES)), min_size=STEPS - 1, max_size=STEPS - 1)))
    forecast = draw(st.none() | st.builds(Forecast, *map(st.sampled_from, ((1, 2), (0.5, 1.0), ("step", "sigma")))))
    unguided = sorted(draw(st.sets(st.integers(0, STEPS - 1))))
    plan = CachePlan.from_branches(branches, unguided_steps=tuple(unguided), forecast=forecast)
    try:
        check_reuse(plan, small_lane().passes)
    except ValueError as error:
        assert "to reuse a guided step's feature" in str(error)  # noqa: PT017
        return replace(plan, unguided_steps=())
    return plan


@given(plans())
@settings(max_examples=12)
def test_any_plan_is_what_a_plain_loop_makes_of_it(plan: CachePlan) -> None:
    assert_same(loop("ddim", plan), plain_loop("ddim", plan), 1e-3)  # far forecasts enlarge roundings
