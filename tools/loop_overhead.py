"""What the loop costs a step besides the engines, beside diffusers' own: python tools/loop_overhead.py

Both loops run over a U-Net that does nothing, so whatever time passes is theirs. fastcache's is measured with what it
prepares before the first step, spread over the steps; diffusers' from its first U-Net call to its last, without what
it prepares. Rounds alternate between the two, and a figure is the median of the rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Annotated, Any

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


class IdleEngine:
    """An engine that computes nothing; it is its own binding."""

    def __init__(self, size: int, *, stores: bool) -> None:
        feature = (TensorSpec("cached_feature", "float32", ("batch", 320, size, size)),)
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
        pass


class IdleUNet(nn.Module):
    """A U-Net that computes nothing, and when it was called."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4, sample_size=size, time_cond_proj_dim=None)
        self.device, self.dtype, self.noise_pred = torch.device("cpu"), torch.float32, torch.zeros(2, 4, size, size)
        self.calls: list[tuple[float, float]] = []

    def __call__(self, *_: Any, **__: Any) -> tuple[Tensor]:
        start = time.perf_counter()
        self.calls.append((start, time.perf_counter()))
        return (self.noise_pred,)


def ours(table: SamplerTable, size: int) -> Callable[[], float]:
    """A function that runs the loop once and returns its microseconds a step."""
    full, shallow = IdleEngine(size, stores=True), IdleEngine(size, stores=False)
    pool = BufferPool(full, shallow, batch=1, halves=2, num_calls=table.num_calls, channels=4)
    plan = CachePlan.uniform(table.num_calls, 3)

    def run() -> float:
        start = time.perf_counter()
        for _ in denoise(pool, table, plan, guidance_scale=7.5):
            pass
        return (time.perf_counter() - start) / table.num_calls * 1e6

    return run


def theirs(sampler: str, steps: int, size: int) -> Callable[[], float]:
    """The same for `StableDiffusionPipeline`, without what comes before its first U-Net call and after its last."""
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
    pipe.unet = unet = IdleUNet(size)
    latents, embeds = torch.randn(1, 4, size, size), torch.zeros(1, TOKENS, WIDTH)

    def run() -> float:
        unet.calls.clear()
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            latents=latents,
            num_inference_steps=steps,
            output_type="latent",
        )
        between = [after[0] - before[1] for before, after in zip(unet.calls, unet.calls[1:], strict=False)]
        return statistics.fmean(between) * 1e6

    return run


def measure(sampler: str, size: int, steps: int, rounds: int) -> dict[str, Any]:
    table = compile_sampler(make_scheduler(sampler, BETAS), steps)
    fastcache_run, diffusers_run = ours(table, size), theirs(sampler, steps, size)
    for warm_up in (fastcache_run, diffusers_run):
        warm_up()
    pairs = [(fastcache_run(), diffusers_run()) for _ in range(rounds)]
    fastcache_us, diffusers_us = (statistics.median(arm) for arm in zip(*pairs, strict=True))
    return {
        "sampler": sampler,
        "latents": f"{size}x{size}",
        "steps": steps,
        "fastcache_us_per_step": round(fastcache_us, 2),
        "diffusers_us_per_step": round(diffusers_us, 2),
        "ratio": round(fastcache_us / diffusers_us, 4),
    }


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
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
