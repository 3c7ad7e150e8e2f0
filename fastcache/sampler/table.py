"""Turn a diffusers scheduler into a table of numbers, and the table into one weighted sum per U-Net call.

Every common scheduler is linear in x_T, the model's outputs and the noise it draws, so running the real one
once on basis vectors says all there is to know about it. Knows nothing about U-Nets, plans or guidance.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastcache.sampler.recursion import MAX_WINDOW, Update, floats, own_update, shortest_update
from fastcache.sampler.scheduler import Scheduler
from fastcache_kernels.values import StepTables, step_tables

# A linear scheduler keeps to its table to 1e-14; clipping moves a sample by a good part of itself.
_LINEARITY_TOLERANCE: Final = 1e-4
_PROBES: Final = 64


class NonlinearSamplerError(ValueError):
    """The scheduler is no linear function of its inputs: run its own `step` instead of a table."""


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """x_{i+1} = x[i] x_T + sum_j eps[i, j] e_j + sum_j noise[i, j] z_j, for each U-Net call i.

    e_j is the raw output of call j, be it epsilon or v; z_j is the noise drawn at call j. x_T is what the
    loop starts from, so already scaled by init_noise_sigma. The model sees input_scale[i] * x_i at
    timesteps[i].

    `stepwise` holds the updates as the scheduler itself makes them from the x, e and z of its calls; `sigmas` the
    noise over the signal in what the model sees at each call, where the scheduler tells.

    With `contrasts`, as a fitted plan's rows may have them, z_j stands for what guidance added at call j instead of
    noise: the guidance scale less 1, times the conditional prediction less the unconditional one.

    Shapes: timesteps, input_scale, x (calls,); eps, noise (calls, calls), lower triangular; all float64.
    """

    timesteps: Tensor
    input_scale: Tensor
    x: Tensor
    eps: Tensor
    noise: Tensor
    init_noise_sigma: float
    noise_drawn: tuple[bool, ...]
    stepwise: tuple[Update, ...] = ()
    sigmas: tuple[float, ...] | None = None
    contrasts: bool = False

    @property
    def num_calls(self) -> int:
        return len(self.timesteps)

    @property
    def widest_window(self) -> int:
        """The most calls any update of `recursion` looks back over."""
        return max(update.window for update in self.recursion())

    def draws_noise(self, call: int) -> bool:
        """Whether the scheduler draws at this call, be it with weight 0, so that generators stay in step."""
        return self.noise_drawn[call]

    def recursion(self) -> tuple[Update, ...]:
        """Each row of the table rewritten over few past calls, so that a step reads few tensors.

        Where the scheduler itself looks back over MAX_WINDOW calls at most, the updates are its own, and so also
        right when a callback has replaced some x. UniPC's are rewritten: its corrector keeps a sample of its own,
        which holds every call so far.
        """
        return self._recursion

    @cached_property
    def numbers(self) -> StepTables:
        """The table over a ring of the last calls, as drivers read it; the ring is as long as the widest window."""
        return step_tables(
            [(update.first, update.weights) for update in self.recursion()],
            input_scales=floats(self.input_scale),
            timesteps=floats(self.timesteps),
        )

    def updates_at(self, guidance_scale: float) -> tuple[Update, ...]:
        """The updates of a run at this guidance, whose z is noise or a plain difference of its halves."""
        if not self.contrasts:
            return self.recursion()
        beyond = (1.0, 1.0, guidance_scale - 1)
        return tuple(
            Update(update.first, tuple(weight * beyond[k % 3] for k, weight in enumerate(update.weights)))
            for update in self.recursion()
        )

    def weights_at(self, guidance_scale: float) -> Tensor:
        """The same as `numbers` has them. Shapes: (calls, ring calls, 3), float32."""
        weights = self.numbers.weights
        return weights * weights.new_tensor((1.0, 1.0, guidance_scale - 1)) if self.contrasts else weights

    def foretells(self, prediction_type: str) -> list[tuple[float, float]]:
        """What x and e of each call count in the picture that it foretells; x alone where no noise levels are known.

        Source: arXiv 2010.02502, equation 9, for noise; arXiv 2202.00512, section 4, for v.
        """
        if self.sigmas is None:
            return [(1.0, 0.0)] * self.num_calls
        if prediction_type == "sample":
            return [(0.0, 1.0)] * self.num_calls
        scales = zip(self.sigmas, floats(self.input_scale), strict=True)
        signals = [(sigma, scale, 1 / math.hypot(1, sigma)) for sigma, scale in scales]
        if prediction_type == "v_prediction":
            return [(scale * signal, -sigma * signal) for sigma, scale, signal in signals]
        return [(scale / signal, -sigma) for sigma, scale, signal in signals]

    @cached_property
    def _recursion(self) -> tuple[Update, ...]:
        if self.stepwise and max(update.window for update in self.stepwise) <= MAX_WINDOW:
            return self.stepwise
        calls = self.num_calls
        rows = torch.zeros(calls + 1, 1 + 2 * calls, dtype=torch.float64, device="cpu")
        rows[0, 0] = 1.0
        rows[1:, 0], rows[1:, 1::2], rows[1:, 2::2] = self.x, self.eps, self.noise
        return tuple(shortest_update(rows, call) for call in range(calls))


def compile_sampler(
    scheduler: Scheduler,
    num_steps: int,
    *,
    begin_index: int = 0,
    places: Mapping[str, Sequence[float]] | None = None,
    **step_kwargs: Any,
) -> SamplerTable:
    """Run the scheduler once on basis vectors, in float64, and read off what it does.

    `step_kwargs` go to every `scheduler.step` (eta=1.0, ...). With `begin_index` the loop starts at that
    entry of the timesteps, as image to image does; `places` are its `timesteps` or its `sigmas` in place of those
    that it makes itself. The scheduler given is not changed.

    Raises: NonlinearSamplerError if it clips or thresholds; ValueError if it cannot make the timesteps, or a
        step raises, gives values that are not finite or draws noise twice. The message names the step.
    """
    prepared = prepare(scheduler, num_steps, places)
    if not 0 <= begin_index < len(prepared.timesteps):
        raise ValueError(
            f"expected begin_index in 0..{len(prepared.timesteps) - 1}, got {begin_index}; "
            f"{type(scheduler).__name__} makes {len(prepared.timesteps)} calls for {num_steps} steps"
        )
    if begin_index and hasattr(prepared, "set_begin_index"):
        cast(Any, prepared).set_begin_index(begin_index)
    timesteps: Tensor = prepared.timesteps[begin_index:]
    calls = len(timesteps)
    basis = torch.eye(1 + 2 * calls, dtype=torch.float64, device="cpu")  # x_T, e_0 .., z_0 ..
    trace = _trace(prepared, timesteps, step_kwargs, basis[:1], basis[1 : 1 + calls], basis[1 + calls :])
    history = torch.eye(3 * calls, dtype=torch.float64, device="cpu")  # x_0, e_0, z_0, x_1, e_1, z_1, ...
    stepwise = _trace(prepared, timesteps, step_kwargs, history[::3], history[1::3], history[2::3]).samples
    table = SamplerTable(
        timesteps=timesteps.to("cpu", torch.float64),
        input_scale=torch.tensor(trace.input_scale, dtype=torch.float64, device="cpu"),
        x=trace.samples[:, 0].clone(),
        eps=trace.samples[:, 1 : 1 + calls].clone(),
        noise=trace.samples[:, 1 + calls :].clone(),
        init_noise_sigma=float(getattr(prepared, "init_noise_sigma", 1.0)),
        noise_drawn=trace.noise_drawn,
        stepwise=tuple(own_update(row, call) for call, row in enumerate(stepwise)),
        sigmas=noise_levels(prepared, timesteps),
    )
    _check_superposition(prepared, timesteps, step_kwargs, table)
    return table


def noise_levels(scheduler: Any, timesteps: Tensor) -> tuple[float, ...] | None:
    """sigma = sqrt((1 - alpha) / alpha) at each timestep, None where the scheduler has no alphas_cumprod.

    Between two timesteps of the training its logarithm is interpolated, as diffusers' Karras sigmas are.
    """
    alphas: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    kept = alphas.double().cpu().clamp(2**-24, 1 - 2**-24)  # as diffusers has it where the last signal is 0
    logs = ((1 - kept) / kept).log() / 2
    place = timesteps.double().cpu().clamp(0, len(logs) - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=len(logs) - 1)
    return floats(torch.lerp(logs[below], logs[above], place - below).exp())


def prepare(scheduler: Scheduler, num_steps: int, places: Mapping[str, Sequence[float]] | None = None) -> Scheduler:
    """A copy of the scheduler on the CPU, with its timesteps set: to those of so many steps, or to `places`.

    Raises: ValueError if it cannot make them.
    """
    prepared = copy.deepcopy(scheduler)
    for attribute, value in list(vars(prepared).items()):
        if isinstance(value, Tensor):  # add_noise leaves some tables on the device of its sample
            setattr(prepared, attribute, value.cpu())
    name = type(scheduler).__name__
    if num_steps < 1:
        raise ValueError(f"expected num_steps >= 1, got {num_steps}; ask for at least one step")
    asked: dict[str, Any] = {key: list(values) for key, values in (places or {}).items()}
    if missing := sorted(asked.keys() - inspect.signature(prepared.set_timesteps).parameters.keys()):
        raise ValueError(f"expected no {missing[0]} for {name}, which makes its own, got some; choose another sampler")
    wish = asked or {"num_inference_steps": num_steps}
    try:
        prepared.set_timesteps(**wish, device="cpu")
    except Exception as error:
        told = " and ".join(asked) or f"num_steps {num_steps}"
        raise ValueError(
            f"expected {name} to make timesteps for {told}, got {_told(error)}; "
            "ask for another number of steps or change the scheduler's settings"
        ) from error
    if hasattr(prepared, "get_lms_coefficient"):
        # Integrals, which each run of the scheduler asks for again, of what takes fifty times as long in tensors.
        numbers: Any = copy.copy(prepared)
        numbers.sigmas = floats(numbers.sigmas)
        cast(Any, prepared).get_lms_coefficient = cache(numbers.get_lms_coefficient)
    return prepared


@dataclass(frozen=True, eq=False)
class _Trace:
    samples: Tensor  # (calls, width): x_1, x_2, ...
    input_scale: tuple[float, ...]
    noise_drawn: tuple[bool, ...]


class _Float64Step(TorchFunctionMode):
    """Within it, and on this thread only, torch.randn gives the noise chosen and float64 data stay float64.

    Schedulers draw with diffusers' `randn_tensor`, which ends in torch.randn. Those that cast the sample to
    float32 would only round the table: their coefficients are float32 numbers already and stay what they are.
    """

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise
        self.draws = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn or func is torch.randn_like:
            self.draws += 1
            return self.noise
        if func is torch.Tensor.to and any(value is torch.float32 for value in (*args, *kwargs.values())):
            data: Tensor = args[0]
            if data.dtype is torch.float64 and data.shape == self.noise.shape:
                return data
        return func(*args, **kwargs)


def _unscaled(sample: Tensor, _: Tensor) -> Tensor:
    return sample


def _trace(
    prepared: Scheduler,
    timesteps: Tensor,
    step_kwargs: Mapping[str, Any],
    x: Tensor,
    eps: Tensor,
    noise: Tensor,
) -> _Trace:
    """Run a copy of the prepared scheduler, from x[0]; each call takes its own x if there is one, else the last result.

    Shapes: x (1, width) or (calls, width), eps and noise (calls, width).
    """
    scheduler: Any = copy.deepcopy(prepared)
    scale_input: Callable[[Tensor, Tensor], Tensor] = getattr(scheduler, "scale_model_input", _unscaled)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64, device="cpu")
    sample = x[0][None, None, None]  # some schedulers count on (batch, channel, height, width)
    samples, scales, drawn = list[Tensor](), list[float](), list[bool]()
    for call, timestep in enumerate(timesteps):
        where = f"step {call} (timestep {float(timestep):g}) of {type(prepared).__name__}"
        try:
            scales.append(scale_input(one, timestep).item())
            if call < len(x):
                sample = x[call][None, None, None]
            with _Float64Step(noise[call][None, None, None]) as mode:
                output = eps[call][None, None, None]
                sample = scheduler.step(output, timestep, sample, return_dict=False, **step_kwargs)[0]
        except Exception as error:
            raise ValueError(
                f"{where}: expected a new sample, got {_told(error)}; "
                "check the scheduler's settings and the step's arguments"
            ) from error
        if mode.draws > 1:
            raise ValueError(
                f"{where}: expected at most one draw of noise, got {mode.draws}; run the scheduler's own step"
            )
        if not sample.isfinite().all():
            raise ValueError(
                f"{where}: expected finite values, got inf or nan; "
                "check prediction_type, timestep_spacing and rescale_betas_zero_snr"
            )
        samples.append(sample[0, 0, 0])
        drawn.append(mode.draws == 1)
    return _Trace(torch.stack(samples), tuple(scales), tuple(drawn))


def _check_superposition(
    prepared: Scheduler, timesteps: Tensor, step_kwargs: Mapping[str, Any], table: SamplerTable
) -> None:
    """A scheduler that clips agrees with no table: compare the two on random data."""
    calls = table.num_calls
    generator = torch.Generator(device="cpu").manual_seed(0)
    data = torch.randn(1 + 2 * calls, _PROBES, dtype=torch.float64, device="cpu", generator=generator)
    x, eps, noise = data[0] * table.init_noise_sigma, data[1 : 1 + calls], data[1 + calls :]
    got = _trace(prepared, timesteps, step_kwargs, x[None], eps, noise).samples
    expected = table.x[:, None] * x + table.eps @ eps + table.noise @ noise
    off = (got - expected).abs().amax(1) / expected.abs().amax(1)
    for call in range(calls):
        if not off[call] <= _LINEARITY_TOLERANCE:
            raise NonlinearSamplerError(
                f"step {call} (timestep {float(timesteps[call]):g}) of {type(prepared).__name__}: "
                f"expected it to be linear, got a sample off by {off[call]:.1e} of its size; "
                f"{_remedy(prepared.config)}"
            )


def _remedy(config: Mapping[str, Any]) -> str:
    on = [option for option in ("thresholding", "clip_sample") if config.get(option)]
    if not on:
        return "no option known to cause this is set: run the scheduler's own step"
    likely = " and ".join(f"{option}=True" for option in on)
    return f"likely {likely}: set it False or run the scheduler's own step"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
