"""Fitted rows: exact where the network is linear, harmless where there is too little to fit on, the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcache import Bundle, CachePlan
from fastcache.loop.fit import Fit
from fastcache.loop.fitted import Grid, begun_at, default_rows, fitted_table
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.planning.calibrate import calibrate_bundle
from fastcache.planning.climb import Stops, climb, cost_of, families
from fastcache.planning.fit import fit_rows, ridge_fit
from fastcache.planning.fitting import Fitting, Reference
from fastcache.planning.frontier import budget_plan, rivals
from fastcache.planning.walks import Walks
from fastcache.planning.ways import StepTimes
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import SamplerTable, compile_sampler

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "steps_offset": 1}
SAMPLERS = ("ddim", "dpm++_2m", "dpm++_2m_karras", "euler", "unipc", "heun", "lms")


def table_of(sampler: str = "ddim", steps: int = 20, prediction_type: str = "epsilon") -> SamplerTable:
    return compile_sampler(make_scheduler(sampler, CONFIG | {"prediction_type": prediction_type}), steps)


def walk(table: SamplerTable, predict: Callable[[int, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Every state of a run by a table's own rows, in float64."""
    states, predictions = [x], list[Tensor]()
    for call, update in enumerate(table.recursion()):
        predictions.append(predict(call, states[call]))
        terms = zip(range(update.first, call + 1), update.weights[::3], update.weights[1::3], strict=True)
        states.append(sum((a * states[k] + b * predictions[k] for k, a, b in terms), torch.zeros_like(x)))
    return states


def fit_of(rows: tuple[tuple[float, ...], ...], points: tuple[int, ...], steps: int = 20) -> Fit:
    return Fit(steps, points, rows, 4.0, 64, 64, "0" * 64, "onnxruntime", "fp32", 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_transfers_are_exact_where_picture_and_noise_foretold_stay(sampler: str, prediction_type: str) -> None:
    """Any sampler then keeps to its own marginals, so a run of three strides ends where the reference does."""
    table = table_of(sampler, 20, prediction_type)
    grid = Grid.of(table, prediction_type)
    generator = torch.Generator().manual_seed(0)
    picture, noise = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    start = grid.picture[0] * picture + grid.noise[0] * noise
    ends = walk(table, lambda call, _: grid.shown[call] * picture + grid.heard[call] * noise, start)
    points = (0, table.num_calls // 3, table.num_calls // 2)
    rows = tuple(default_rows(table, prediction_type, points))
    strides = fitted_table(table, fit_of(rows, points))
    found = walk(strides, lambda step, _: grid.shown[points[step]] * picture + grid.heard[points[step]] * noise, start)
    for point, state in zip((*points, table.num_calls), found, strict=True):
        torch.testing.assert_close(state, ends[point], rtol=1e-5, atol=1e-5)  # schedulers round to float32
    assert strides.timesteps.tolist() == table.timesteps[list(points)].tolist()


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), sampler=st.sampled_from(SAMPLERS), gaps=st.lists(st.integers(1, 4), min_size=3))
def test_rows_on_a_linear_network_reproduce_the_reference(seed: int, sampler: str, gaps: list[int]) -> None:
    table = table_of(sampler)
    points = [0]
    for gap in gaps:
        points += [points[-1] + gap] if points[-1] + gap < table.num_calls else []
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    onto = torch.linalg.qr(random(16, 6)).Q
    of_x, of_part = 0.3 * random(table.num_calls), 0.5 + random(table.num_calls).abs()

    def predict(call: int, x: Tensor) -> Tensor:
        shown = table.input_scale[call] * x
        return of_x[call] * shown + of_part[call] * (shown @ onto) @ onto.T

    start = random(4, 16) * table.init_noise_sigma
    states = walk(table, predict, start)
    fitted = fit_rows(lambda step, x: (predict(points[step], x), None), states, table, "epsilon", points)
    error = (fitted.result - states[-1]).norm() / states[-1].norm()
    assert error < 1e-8
    ran = walk(fitted_table(table, fit_of(fitted.rows, tuple(points))), lambda k, x: predict(points[k], x), start)
    assert (ran[-1] - states[-1]).norm() / states[-1].norm() < 1e-8


def test_one_picture_fits_nothing() -> None:
    table, points = table_of(), [0, 5, 10]
    states = walk(table, lambda call, x: x.tanh(), torch.randn(1, 16, dtype=torch.float64))
    fitted = fit_rows(lambda step, x: (x.tanh(), None), states, table, "epsilon", points)
    assert fitted.defaults == 3
    assert list(fitted.rows) == default_rows(table, "epsilon", points)


