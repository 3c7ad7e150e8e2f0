"""The kernels against PyTorch's own operations, on the shapes that models meet -> times and shares of a device copy.

Every call is captured in CUDA graphs and replayed, as the loop does it, so what is timed is the GPU's work and not the
launching. A call's bytes are the least that it must move: each input read once and each output written once. The copy
beside it moves as many, of as large tensors, so that what a cache holds is held for both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastcache.bench.machine import environment, gpus
from fastcache.bench.work import empty_unet, geometry
from fastcache.compile.models import find_model
from fastcache.cut.partition import partition_unet
from fastcache.errors import BackendUnavailable
from fastcache_engines import DType, torch_dtype
from fastcache_kernels import launch, ops, reference
from fastcache_kernels.guidance import GuidanceStep
from fastcache_kernels.values import step_tables

MODELS, SIZES = ("sd15", "sdxl"), (512, 1024)
CALLS = 20  # in one captured graph: a replay costs microseconds, as does a call
REPLAYS = 10  # of each arm, in a repeat
EPS = 1e-5
Shape = tuple[int, int, int, int]
Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One kernel on one shape: what it launches, and the same by PyTorch's operations; both return what they wrote."""

    kernel: str
    shape: tuple[int, ...]
    num_bytes: int
    run: Call
    eager: Call
    models: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class KernelResult:
    """A case's medians, in microseconds, and what they say. `share_of_copy` is the copy's time over the kernel's."""

    kernel: str
    models: tuple[str, ...]
    shape: tuple[int, ...]
    num_bytes: int
    kernel_us: float
    eager_us: float
    compile_us: float | None
    copy_us: float
    gb_per_s: float
    share_of_copy: float
    speedup_vs_eager: float
    speedup_vs_compile: float | None
    compile_skipped: str | None = None


def bench_kernels(
    batch: int, dtype: DType, repeats: int, branch_id: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[KernelResult]]:
    """Time every kernel on the GPU at hand. Returns the document that `bench --kernels --json` writes, and its rows.

    Raises: `BackendUnavailable` where there is nothing to time.
    """
    require_gpu()
    before = gpus()
    results = [_time_case(case, repeats, say) for case in kernel_cases(batch, dtype, "cuda", branch_id)]
    settings = {"batch": batch, "dtype": dtype, "branch_id": branch_id, "repeats": repeats, "guided": True}
    used, reason = launch.source()
    document = {
        "environment": environment(torch.get_num_threads()) | {"gpus": {"before": before, "after": gpus()}},
        "settings": settings,
        "source": {"used": used, "reason": reason},
        "kernels": [asdict(result) for result in results],
    }
    return document, results


def require_gpu() -> None:
    """Raise `BackendUnavailable` where there is nothing to time: an interpreter's times would say nothing."""
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "expected a CUDA GPU that this build of PyTorch sees, for the kernels run on no other device, got none; "
            "run this on a machine with one"
        )
    if not launch.has_triton(torch.device("cuda")):
        raise BackendUnavailable("expected Triton, which compiles the kernels, got none; run: pip install triton")


