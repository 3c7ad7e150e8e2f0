"""A U-Net call under torch's profiler -> milliseconds by what its kernels do.

On a GPU every kernel counts, whoever launched it; on a CPU PyTorch's own operations do. Knows names only: what an
inlined or generated kernel does is read off what its compiler called it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastcache
from fastcache.bundle.bundle import Bundle
from fastcache.compile.models import SourceModel
from fastcache.compile.passes import call_unet
from fastcache.cut.partition import partition_unet
from fastcache_engines import DType, torch_dtype

OTHER = "other"
# The first that matches counts. Inductor calls a fused kernel after all that it has taken in, a convolution's bias for
# one, so its own names come before those of the operations.
_MATMUL = "matmul and attention"
_CLASSES = (
    ("norm", r"norm(?!al)|rowwisemoments|computefusedparams|var_mean|welford"),
    ("elementwise", r"^(triton_(poi|per|red)|cpp)_fused"),
    ("copies", r"memcpy|memset|copy|\bcat\b|concat|catarray|nchwtonhwc|nhwctonchw|transpose|clone|convert|reformat"),
    (_MATMUL, r"attention|flash|fmha|mha|sdpa|softmax"),
    ("convolution", r"conv|fprop|winograd"),
    (_MATMUL, r"gemm|gemv|nvjet|matmul|mm(?![a-z])|linear|splitk|cutlass|cublas"),
    (
        "elementwise",
        r"elementwise|__my[el]|silu|gelu|sigmoid|aten::(add|sub|mul|div|exp|sin|cos|pow|neg|fill|where)_?$",
    ),
)
KERNEL_CLASSES = (*dict.fromkeys(name for name, _ in _CLASSES), OTHER)
_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _CLASSES)


def classify(kernel: str) -> str:
    """Which of `KERNEL_CLASSES` a kernel or operation is of, by its name."""
    lowered = kernel.lower()
    return next((name for name, pattern in _PATTERNS if pattern.search(lowered)), OTHER)


def time_by_class(run: Callable[[], object], device: str) -> dict[str, float]:
    """The milliseconds that one run spends in each class of kernels, with those of no time left out."""
    times = dict.fromkeys(KERNEL_CLASSES, 0.0)
    for name, ms in kernel_times(run, device):
        times[classify(name)] += ms
    return {name: round(ms, 4) for name, ms in times.items() if ms > 0}


def kernel_times(run: Callable[[], object], device: str) -> list[tuple[str, float]]:
    """Every kernel, or on a CPU every operation, of one run and the milliseconds spent in it alone."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.startswith("cuda")
    run()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events: list[Any] = [event for event in profiler.key_averages() if event.device_type == kind]
    times = [(e.key, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3) for e in events]
    return [(name, ms) for name, ms in times if ms > 0]


def profile_eager(
    model: SourceModel, inputs: Mapping[str, Tensor], branch_id: int, dtype: DType, device: str
) -> dict[str, dict[str, float]]:
    """A full and a shallow call of PyTorch's own modules, by class. `inputs` as in `bench.make_inputs`."""
    unet: Any = model.load_unet()
    cut = partition_unet(unet.to(device, torch_dtype(dtype)), branch_id)
    given = {name: tensor.to(device, torch_dtype(dtype)) for name, tensor in inputs.items() if name != "latents"}
    latents = inputs["latents"]
    rows = latents.repeat(_rows(inputs) // len(latents), 1, 1, 1).to(device, torch_dtype(dtype))
    given["sample"] = functional.pad(rows, (0, 0, 0, 0, 0, unet.config.in_channels - latents.shape[1]))
    given["timestep"] = torch.full((len(given["sample"]),), 500.0, device=device)
    with torch.no_grad():
        _, cached_feature = call_unet(cut.full, given)
        reused = given | {"cached_feature": cached_feature}
        return {
            "full": time_by_class(lambda: call_unet(cut.full, given), device),
            "shallow": time_by_class(lambda: call_unet(cut.shallow, reused), device),
        }


def profile_engines(bundle: Bundle, inputs: Mapping[str, Tensor], device: str) -> dict[str, dict[str, float]]:
    """A full and a shallow run of a bundle's engines, by class. `inputs` as in `bench.make_inputs`."""
    pipe = fastcache.load(bundle.path)
    images = len(inputs["latents"])
    lane = pipe.runtime.lane(images=images, guided=_rows(inputs) > images)
    lane.set_inputs({name: tensor for name, tensor in inputs.items() if name != "latents"})
    lane.tensors["timestep"].fill_(500.0)
    lane.call("full")()
    return {name.partition("-")[0]: time_by_class(lane.call(name), device) for name in lane.passes}


def _rows(inputs: Mapping[str, Tensor]) -> int:
    """How many rows the U-Net is called with: the latents once, or as many times as there are parts of guidance."""
    return max(len(rows) for rows in inputs.values())