def test_what_no_left_out_picture_gains_by_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    columns, target = torch.randn(3, 8, 5, generator=generator).double().split([4, 1], dim=-1)
    noise = target[..., 0]
    assert ridge_fit(columns, noise) == (None, float(noise.square().sum()))  # 21 numbers of noise for 4 weights
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    found, missed = ridge_fit(columns, columns @ weights)
    assert found is not None
    assert missed < 1e-9
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "euler_a", "dpm++_2m_sde"])
def test_a_sampler_that_draws_noise_is_refused(sampler: str) -> None:
    with pytest.raises(ValueError, match="draws no noise"):
        Grid.of(table_of(sampler), "epsilon")


def test_a_fitted_plan_is_read_back_as_it_was_written() -> None:
    plan = CachePlan(("full", "shallow-0"), sampler="ddim", fit=fit_of(((0.1, 1 / 3), (0.5, -2.0, 1.0, 1e-9)), (0, 7)))
    assert CachePlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": [0]}, "1 rows in a fit"),
        ({"points": [-1, 7]}, "1 to 1000 points"),
        ({"contrasts": [[0.1]]}, "2 contrasts in a fit, one a point, or none"),
        ({"contrasts": [[0.1], [0.1, 0.2, 0.3]]}, "at most 2 calls in contrast 1"),
        ({"contrasts": [0.1, "many"]}, "finite weights of at most 2 calls in contrast 1"),
        ({"contrasts": {"0": 1}}, "contrasts to be a list"),
        ({"points": [0, 0]}, "ascending points"),
        ({"rows": [[0.1, 0.2]]}, "2 rows in a fit"),
        ({"rows": [[0.1, 0.2], [1e400, 0.0]]}, "finite weights"),
        ({"rows": [[0.1, 0.2], [10**400, 0.0]]}, "finite weights"),
        ({"rows": [[0.1, 0.2], [0.0, 0.0, 0.0]]}, "pairs of finite weights"),
        ({"rows": [[0.1, 0.2, 0.3, 0.4], [0.0, 0.0]]}, "at most 1 calls in row 0"),
        ({"rows": [0, 1]}, "pairs of finite weights"),
        ({"height": 0}, "height of 1 or more"),
        ({"backend": 3}, "backend to be a string"),
        ({"psnr_db": "high"}, "psnr_db to be a number"),
        ({"extra": 1}, "fit to have the keys"),
    ],
)
def test_a_damaged_fit_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    plan = CachePlan(("full", "shallow-0"), sampler="ddim", fit=fit_of(((0.1, 0.2), (0.5, -2.0)), (0, 7)))
    document = json.loads(plan.to_json())
    document["fit"] |= change
    with pytest.raises(ValueError, match=message) as refused:
        CachePlan.from_json(json.dumps(document))
    assert "\n" not in str(refused.value)


def test_a_fitted_plan_names_its_sampler_and_has_a_point_a_step() -> None:
    fit = fit_of(((0.1, 0.2), (0.5, -2.0)), (0, 7))
    with pytest.raises(ValueError, match="the sampler that a fitted plan"):
        CachePlan(("full", "full"), fit=fit)
    with pytest.raises(ValueError, match="3 points in a fit"):
        CachePlan(("full",) * 3, sampler="ddim", fit=fit)
    with pytest.raises(ValueError, match="points below 5"):
        fitted_table(table_of(steps=5), fit)


