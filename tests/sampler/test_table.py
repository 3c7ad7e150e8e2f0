"""Oracle: every sampler's table and recursion against diffusers' own step loop, with a nonlinear model."""

from __future__ import annotations

import copy
import inspect
import threading
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from fastcache.sampler.recursion import MAX_WINDOW, Update
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler
from fastcache.sampler.table import NonlinearSamplerError, SamplerTable, compile_sampler, noise_levels

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
CONTRACT = (
    "ddim pndm ddpm euler euler_a dpm++_2m dpm++_2m_karras dpm++_2m_sde unipc heun lms lcm".split()  # noqa: SIM905
)
SHAPE = (1, 4, 6, 6)
DRAWING = {"ddpm", "euler_a", "dpm++_2m_sde", "lcm"}
WIDEST = {"pndm": 5, "lms": 4, "unipc": 3, "heun": 2, "dpm++_2m": 2, "dpm++_2m_karras": 2, "dpm++_2m_sde": 2}


@pytest.mark.parametrize("sampler", ["euler", "heun", "lms", "dpm++_2m", "dpm++_2m_karras"])
def test_noise_levels_are_the_schedulers_own(sampler: str) -> None:
    scheduler: Any = make_scheduler(sampler, CONFIG)
    table = compile_sampler(scheduler, 10)
    scheduler.set_timesteps(10)
    expected = scheduler.sigmas[: table.num_calls].tolist()
    # Karras' sigmas lie between timesteps, and are told to the U-Net as the nearest one.
    assert table.sigmas == pytest.approx(expected, rel=0.02 if "karras" in sampler else 1e-5)


