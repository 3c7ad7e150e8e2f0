"""guidance_step: all samplers against diffusers, guidance and rescaling, what it writes where, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcache import compile_sampler
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler
from fastcache.sampler.table import SamplerTable
from fastcache_kernels.guidance import GuidanceStep
from fastcache_kernels.values import StepTables, step_tables

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CPU = torch.device("cpu")
STEPS = 7
SCALE = 4.0
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)],
    ids=["float32", "float16", "bfloat16"],
)


class Loop:
    """A guidance step and its buffers, for updates that need no sampler unless one is given."""

    def __init__(
        self,
        *,
        shape: tuple[int, int, int, int] = (2, 4, 5, 6),
        halves: int = 2,
        steps: int = 3,
        window: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        input_channels: int = 0,
        rescale: float = 0.0,
        tables: StepTables | None = None,
        noise: Tensor | None = None,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        samples, channels, *plane = shape
        self.tables = tables or plain_tables(steps, window, device)
        self.ring = torch.full((self.tables.ring_calls, 3, *shape), torch.nan, device=device)
        self.ring[0, 0] = self.normal(*shape).to(device)
        self.noise_pred = self.normal(halves * samples, channels, *plane).to(device, dtype)
        self.model_input = torch.full(
            (halves * samples, input_channels or channels, *plane), 9.0, dtype=dtype, device=device
        )
        self.timestep = torch.full((halves * samples,), torch.nan, device=device)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.halves, self.samples, self.channels = halves, samples, channels
        self.guidance = self.build(rescale=rescale, noise=noise)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def build(self, **options: Any) -> GuidanceStep:
        return GuidanceStep(
            self.noise_pred, self.ring, self.tables, self.step, self.model_input, self.timestep, **options
        )

    def run(self, step: int = 0) -> None:
        self.step.fill_(step)
        self.guidance.run()

    def predictions(self) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional one, in float64."""
        halves = self.noise_pred.double().unflatten(0, (self.halves, self.samples))
        return halves[0], halves[-1]


def plain_tables(steps: int, window: int, device: torch.device) -> StepTables:
    """Each update weighs the rows of its last `window` calls by numbers that all differ."""
    updates = list[tuple[int, list[float]]]()
    for i in range(steps):
        first = max(0, i + 1 - window)
        updates.append((first, [0.1 * (3 * i + k) - 0.7 for k in range(3 * (i + 1 - first))]))
    return step_tables(
        updates,
        input_scales=[1 / (i + 1) for i in range(steps)],
        timesteps=[900.0 - i for i in range(steps)],
        guidance=[SCALE + i for i in range(steps)],
        device=device,
    )


def tables_of(table: SamplerTable, device: torch.device) -> StepTables:
    return step_tables(
        [(update.first, update.weights) for update in table.recursion()],
        input_scales=table.input_scale.tolist(),
        timesteps=table.timesteps.tolist(),
        guidance=SCALE,
        device=device,
    )


def model(sample: Tensor, timestep: Tensor, pull: Tensor) -> Tensor:
    """Follows its sample and its timestep, differently in each half."""
    halves = torch.linspace(0.2, 0.3, len(sample), dtype=sample.dtype, device=sample.device)
    time = 1 + (timestep / 1000).to(sample.dtype)
    return (halves * time)[:, None, None, None] * (sample + pull)


def diffusers_latents(name: str, start: Tensor, pull: Tensor, steps: int) -> Tensor:
    """What diffusers' own scheduler makes of the model, in float32."""
    scheduler: Any = make_scheduler(name, CONFIG)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    latents = start
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        unconditional, conditional = model(sample, timestep.expand(len(sample)), pull).chunk(2)
        guided = unconditional + SCALE * (conditional - unconditional)
        arguments = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        latents = scheduler.step(guided, timestep, latents, **arguments).prev_sample
    return latents


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "plms"])
def test_every_sampler_against_diffusers(name: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 6, 5)
    table = compile_sampler(make_scheduler(name, CONFIG), STEPS)
    start = torch.randn(shape, generator=generator) * table.init_noise_sigma
    pull = torch.randn(2 * shape[0], *shape[1:], generator=generator)
    expected = diffusers_latents(name, start, pull, STEPS)
    drawn, noise = torch.Generator().manual_seed(1), torch.zeros(table.num_calls, *shape)
    for i in range(table.num_calls):
        if table.draws_noise(i):
            noise[i] = torch.randn(shape, generator=drawn)
    loop = Loop(shape=shape, tables=tables_of(table, device), device=device, noise=noise.to(device))
    loop.ring[0, 0] = start.to(device)
    loop.model_input.copy_((loop.ring[0, 0] * table.input_scale[0]).repeat(2, 1, 1, 1))
    loop.timestep.fill_(table.timesteps[0])
    for i in range(table.num_calls):
        loop.noise_pred.copy_(model(loop.model_input, loop.timestep, pull.to(device)))
        loop.run(i)
    got = loop.ring[table.num_calls % loop.tables.ring_calls, 0].cpu()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@DTYPES
