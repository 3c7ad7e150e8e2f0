"""What the loop costs besides the engines, beside diffusers' own: python tools/loop_overhead.py

Both loops run over a U-Net that does nothing, so whatever time passes is theirs. `step` is the host's time from the end
of one U-Net call to the start of the next; `run` is a whole run, given embeddings and latents and giving latents,
divided by its steps. On a CPU the loop's own work is compiled C where `fastcache_kernels` was built with it, and then
`us_torch` is the same loop in PyTorch's operations. On a GPU (`--device cuda`) there are further the runs out of CUDA
graphs, one for each kind of step and one for all. Rounds alternate between the loops, and a figure is the median of the
rounds. In a checkout the C is built, and measured, by

    cmake -S . -B build/cpu -DFASTCACHE_AOT_GPU=OFF && cmake --build build/cpu
    python tools/loop_overhead.py --library build/cpu
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from fastcache.bundle.manifest import PassEntry
from fastcache.console import print_table
from fastcache.cut.names import FULL, shallow_pass
from fastcache.loop import steps as loop_steps
from fastcache.loop.drivers import Guidance
from fastcache.loop.drivers.cudagraph import CapturedRun, CudaRecorder
from fastcache.loop.lane import Lane
from fastcache.loop.plan import CachePlan
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import SamplerTable, compile_sampler
from fastcache_engines import TensorSpec
from fastcache_kernels import cpu_step
from fastcache_kernels.launch import KernelError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TOKENS, WIDTH = 77, 768
SHALLOW = shallow_pass(0)
PASSES = {
    FULL: PassEntry(engines=(FULL,), takes=(), stores=("cached_feature",)),
    SHALLOW: PassEntry(engines=(SHALLOW,), takes=("cached_feature",), stores=()),
}


class Clock:
    """When the U-Net was called, and the figures of a run from that."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []

    def call(self) -> None:
        now = time.perf_counter()
        self.calls.append((now, time.perf_counter()))

    def time(self, run: Callable[[], None], steps: int) -> Times:
        """A recording makes its calls once, so that a later run out of it has no times between them: nan."""
        self.calls.clear()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end = time.perf_counter()
        between = [after[0] - before[1] for before, after in pairwise(self.calls)]
        return Times(statistics.fmean(between or [math.nan]) * 1e6, (end - start) / steps * 1e6)


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

    def capturable(self) -> bool:
        return True


class IdleUNet(nn.Module):
    """A U-Net that computes nothing, with what the pipeline asks of one."""

    def __init__(self, size: int, clock: Clock, device: str) -> None:
        super().__init__()
        self.clock, self.noise_pred = clock, torch.zeros(2, 4, size, size, device=device)
        self.config = SimpleNamespace(in_channels=4, sample_size=size, time_cond_proj_dim=None)
        self.device, self.dtype = torch.device(device), torch.float32

    def __call__(self, *_: Any, **__: Any) -> tuple[Tensor]:
        self.clock.call()
        return (self.noise_pred,)


def ours(
    table: SamplerTable,
    size: int,
    rescale: float,
    device: str,
    graphs: Literal["none", "step", "whole"] = "none",
    own_work: cpu_step.Library | KernelError | None = None,
) -> Callable[[], Times]:
    """A function that runs the loop once and says what it took; `own_work` in place of the C that is installed."""
    own_work = own_work or cpu_step.found_library()
    clock, recorder = Clock(), None if graphs == "none" else CudaRecorder()
    engines = {name: IdleEngine(size, clock, stores=name == FULL) for name in PASSES}
    lane = Lane(engines, PASSES, images=1, halves=2, channels=4, device=device)
    plan = CachePlan.uniform(table.num_calls, 3)
    latents, embeds = _inputs(size, device)
    embeds = embeds.repeat(2, 1, 1)
    guidance = Guidance(7.5, rescale)

    def run() -> None:
        loop_steps.found_library = lambda: own_work
        lane.set_inputs({"encoder_hidden_states": embeds})
        if recorder is None:
            one = loop_steps.PlainRun(lane, table, plan, guidance)
        else:
            one = CapturedRun(recorder, lane, table, plan, guidance, stepwise=graphs == "step")
        one.latents.copy_(latents).mul_(table.init_noise_sigma)
        *_, last = one.steps
        last.latents.clone()

    return lambda: clock.time(run, table.num_calls)


def _inputs(size: int, device: str) -> tuple[Tensor, Tensor]:
    """Latents, and the text of one prompt."""
    return torch.randn(1, 4, size, size, device=device), torch.zeros(1, TOKENS, WIDTH, device=device)


def theirs(sampler: str, steps: int, size: int, rescale: float, device: str) -> Callable[[], Times]:
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
    pipe.to(device)
    pipe.unet = IdleUNet(size, clock, device)
    latents, embeds = _inputs(size, device)

    def run() -> None:
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            latents=latents,
            num_inference_steps=steps,
            guidance_rescale=rescale,
            output_type="latent",
        )

    return lambda: clock.time(run, steps)


def measure(
    sampler: str,
    size: int,
    rescale: float,
    steps: int,
    rounds: int,
    device: str,
    library: cpu_step.Library | KernelError,
) -> dict[str, Any]:
    table = compile_sampler(make_scheduler(sampler, BETAS), steps)
    arms = {
        "us": ours(table, size, rescale, device, own_work=library),
        "us_diffusers": theirs(sampler, steps, size, rescale, device),
    }
    if device == "cpu" and isinstance(library, cpu_step.Library):
        arms["us_torch"] = ours(table, size, rescale, device, own_work=KernelError("not to be used"))
    if device == "cuda":
        arms |= {
            "us_step_graphs": ours(table, size, rescale, device, "step"),
            "us_one_graph": ours(table, size, rescale, device, "whole"),
        }
    for arm in arms.values():
        arm()  # warm up
    taken = [{name: arm() for name, arm in arms.items()} for _ in range(rounds)]
    figures: dict[str, Any] = {"sampler": sampler, "rescale": rescale, "latents": f"{size}x{size}", "steps": steps}
    for kind in Times._fields:
        found = {name: statistics.median(getattr(times[name], kind) for times in taken) for name in arms}
        figures |= {f"{kind}_{name}": round(us, 2) for name, us in found.items() if not math.isnan(us)}
        figures[f"{kind}_ratio"] = round(found["us"] / found["us_diffusers"], 4)
    return figures


def main(
    steps: int = 50,
    rounds: Annotated[int, typer.Option(help="How often the two take turns.")] = 40,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the latents are.")] = "cpu",
    library: Annotated[Path | None, typer.Option(help="The folder of libfastcache_cpu.so, if not installed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare the two loops at two latent sizes, two samplers, guidance plain and rescaled, one thread."""
    torch.set_num_threads(1)
    cases = product((16, 64), ("ddim", "dpm++_2m"), (0.0, 0.7))
    found = cpu_step.Library(library) if library else cpu_step.found_library()
    rows = [measure(sampler, size, rescale, steps, rounds, device, found) for size, sampler, rescale in cases]
    if as_json:
        own_work = "torch" if isinstance(found, KernelError) else "aot"
        settings = {"torch": torch.__version__, "device": device, "own_work": own_work, "rounds": rounds}
        typer.echo(json.dumps(settings | {"rows": rows}))
        return
    columns = [name.replace("_", "\n", 1) for name in rows[0]]
    print_table("microseconds a step", columns, [[str(value) for value in row.values()] for row in rows])


if __name__ == "__main__":
    typer.run(main)