def test_a_run_from_the_middle_starts_at_a_full_point_and_looks_back_no_further() -> None:
    table, points = table_of(), (0, 4, 9, 12, 15)
    rows = tuple((float(k),) * 2 * min(k + 1, 3) for k in range(5))
    passes = ("full", "shallow-0", "full", "shallow-0", "full")
    plan = CachePlan(passes, sampler="ddim", fit=fit_of(rows, points))
    assert begun_at(plan, table, "epsilon", 0) == plan
    later = begun_at(plan, table, "epsilon", 3)
    assert later.passes == passes[2:]
    assert later.fit is not None
    assert later.fit.points == (9, 12, 15)
    defaults = default_rows(table, "epsilon", (9, 12, 15))
    assert later.fit.rows == (*defaults[:2], rows[4])
    assert later.fit.contrasts == ()
    contrasts = ((0.1,), (0.1, 0.2), (0.3,), (0.4,), (0.5, 0.6))
    short = replace(plan, fit=fit_of(tuple(row[-2:] for row in rows), points))
    assert short.fit is not None
    short = replace(short, fit=replace(short.fit, contrasts=contrasts))
    begun = begun_at(short, table, "epsilon", 3).fit
    assert begun is not None
    assert begun.contrasts == contrasts[2:]
    assert begun_at(short, table, "epsilon", 3).fit == replace(begun, rows=tuple(row[-2:] for row in rows[2:]))
    farther = replace(short.fit, contrasts=(*contrasts[:2], (0.3, 0.2), *contrasts[3:]))
    begun = begun_at(replace(short, fit=farther), table, "epsilon", 3).fit
    assert begun is not None
    assert (begun.rows[0], begun.contrasts[0]) == (defaults[0], ())  # it would look back to before the run
    with pytest.raises(ValueError, match="a FULL point at or after call 16 of 20"):
        begun_at(plan, table, "epsilon", 16)


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Bundle) -> FastCachePipeline:
    return FastCachePipeline(tiny_bundle)


PROMPTS = ["a red circle", "a blue ring", "a green square", "a pink cross", "a small cyan ring"]
TIMES = StepTimes(10.0, {0: 1.0}, 1)


@pytest.fixture(scope="module")
def fitting(pipe: FastCachePipeline) -> Fitting:
    return Fitting(pipe, PROMPTS, Reference("ddim", 8, 4.0))


@pytest.fixture(scope="module")
def chosen(fitting: Fitting) -> CachePlan:
    return budget_plan(fitting, TIMES, 3.5, lambda _: None)


def drawn(pipe: FastCachePipeline, plan: CachePlan | None, **others: Any) -> Tensor:
    arguments = {"guidance_scale": 4.0, "seed": 9, "output_type": "latent"} | others
    return pipe("a red ring", plan=plan, **arguments).images


def test_a_plan_for_a_budget_keeps_it(chosen: CachePlan, fitting: Fitting) -> None:
    assert chosen.fit is not None
    assert chosen.fit.points[0] == 0
    assert chosen.fit.full_steps is not None
    spent = len(chosen.refresh_steps) + 0.1 * (chosen.num_steps - len(chosen.refresh_steps))
    assert chosen.fit.full_steps == pytest.approx(spent)
    assert spent <= 3.5
    assert chosen.fit.psnr_db is not None
    with pytest.raises(ValueError, match="a budget of 1 full step or more"):
        budget_plan(fitting, TIMES, 0.5, lambda _: None)


def test_plans_of_full_steps_alone_are_tried_too(pipe: FastCachePipeline) -> None:
    """And of the last few of both kinds the one that left-out pictures come nearest by is taken."""
    said, ends = list[str](), list[tuple[CachePlan, float]]()

    class Watched(Fitting):
        def _fit(self, plan: CachePlan, points: Sequence[int], full_steps: float | None) -> tuple[CachePlan, float]:
            made, near = super()._fit(plan, points, full_steps)
            ends.append((made, near))
            return made, near

    chosen = budget_plan(Watched(pipe, PROMPTS, Reference("ddim", 8, 4.0), said.append), TIMES, 3.5, said.append)
    assert sum("changes of the best" in line for line in said) == 2
    assert ("full",) * 3 in [plan.passes for plan, _ in ends]
    assert len(ends) == 4
    assert chosen == max(ends, key=lambda end: end[1])[0]
    assert all(plan.fit is not None and plan.fit.psnr_db == near for plan, near in ends)  # of left-out pictures


def test_a_fitted_plan_of_every_call_in_full_is_the_reference(pipe: FastCachePipeline, fitting: Fitting) -> None:
    plan = fitting.fit(CachePlan.all_full(8), range(8))
    assert_same(drawn(pipe, plan), drawn(pipe, None, num_inference_steps=8, sampler="ddim"), 1e-4)