def test_guidance(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    loop = Loop(dtype=dtype, device=device)
    x, (unconditional, conditional) = loop.ring[0, 0].double().clone(), loop.predictions()
    loop.ring[0, 2] = 0.5
    loop.run()
    guided = unconditional + SCALE * (conditional - unconditional)
    # float32 whatever the model's dtype
    torch.testing.assert_close(loop.ring[0, 1].double(), guided, rtol=1e-5, atol=1e-5)
    latents = -0.7 * x - 0.6 * guided - 0.5 * 0.5
    torch.testing.assert_close(loop.ring[0, 0].double(), latents, rtol=1e-5, atol=1e-5)
    expected = torch.cat([latents, latents]) / 2
    torch.testing.assert_close(loop.model_input.double(), expected, rtol=tolerance, atol=tolerance)
    assert loop.timestep.tolist() == [899.0] * 4


@DTYPES
@pytest.mark.parametrize("shape", [(3, 4, 7, 5), (1, 1, 1, 2), (2, 4, 33, 35)], ids=["140", "2", "4620"])
def test_rescaled_guidance(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    loop = Loop(shape=shape, dtype=dtype, device=device, rescale=0.7)
    loop.noise_pred += 3
    unconditional, conditional = loop.predictions()
    loop.run()
    guided = unconditional + SCALE * (conditional - unconditional)
    axes = (1, 2, 3)
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    expected = guided * (0.7 * ratio + 0.3)
    torch.testing.assert_close(loop.ring[0, 1].double(), expected, rtol=1e-5, atol=1e-5 * guided.abs().max().item())


def test_without_guidance_the_prediction_is_taken_as_it_is(device: torch.device) -> None:
    loop = Loop(halves=1, device=device, rescale=0.7)
    loop.ring[0, 2] = 0
    loop.run()
    assert torch.equal(loop.ring[0, 1], loop.noise_pred)
    torch.testing.assert_close(loop.model_input, loop.ring[0, 0] / 2)
    assert loop.timestep.tolist() == [899.0] * 2


def test_the_step_is_read_from_memory_and_the_ring_goes_round(device: torch.device) -> None:
    """Against a history that keeps every row, with guidance of its own for each step."""
    steps, window = 7, 3
    noise = torch.randn(steps, 2, 4, 5, 6, generator=torch.Generator().manual_seed(2)).to(device)
    loop = Loop(steps=steps, window=window, device=device, noise=noise)
    rows = [loop.ring[0, 0].double()]
    for i in range(steps):
        loop.noise_pred.copy_(loop.normal(4, 4, 5, 6))
        unconditional, conditional = loop.predictions()
        loop.run(i)
        rows += [unconditional + (SCALE + i) * (conditional - unconditional), noise[i].double()]
        first = max(0, i + 1 - window)
        rows.append(sum((0.1 * (3 * i + k) - 0.7) * row for k, row in enumerate(rows[3 * first :])))
        expected = rows[-1]
        got = loop.ring[(i + 1) % window, 0].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_row_that_counts_nothing_may_hold_anything(device: torch.device) -> None:
    """Memory fresh from the allocator, or a run that failed: 0 * nan would be nan."""
    tables = step_tables(
        [(0, (0.5, 0.5, 0)), (0, (0, 0.25, 0, 1, -1, 0))], input_scales=[1, 1], timesteps=[2, 1], device=device
    )
    loop = Loop(tables=tables, device=device)
    assert loop.ring.isnan().any()
    loop.run(0)
    assert loop.ring[1, 0].isfinite().all()
    loop.run(1)
    assert loop.ring[0, 0].isfinite().all()


def test_the_last_step_leaves_the_models_input_alone(device: torch.device) -> None:
    loop = Loop(device=device)
    loop.ring[0, 2] = 0
    loop.run(2)
    assert (loop.model_input == 9).all()
    assert loop.timestep.isnan().all()
    assert loop.ring[0, 0].isfinite().all()


@pytest.mark.parametrize("halves", [1, 2])
def test_further_channels_of_the_models_input_stay(halves: int, device: torch.device) -> None:
    """A mask and a masked image, as inpainting models take beside the latents."""
    loop = Loop(halves=halves, input_channels=9, device=device)
    loop.ring[0, 2] = 0
    loop.run()
    torch.testing.assert_close(loop.model_input[:, :4], loop.ring[0, 0].repeat(halves, 1, 1, 1) / 2)
    assert (loop.model_input[:, 4:] == 9).all()


@pytest.mark.gpu
def test_a_captured_launch_serves_every_step() -> None:
    device = torch.device("cuda:0")
    loop, other = (Loop(device=device, window=2, rescale=0.5) for _ in range(2))
    for each in (loop, other):
        each.ring[:, 2] = 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.guidance.run()
    for i in range(3):
        loop.step.fill_(i)
        graph.replay()
        other.run(i)
        for name in ("ring", "model_input", "timestep"):
            torch.testing.assert_close(getattr(loop, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(2, 9)),
    halves=st.integers(1, 2),
    window=st.integers(1, 7),
)
def test_any_shape_and_window(device: torch.device, shape: tuple[int, int, int, int], halves: int, window: int) -> None:
    noise = torch.randn(window, *shape, generator=torch.Generator().manual_seed(2)).to(device)
    loop = Loop(shape=shape, halves=halves, steps=window, window=window, device=device, noise=noise)
    loop.ring.nan_to_num_(1.0)
    loop.ring[:, 1:] = 1.0
    before = loop.ring.double().clone()
    unconditional, conditional = loop.predictions()
    loop.run(window - 1)
    guided = unconditional + (SCALE + window - 1) * (conditional - unconditional)
    before[window - 1, 1], before[window - 1, 2] = guided, noise[window - 1]
    weights = loop.tables.weights[window - 1].double()
    expected = (weights[:, :, None, None, None, None] * before).sum((0, 1))
    torch.testing.assert_close(
        loop.ring[0, 0].double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().clamp(min=1).item()
    )


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("ring", torch.zeros(2, 3, 2, 4, 5, 6), r"expected ring .* \[1, 3, 2, 4, 5, 6\]"),
        ("ring", torch.zeros(1, 3, 2, 4, 30), r"expected ring of shape \(calls, 3, N, C, H, W\)"),
        ("ring", torch.zeros(1, 3, 2, 4, 5, 6, dtype=torch.float16), "expected ring .* float32"),
        ("noise_pred", torch.zeros(6, 4, 5, 6), "expected noise_pred of 2 or 4 rows for 2 images, got 6"),
        ("noise_pred", torch.zeros(4, 4, 6, 5).mT, "got non-contiguous float32"),
        ("model_input", torch.zeros(4, 3, 5, 6), r"expected model_input of 4 channels or more, got \[4, 3, 5, 6\]"),
        ("model_input", torch.zeros(2, 4, 5, 6), r"expected model_input .* \[4, 4, 5, 6\]"),
        ("timestep", torch.zeros(2), r"expected timestep .* \[4\]"),
        ("timestep", torch.zeros(4, dtype=torch.int64), "expected timestep .* float32"),
        ("step", torch.zeros(1, dtype=torch.int64), "expected step .* int32"),
        ("step", torch.zeros((), dtype=torch.int32), r"expected step .* \[1\]"),
        ("step", torch.zeros(1, dtype=torch.int32, device="meta"), "on cpu, got .* on meta"),
    ],
)
def test_buffers_that_do_not_fit(name: str, tensor: Tensor, expected: str) -> None:
    loop = Loop()
    setattr(loop, name, tensor)
    with pytest.raises(ValueError, match=expected) as caught:
        loop.build()
    assert "\n" not in str(caught.value)


def test_options_and_tables_that_do_not_fit() -> None:
    loop = Loop()
    with pytest.raises(ValueError, match=r"expected rescale from 0 to 1, got 1\.5"):
        loop.build(rescale=1.5)
    with pytest.raises(ValueError, match=r"expected noise .* \[3, 2, 4, 5, 6\]"):
        loop.build(noise=torch.zeros(2, 2, 4, 5, 6))
    loop.tables = replace(loop.tables, guidance=torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected the tables' guidance .* \[3\]"):
        loop.build()
    with pytest.raises(ValueError, match="expected as many input scales"):
        step_tables([(0, (1, 1, 1))], input_scales=[1, 1], timesteps=[1])
    with pytest.raises(ValueError, match="expected 3 weights for each call from 0 to 0, got 6"):
        step_tables([(0, (1, 1, 1, 1, 1, 1))], input_scales=[1], timesteps=[1])