def test_a_signal_of_nothing_has_a_finite_noise_level() -> None:
    scheduler = make_scheduler("euler", CONFIG | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    scheduler.set_timesteps(4)
    levels = noise_levels(scheduler, scheduler.timesteps)
    assert levels is not None
    assert levels[0] == pytest.approx(4096, rel=1e-3)
    assert noise_levels(object(), torch.zeros(3)) is None


def fake_model(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Nonlinear in the sample, different at each timestep, of the size of noise.

    Not chaotic: with a slope three times this steep LCM's 50 steps blow one rounding of x_T up to 1e-3.
    """
    mixed = sample.roll(1, dims=1) * 0.3 - sample.roll(1, dims=-1) * 0.2 + 0.5 * sample
    return torch.tanh(mixed + timestep / 500) + 0.2 * torch.sin(sample)


@dataclass
class Start:
    x: torch.Tensor
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def start(scheduler: Any) -> Start:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)) * float(scheduler.init_noise_sigma)
    return Start(x, seed=11)


def stepped(scheduler: Any, begin: Start, begin_index: int = 0, **kwargs: Any) -> list[torch.Tensor]:
    """The loop of a diffusers pipeline, in float32; the scheduler has its timesteps."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs["generator"] = begin.generator()
    x, xs = begin.x, list[torch.Tensor]()
    for t in scheduler.timesteps[begin_index:]:
        output = fake_model(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x, **kwargs).prev_sample
        xs.append(x)
    return xs


def tabled(table: SamplerTable, begin: Start, recursion: tuple[Update, ...] | None) -> list[torch.Tensor]:
    """The runtime's loop, in float32: by the recursion, or by the table's dense rows."""
    generator, calls = begin.generator(), table.num_calls
    history = torch.zeros(3 * calls + 3, begin.x.numel())
    history[0] = begin.x.flatten()
    xs = list[torch.Tensor]()
    for i in range(calls):
        x = history[3 * i].view(SHAPE)
        output = fake_model(x * table.input_scale[i].float(), float(table.timesteps[i]))
        history[3 * i + 1] = output.flatten()
        if table.draws_noise(i):
            history[3 * i + 2] = randn_tensor(SHAPE, generator=generator).flatten()
        if recursion is None:
            x = table.x[i].float() * history[0]
            x = x + table.eps[i].float() @ history[1 : 3 * calls : 3]
            x = x + table.noise[i].float() @ history[2 : 3 * calls : 3]
        else:
            update = recursion[i]
            x = torch.tensor(update.weights) @ history[3 * update.first : 3 * (i + 1)]
        history[3 * i + 3] = x
        xs.append(x.view(SHAPE))
    return xs


def worst(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest error of any step, relative to the size of the sample at that step."""
    assert len(got) == len(expected)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


def assert_follows(table: SamplerTable, expected: list[torch.Tensor], begin: Start) -> None:
    """To 2e-5, five times better than what is promised; 3e-6 is the worst seen."""
    assert worst(tabled(table, begin, None), expected) <= 2e-5
    assert worst(tabled(table, begin, table.recursion()), expected) <= 2e-5


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{**CONFIG, **config})  # pyright: ignore[reportArgumentType]


def test_the_twelve_samplers_and_an_alias() -> None:
    assert set(SAMPLERS) == {*CONTRACT, "plms"}
    assert SAMPLERS["plms"] == SAMPLERS["pndm"]


@pytest.mark.parametrize("num_steps", [10, 25, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CONTRACT)
def test_table_and_recursion_follow_diffusers(name: str, prediction_type: str, num_steps: int) -> None:
    scheduler: Any = make_scheduler(name, {**CONFIG, "prediction_type": prediction_type})
    assert scheduler.config.prediction_type == prediction_type
    table = compile_sampler(scheduler, num_steps)
    scheduler.set_timesteps(num_steps)
    begin = start(scheduler)

    assert_follows(table, stepped(scheduler, begin), begin)
    assert table.num_calls == len(scheduler.timesteps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    assert table.init_noise_sigma == float(scheduler.init_noise_sigma)
    assert table.widest_window == WIDEST.get(name, 1) <= MAX_WINDOW
    assert (table.recursion() == table.stepwise) == (name != "unipc")
    assert any(table.noise_drawn) == (name in DRAWING)


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm++_2m", "unipc", "heun", "lcm"])
def test_begin_index_is_the_loop_of_image_to_image(name: str) -> None:
    scheduler: Any = make_scheduler(name, CONFIG)
    table = compile_sampler(scheduler, 20, begin_index=8)
    scheduler.set_timesteps(20)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(8)
    begin = start(scheduler)

    assert_follows(table, stepped(scheduler, begin, begin_index=8), begin)
    assert table.num_calls == len(scheduler.timesteps) - 8


@pytest.mark.parametrize("begin_index", [-1, 10])
def test_begin_index_outside_the_timesteps(begin_index: int) -> None:
    with pytest.raises(ValueError, match=rf"begin_index in 0\.\.9, got {begin_index}; DDIMScheduler makes 10"):
        compile_sampler(ddim(), 10, begin_index=begin_index)


def test_step_kwargs_reach_the_scheduler() -> None:
    scheduler = ddim()
    table = compile_sampler(scheduler, 25, eta=1.0)
    scheduler.set_timesteps(25)
    begin = start(scheduler)

    assert all(table.noise_drawn)
    assert not any(compile_sampler(scheduler, 25).noise_drawn)
    assert_follows(table, stepped(scheduler, begin, eta=1.0), begin)


@pytest.mark.parametrize("class_name", ["KDPM2DiscreteScheduler", "DEISMultistepScheduler", "PNDMScheduler"])
def test_schedulers_without_a_name_of_ours(class_name: str) -> None:
    """PNDM here with its Runge-Kutta steps, three of which look back further than any window."""
    scheduler: Any = getattr(diffusers, class_name).from_config(CONFIG)
    table = compile_sampler(scheduler, 20)
    scheduler.set_timesteps(20)
    begin = start(scheduler)

    assert_follows(table, stepped(scheduler, begin), begin)


def test_the_dense_row_is_what_remains_where_no_window_holds() -> None:
    """x_{i+1} = x_i + the sum of all e so far: no five calls know the older e apart."""
    calls = 12
    counts = torch.arange(calls, 0, -1, dtype=torch.float64)
    eps = torch.stack([(counts - (calls - 1 - i)).clamp(min=0) ** 3 for i in range(calls)])
    zeros, ones = torch.zeros(calls, calls, dtype=torch.float64), torch.ones(calls, dtype=torch.float64)
    table = SamplerTable(ones, ones, ones, eps.cos().tril(), zeros, 1.0, (False,) * calls)

    *_, last = table.recursion()
    assert (last.first, last.window) == (0, calls)
    assert last.weights[0] == 1.0
    assert last.weights[3::3] == (0.0,) * (calls - 1)
    assert last.weights[1::3] == tuple(table.eps[-1].tolist())
    assert table.widest_window == calls


def test_a_window_that_only_cancels_is_not_taken() -> None:
    """x_2 and x_1 differ by 1e-5 e_0, so x_3 = x_T + e_0 would be their difference 100 000 times over."""
    eps = torch.tensor([[0.0, 0, 0], [1e-5, 0, 0], [1, 0, 0]], dtype=torch.float64)
    zeros, ones = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    table = SamplerTable(ones, ones, ones, eps, zeros, 1.0, (False,) * 3)

    last = table.recursion()[-1]
    assert last.window == 3
    assert max(map(abs, last.weights)) <= 1


@pytest.mark.gpu
def test_a_scheduler_that_was_used_on_a_gpu() -> None:
    scheduler = ddim()
    expected = compile_sampler(scheduler, 10)
    scheduler.set_timesteps(10, device="cuda")
    x = torch.zeros(SHAPE, device="cuda")
    scheduler.add_noise(x, x, scheduler.timesteps[:1])
    assert scheduler.alphas_cumprod.is_cuda
    assert torch.equal(compile_sampler(scheduler, 10).eps, expected.eps)


def test_the_table_is_exact_although_euler_rounds_its_sample() -> None:
    """x_{i+1} = x_i + (sigma_{i+1} - sigma_i) e_i: a difference of float32 sigmas, not a rounded sum."""
    scheduler: Any = make_scheduler("euler", CONFIG)
    table = compile_sampler(scheduler, 30)
    scheduler.set_timesteps(30)

    steps = scheduler.sigmas.diff().double()
    torch.testing.assert_close(table.eps, steps.expand(30, 30).tril(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table.x, torch.ones(30, dtype=torch.float64), rtol=1e-12, atol=0)


def test_noise_drawn_with_weight_zero_still_counts_as_drawn() -> None:
    """Euler ancestral draws at its last step too: a generator must end where diffusers' does."""
    table = compile_sampler(make_scheduler("euler_a", CONFIG), 10)
    assert table.noise[-1, -1] == 0
    assert table.draws_noise(9)


@pytest.mark.parametrize(
    ("class_name", "option"),
    [
        ("DDIMScheduler", "clip_sample"),
        ("DDIMScheduler", "thresholding"),
        ("DDPMScheduler", "clip_sample"),
        ("DPMSolverMultistepScheduler", "thresholding"),
        ("HeunDiscreteScheduler", "clip_sample"),
    ],
)
def test_a_scheduler_that_clips_is_found(class_name: str, option: str) -> None:
    scheduler: Any = getattr(diffusers, class_name).from_config({**CONFIG, "clip_sample": False, option: True})
    with pytest.raises(NonlinearSamplerError, match=rf"^step 0 .*{class_name}.*likely {option}=True: set it") as caught:
        compile_sampler(scheduler, 10)
    assert "\n" not in str(caught.value)


def test_a_late_nonlinearity_names_its_step() -> None:
    class Late(diffusers.DDIMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            (x, *rest) = super().step(model_output, timestep, sample, *args, **kwargs)
            return (x.clamp(-0.5, 0.5) if timestep == 701 else x, *rest)

    with pytest.raises(NonlinearSamplerError, match=r"^step 2 \(timestep 701\).*no option known"):
        compile_sampler(Late(**CONFIG), 10)


def test_names_override_options_that_are_not_linear() -> None:
    config = {**CONFIG, "clip_sample": True, "thresholding": True, "skip_prk_steps": False}
    for name in CONTRACT:
        compile_sampler(make_scheduler(name, config), 5)


def test_make_scheduler_keeps_the_defaults_of_the_class_it_makes() -> None:
    """A PNDM config says "leading" by default only; Euler's default is "linspace", as in from_config."""
    config: Any = diffusers.PNDMScheduler(beta_schedule="scaled_linear").config
    assert make_scheduler("euler", config).config.timestep_spacing == "linspace"
    assert make_scheduler("euler", {**CONFIG, "timestep_spacing": "trailing"}).config.timestep_spacing == "trailing"


def test_an_unknown_sampler_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"ddim, pndm, plms.*lcm, got 'dmi'") as caught:
        make_scheduler("dmi", CONFIG)
    assert all(name in str(caught.value) for name in CONTRACT)


def test_the_callers_scheduler_is_untouched() -> None:
    scheduler: Any = make_scheduler("unipc", CONFIG)
    scheduler.set_timesteps(7)
    x = torch.randn(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)
    before = copy.deepcopy(vars(scheduler))
    compile_sampler(scheduler, 12)

    after = vars(scheduler)
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0) if isinstance(value, torch.Tensor) else None
        assert isinstance(value, torch.Tensor | list) or after[key] == value, key
    assert scheduler.step_index == 1


def test_no_random_numbers_are_taken_from_the_caller() -> None:
    state = torch.get_rng_state()
    compile_sampler(make_scheduler("ddpm", CONFIG), 10)
    assert torch.equal(state, torch.get_rng_state())


def test_other_threads_draw_their_own_noise() -> None:
    drawn: dict[str, torch.Tensor] = {}

    def draw(who: str) -> None:
        drawn[who] = randn_tensor((2, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float32)

    class Watched(diffusers.DDPMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            other = threading.Thread(target=draw, args=("other",))
            other.start()
            other.join()
            return super().step(*args, **kwargs)

    draw("before")
    compile_sampler(Watched.from_config({**CONFIG}), 3)
    draw("after")
    assert torch.equal(drawn["other"], drawn["before"])
    assert torch.equal(drawn["after"], drawn["before"])


class Broken(diffusers.DDIMScheduler):
    """Fails at the timestep 701, step 2 of 10."""

    fault = "raise"

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if timestep == 701:
            if self.fault == "raise":
                raise RuntimeError("no such\nsigma")
            if self.fault == "nan":
                return (sample * float("nan"),)
            randn_tensor(sample.shape)
            randn_tensor(sample.shape)
        return super().step(model_output, timestep, sample, *args, **kwargs)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "expected a new sample, got RuntimeError: no such sigma; check"),
        ("nan", "expected finite values, got inf or nan; check"),
        ("draw twice", "expected at most one draw of noise, got 2; run"),
    ],
)
def test_a_failing_step_is_named_and_the_noise_restored(fault: str, message: str) -> None:
    scheduler = Broken(**CONFIG)
    scheduler.fault = fault
    with pytest.raises(ValueError, match=rf"^step 2 \(timestep 701\) of Broken: {message}") as caught:
        compile_sampler(scheduler, 10)
    assert not isinstance(caught.value, NonlinearSamplerError)
    assert "\n" not in str(caught.value)
    assert torch.randn(3).dtype is torch.float32


def test_an_unknown_step_argument_is_named() -> None:
    with pytest.raises(ValueError, match=r"^step 0 .*'etta'"):
        compile_sampler(ddim(), 10, etta=1.0)


@pytest.mark.parametrize(("name", "num_steps"), [("ddim", 0), ("ddim", 1001), ("lcm", 51)])
def test_a_number_of_steps_that_no_schedule_has(name: str, num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps.*{num_steps}") as caught:
        compile_sampler(make_scheduler(name, CONFIG), num_steps)
    assert "\n" not in str(caught.value)