def assert_same(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_a_fitted_plan_runs_as_its_rows_say_in_both_drivers(
    pipe: FastCachePipeline, chosen: CachePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = drawn(pipe, chosen)
    monkeypatch.setattr("fastcache.loop.steps.found_library", lambda: None)
    assert_same(drawn(pipe, chosen), own, 1e-5)
    again = CachePlan.from_json(chosen.to_json())
    assert torch.equal(drawn(pipe, again), drawn(pipe, chosen))


def test_a_run_ends_where_the_pictures_that_were_fitted_ended(pipe: FastCachePipeline) -> None:
    """By rows that count what guidance added, which none of the plain ones could."""
    table, points = pipe_table(pipe), (0, 3, 5)
    walks = Walks(pipe, PROMPTS, range(len(PROMPTS)), table=table, guidance_scale=4.0)
    states = walks.reference()
    fitted = fit_rows(lambda step, x: walks.guided("full", points[step], x), states, table, "epsilon", points)
    assert any(fitted.contrasts)
    plain = fit_rows(lambda step, x: (walks.predict("full", points[step], x), None), states, table, "epsilon", points)
    assert (fitted.result - states[-1]).norm() < (plain.result - states[-1]).norm()
    own = fit_of(fitted.rows, points, 8)
    manifest = pipe.bundle.manifest
    size: dict[str, Any] = {"height": manifest.height, "width": manifest.width}
    own = replace(own, contrasts=fitted.contrasts, weights_sha256=manifest.weights_sha256, **size)
    plan = CachePlan(("full",) * 3, sampler="ddim", fit=own)
    for k, prompt in enumerate(PROMPTS):
        found = pipe(prompt, plan=plan, guidance_scale=4.0, seed=k, output_type="latent").images
        assert_same(found[0].double(), fitted.result[k], 1e-4)


def pipe_table(pipe: FastCachePipeline) -> SamplerTable:
    return compile_sampler(make_scheduler("ddim", pipe.bundle.manifest.model.scheduler), 8)


def test_what_a_fitted_plan_is_not_for(pipe: FastCachePipeline, chosen: CachePlan) -> None:
    assert chosen.fit is not None
    other = replace(chosen, fit=replace(chosen.fit, weights_sha256="0" * 64))
    smaller = replace(chosen, fit=replace(chosen.fit, height=8))
    for plan, others, message in (
        (other, {}, "a plan fitted for"),
        (smaller, {}, "a plan fitted for"),
        (chosen, {"num_inference_steps": 50}, "num_inference_steps"),
        (chosen, {"eta": 1.0}, "eta 0 with a fitted plan"),
        (chosen, {"denoising_end": 0.5}, "no denoising_end with a fitted plan"),
        (chosen, {"sampler": "euler"}, "made for sampler euler"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(pipe, plan, **others)
    with pytest.warns(UserWarning, match="fitted at guidance 4 runs at 9"):
        drawn(pipe, chosen, guidance_scale=9.0)


def test_image_to_image_begins_at_a_later_full_point(pipe: FastCachePipeline, chosen: CachePlan) -> None:
    image = pipe("a red ring", num_inference_steps=2, seed=0).images[0]
    found = pipe("a blue ring", plan=chosen, image=image, strength=0.9, seed=1, guidance_scale=4.0, output_type="pt")
    assert bool(found.images.isfinite().all())
    assert found.plan.num_steps < chosen.num_steps or chosen.fit is None or chosen.fit.points == (0,)


def test_climbing_finds_what_scores_more_and_keeps_the_budget() -> None:
    costs = {"full": 1.0, "shallow-0": 0.1}
    wanted = ((0, "full"), (3, "shallow-0"), (7, "full"))
    asked = list[Stops]()

    def score(stops: Stops) -> float:
        asked.append(stops)
        return -len(set(stops) ^ set(wanted))

    starts = families(10, costs, 2.5)
    assert all(cost_of(stops, costs) <= 2.5 for stops in starts)
    ranked = climb(starts, 10, costs, 2.5, score, 300)
    assert ranked[0] == (wanted, 0)
    assert [scored for _, scored in ranked] == sorted((scored for _, scored in ranked), reverse=True)
    assert len(set(asked)) == len(asked)
    assert all(cost_of(stops, costs) <= 2.5 + 1e-6 and stops[0] == (0, "full") for stops in asked)


def test_rivals_of_all_steps_stand_only_where_reuse_saves_time(pipe: FastCachePipeline, fitting: Fitting) -> None:
    measured = calibrate_bundle(pipe, PROMPTS[:2], num_steps=8, guidance_scale=4.0)
    kinds = [
        {
            arm.name.split()[0]
            for arm in rivals(pipe, fitting, [2.0, 3.5], StepTimes(10.0, {0: shallow_ms}, 1), measured)
        }
        for shallow_ms in (1.0, 10.0, 12.0)
    ]
    assert {"optimal", "threshold", "skip", "ddim", "uncached"} <= kinds[0]
    assert kinds[1] == kinds[2] == {"uncached", "skip", "ddim", "dpm++_2m", "unipc", "euler"}