def kernel_cases(batch: int, dtype: DType, device: str, branch_id: int = 0, sizes: Sequence[int] = SIZES) -> list[Case]:
    """Every kernel on every shape that the models meet at these sizes under guidance, equal shapes once.

    The first norm above the cut is there with the concat and, where there is one, as the projected cut has it.
    """
    cases: dict[tuple[str, tuple[int, ...]], Case] = {}
    for name in MODELS:
        model = find_model(name, random_weights=True)
        cut, scale = partition_unet(empty_unet(model), branch_id), geometry(model).scale
        consumer: Any = cut.shallow.up[0]
        first, cached = consumer.layer.resnet.norm1, cut.feature_channels
        for size in sizes:
            side = size // scale // cut.feature_stride
            shape = (2 * batch, first.num_channels, side, side)
            found = [_concat_norm(shape, cached, first.num_groups, dtype, device)]
            if first.num_groups * cached % first.num_channels == 0:
                groups = first.num_groups * (first.num_channels - cached) // first.num_channels
                found.append(_norm((2 * batch, first.num_channels - cached, side, side), groups, dtype, device))
            found.append(_guidance(batch, size // scale, dtype, device))
            for case in found:
                cases.setdefault((case.kernel, case.shape), case).models.append(f"{name} {size}")
    return list(cases.values())


def summarise(case: Case, times: Mapping[str, Sequence[float]], compile_skipped: str | None = None) -> KernelResult:
    """A case's result from each arm's times, in microseconds a call."""
    us = {arm: statistics.median(values) for arm, values in times.items()}
    compiled = us.get("compile")
    return KernelResult(
        kernel=case.kernel,
        models=tuple(case.models),
        shape=case.shape,
        num_bytes=case.num_bytes,
        kernel_us=round(us["kernel"], 3),
        eager_us=round(us["eager"], 3),
        compile_us=None if compiled is None else round(compiled, 3),
        copy_us=round(us["copy"], 3),
        gb_per_s=round(case.num_bytes / us["kernel"] / 1e3, 1),
        share_of_copy=round(us["copy"] / us["kernel"], 3),
        speedup_vs_eager=round(us["eager"] / us["kernel"], 3),
        speedup_vs_compile=None if compiled is None else round(compiled / us["kernel"], 3),
        compile_skipped=compile_skipped,
    )


def kernel_table(settings: Mapping[str, Any], rows: Sequence[KernelResult]) -> tuple[str, list[str], list[list[str]]]:
    """The kernels' times as a table: its title, columns and rows."""
    title = (
        f"kernels in {settings['dtype']}, batch {settings['batch']} under guidance, branch {settings['branch_id']}, "
        "microseconds a call\ncopy: of as many bytes on the same device; share: the copy's time over the kernel's"
    )
    columns = ["kernel", "models", "shape", "MB", "kernel", "eager", "compile", "copy", "GB/s", "share"]
    return title, [*columns, "x eager", "x compile"], [_kernel_row(row) for row in rows]


def _kernel_row(row: KernelResult) -> list[str]:
    def told(number: float | None, unit: str = "") -> str:
        return "-" if number is None else f"{number:.2f}{unit}"

    return [
        row.kernel,
        ", ".join(row.models),
        "x".join(map(str, row.shape)),
        *map(told, (row.num_bytes / 1e6, row.kernel_us, row.eager_us, row.compile_us, row.copy_us)),
        f"{row.gb_per_s:.0f}",
        f"{row.share_of_copy:.0%}",
        told(row.speedup_vs_eager, "x"),
        told(row.speedup_vs_compile, "x"),
    ]


def _time_case(case: Case, repeats: int, say: Callable[[str], None]) -> KernelResult:
    say(f"timing {case.kernel} on {'x'.join(map(str, case.shape))}")
    torch.compiler.reset()  # else it gives up on a function that it has compiled for eight shapes
    source = torch.empty(case.num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "kernel": case.run,
        "eager": case.eager,
        "compile": torch.compile(case.eager, dynamic=False),
        "copy": lambda: target.copy_(source),
    }
    graphs, skipped = dict[str, torch.cuda.CUDAGraph](), None
    for arm, call in calls.items():
        try:
            graphs[arm] = _captured(call)
        except Exception as error:  # inductor's and Triton's errors share no base class
            if arm != "compile":
                raise
            skipped = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    times, order = {arm: list[float]() for arm in graphs}, list(graphs)
    for _ in range(REPLAYS * repeats):
        order.append(order.pop(0))
        for arm in order:
            times[arm].append(_replay_us(graphs[arm]))
    return summarise(case, times, skipped)


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`CALLS` calls as one graph, after calls outside it, in which kernels are compiled and loaded."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / CALLS


def _concat_norm(shape: Shape, cached_channels: int, num_groups: int, dtype: DType, device: str) -> Case:
    """The norm of the plain cut, with the concat that the shortcut takes."""
    both, parameters = _norm_inputs(shape, dtype, device)
    cached, skip = (half.contiguous() for half in both.tensor_split([cached_channels], 1))

    def run() -> Sequence[Tensor]:
        return ops.concat_groupnorm_silu_joined(cached, skip, *parameters, num_groups, EPS)

    def eager() -> Sequence[Tensor]:
        joined = torch.cat([cached, skip], 1)
        return functional.silu(functional.group_norm(joined, num_groups, *parameters, EPS)), joined

    return Case("concat_groupnorm_silu", shape, _bytes(cached, skip, *parameters, both, both), run, eager)


def _norm(shape: Shape, num_groups: int, dtype: DType, device: str) -> Case:
    """What is left of that norm in the projected cut: the skip connection's half."""
    x, parameters = _norm_inputs(shape, dtype, device)

    def run() -> Sequence[Tensor]:
        return (ops.groupnorm_silu(x, *parameters, num_groups, EPS),)

    def eager() -> Sequence[Tensor]:
        return (functional.silu(functional.group_norm(x, num_groups, *parameters, EPS)),)

    return Case("groupnorm_silu", shape, _bytes(x, *parameters, x), run, eager)


def _norm_inputs(shape: Shape, dtype: DType, device: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What is normed; weight and bias."""
    x = _random(torch.empty(shape, dtype=torch_dtype(dtype), device=device))
    return x, (_random(x[0, :, 0, 0]), _random(x[0, :, 0, 0]))


def _guidance(batch: int, side: int, dtype: DType, device: str) -> Case:
    """A step of a sampler that looks back one call, as DPM++ 2M does, under guidance."""
    scale, model_input = 7.5, torch.empty(2 * batch, 4, side, side, dtype=torch_dtype(dtype), device=device)
    noise_pred, timestep = _random(model_input), torch.empty(2 * batch, device=device)
    ring = _random(torch.empty(2, 3, batch, 4, side, side, device=device))
    later = [0.1, 0.05, 0.0, 0.8, -0.3, 0.0]
    updates, times = [(0, [0.9, -0.2, 0.0]), (0, later), (1, later)], [999.0, 666.0, 333.0]
    tables = step_tables(updates, input_scales=[1.0] * 3, timesteps=times, guidance=scale, device=device)
    step = torch.ones(1, dtype=torch.int32, device=device)
    bound = GuidanceStep(noise_pred, ring, tables, step, model_input, timestep)
    rows, weights = ring.clone(), tables.weights[1].flatten()[None]
    latents, next_input = torch.empty_like(ring[0, 0]), torch.empty_like(model_input)
    halves, one = latents.expand(2, *latents.shape), torch.ones((), device=device)

    def run() -> Sequence[Tensor]:
        bound.run()  # the next x takes the place of the oldest
        return ring[0, 0], ring[1, 1], model_input

    def eager() -> Sequence[Tensor]:  # what the loop does where there are no kernels
        unconditional, conditional = noise_pred.float().chunk(2)
        reference.guide(unconditional, conditional, scale, 0.0, rows[1, 1])
        reference.combine(rows.view(6, -1), weights, latents.view(1, -1))
        reference.duplicate(halves, one, next_input.view(halves.shape))
        return latents, rows[1, 1], next_input

    moved = _bytes(noise_pred, model_input, timestep) + 5 * _bytes(latents)  # x twice and e are read, x and e written
    return Case("guidance_step", tuple(noise_pred.shape), moved, run, eager)


def _random(like: Tensor) -> Tensor:
    numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(like.ndim))
    return numbers.to(like.device, like.dtype)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
