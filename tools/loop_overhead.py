"""What the loop costs besides the engines, beside diffusers' own: python tools/loop_overhead.py

Both loops run over a U-Net that does nothing, so whatever time passes is theirs. `step` is the time from the end of one
U-Net call to the start of the next; `run` is a whole run, given embeddings and latents and giving latents, divided by
its steps. Rounds alternate between the two, and a figure is the median of the rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import torch
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastcache.run.buffers import BufferPool
from fastcache.run.denoise import denoise
from fastcache.run.plan import CachePlan
from fastcache.run.sampler import SamplerTable, compile_sampler, make_scheduler
from fastcache_engines import TensorSpec

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TOKENS, WIDTH = 77, 768


class Clock:
    """When the U-Net was called, and the figures of a run from that."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []

    def call(self) -> None:
        now = time.perf_counter()
        self.calls.append((now, time.perf_counter()))

    def time(self, run: Callable[[], None]) -> Times:
        self.calls.clear()
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        between = [after[0] - before[1] for before, after in pairwise(self.calls)]
        return Times(statistics.fmean(between) * 1e6, (end - start) / len(self.calls) * 1e6)


class Times(NamedTuple):
    """Microseconds a step, between U-Net calls and over a whole run."""

    step: float
    run: float


class IdleEngine:
    """An engine that computes nothing; it is its own binding."""

    def __init__(self, size: int, clock: Clock, *, stores: bool) -> None:
        feature = (TensorSpec("cached_feature", "float32", ("batch", 320, size, size)),)
        self.clock = clock
        self.inputs = (
            TensorSpec("sample", "float32", ("batch", 4, size, size)),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", TOKENS, WIDTH)),
            *(() if stores else feature),
        )
        self.outputs = (
            TensorSpec("noise_pred", "float32", ("batch", 4, size, size)),
            *(feature if stores else ()),
        )

    def bind(self, tensors: Mapping[str, Tensor]) -> IdleEngine:
        del tensors
        return self

    def run(self) -> None:
        self.clock.call()


class IdleUNet(nn.Module):
    """A U-Net that computes nothing, with what the pipeline asks of one."""

    def __init__(self, size: int, clock: Clock) -> None:
        super().__init__()
        self.clock, self.noise_pred = clock, torch.zeros(2, 4, size, size)
        self.config = SimpleNamespace(in_channels=4, sample_size=size, time_cond_proj_dim=None)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def __call__(self, *_: Any, **__: Any) -> tuple[Tensor]:
        self.clock.call()
        return (self.noise_pred,)


def ours(table: SamplerTable, size: int) -> Callable[[], Times]:
    """A function that runs the loop once and says what it took."""
    clock = Clock()
    full, shallow = IdleEngine(size, clock, stores=True), IdleEngine(size, clock, stores=False)
    pool = BufferPool(full, shallow, batch=1, halves=2, num_calls=table.num_calls, channels=4)
    plan = CachePlan.uniform(table.num_calls, 3)
    latents, embeds = torch.randn(1, 4, size, size), torch.zeros(2, TOKENS, WIDTH)

    def run() -> None:
        pool.set_inputs({"encoder_hidden_states": embeds})
        pool.latents[0].copy_(latents).mul_(table.init_noise_sigma)
        *_, last = denoise(pool, table, plan, guidance_scale=7.5)
        last.latents.clone()

    return lambda: clock.time(run)


def theirs(sampler: str, steps: int, size: int) -> Callable[[], Times]:
    """The same for `StableDiffusionPipeline`."""
    small = UNet2DConditionModel(
        sample_size=size, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=small,
        scheduler=make_scheduler(sampler, BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    clock = Clock()
    pipe.unet = IdleUNet(size, clock)
    latents, embeds = torch.randn(1, 4, size, size), torch.zeros(1, TOKENS, WIDTH)

    def run() -> None:
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            latents=latents,
            num_inference_steps=steps,
            output_type="latent",
        )

    return lambda: clock.time(run)


def measure(sampler: str, size: int, steps: int, rounds: int) -> dict[str, Any]:
    table = compile_sampler(make_scheduler(sampler, BETAS), steps)
    arms = (ours(table, size), theirs(sampler, steps, size))
    for arm in arms:
        arm()  # warm up
    taken = [[arm() for arm in arms] for _ in range(rounds)]
    figures: dict[str, Any] = {"sampler": sampler, "latents": f"{size}x{size}", "steps": steps}
    for kind in Times._fields:
        fastcache_us, diffusers_us = (
            statistics.median(getattr(times, kind) for times in arm) for arm in zip(*taken, strict=True)
        )
        figures[f"{kind}_us"] = round(fastcache_us, 2)
        figures[f"{kind}_us_diffusers"] = round(diffusers_us, 2)
        figures[f"{kind}_ratio"] = round(fastcache_us / diffusers_us, 4)
    return figures


def main(
    steps: int = 50,
    rounds: Annotated[int, typer.Option(help="How often the two take turns.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare the two loops at two latent sizes and with two samplers, guidance on, one thread."""
    torch.set_num_threads(1)
    rows = [measure(sampler, size, steps, rounds) for size in (16, 64) for sampler in ("ddim", "dpm++_2m")]
    if as_json:
        typer.echo(json.dumps({"torch": torch.__version__, "rounds": rounds, "rows": rows}))
        return
    table = Table(*(name.replace("_", "\n", 1) for name in rows[0]))
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
