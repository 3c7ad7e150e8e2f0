"""What the kernels take besides plain tensors: features in memory, what is made of them, a sampler's numbers as tables.

Knows tensors and nothing else; what it checks, it checks without waiting for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # dtype -> the number that a group's largest value becomes


@dataclass(frozen=True)
class StoredFeature:
    """Cached features in memory, one slot for each sample of each request, in one byte a value where `scales` are.

    Shapes: `values` (slots, C, H, W); `scales` (slots, C / channels per scale), float32; `slots` (N,), int32, says
    where each sample's feature lies, and None that sample n lies in slot n.
    """

    values: Tensor
    scales: Tensor | None = None
    slots: Tensor | None = None

    @property
    def channels_per_scale(self) -> int:
        return 1 if self.scales is None else self.values.shape[1] // self.scales.shape[1]


@dataclass(frozen=True)
class Adjustment:
    """feature * scale + shift, channel by channel. Shapes: (N, C), float32. Source: arXiv 2312.03209, section 3.3."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Forecast:
    """feature + w * (feature - previous), with w out of `weights` at `step`, which lies in device memory.

    Shapes: `previous` as the feature, in the same slots; `weights` (steps,), float32; `step` (1,), int32.
    """

    previous: StoredFeature
    weights: Tensor
    step: Tensor


@dataclass(frozen=True)
class StepTables:
    """What a sampler does at each step, as numbers on a device.

    Shapes: `weights` (steps, ring calls, 3), what the ring's rows x, e and z of each call count in the next latents;
    `guidance`, `input_scales` and `timesteps` (steps,); all float32.
    """

    weights: Tensor
    guidance: Tensor
    input_scales: Tensor
    timesteps: Tensor

    @property
    def num_steps(self) -> int:
        return self.weights.shape[0]

    @property
    def ring_calls(self) -> int:
        return self.weights.shape[1]


def step_tables(
    updates: Sequence[tuple[int, Sequence[float]]],
    *,
    input_scales: Sequence[float],
    timesteps: Sequence[float],
    guidance: float | Sequence[float] = 1.0,
    device: torch.device | str = "cpu",
) -> StepTables:
    """Tables out of each call's update: the first call it looks back to, and weights for x, e and z from there on.

    `guidance` is the scale of every step, or of each. The ring holds as many calls as the widest update looks back
    over: the newest x may take the place of the oldest, which has been read by then.

    Raises: `ValueError` for lists of different lengths, or an update that does not end with its own call.
    """
    scales = [float(guidance)] * len(updates) if isinstance(guidance, int | float) else list(guidance)
    if not len(updates) == len(input_scales) == len(timesteps) == len(scales) > 0:
        raise ValueError(
            f"expected as many input scales, timesteps and guidance scales as updates ({len(updates)}), at least one, "
            f"got {len(input_scales)}, {len(timesteps)} and {len(scales)}"
        )
    calls = max(len(weights) // 3 for _, weights in updates)
    table = torch.zeros(len(updates), calls, 3, dtype=torch.float64, device="cpu")
    for i, (first, weights) in enumerate(updates):
        if first < 0 or len(weights) != 3 * (i + 1 - first):
            raise ValueError(
                f"expected 3 weights for each call from {first} to {i}, got {len(weights)}; "
                "an update ends with its own call"
            )
        for call in range(first, i + 1):
            own = weights[3 * (call - first) : 3 * (call - first) + 3]
            table[i, call % calls] = torch.tensor(own, dtype=torch.float64, device="cpu")

    def numbers(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return StepTables(table.to(device, torch.float32), numbers(scales), numbers(input_scales), numbers(timesteps))


def expect(
    name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise `ValueError` unless a tensor is contiguous and of this shape, one of these dtypes and this device."""
    if (
        tuple(tensor.shape) == tuple(shape)
        and tensor.dtype in dtypes
        and tensor.device == device
        and tensor.is_contiguous()
    ):
        return
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise ValueError(
        f"expected {name} to be contiguous {wanted} {list(shape)} on {device}, got "
        f"{'' if tensor.is_contiguous() else 'non-contiguous '}{str(tensor.dtype).removeprefix('torch.')} "
        f"{list(tensor.shape)} on {tensor.device}"
    )


def expect_feature(name: str, feature: StoredFeature, samples: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `ValueError` unless a feature's parts fit together, and hold `samples` samples.

    Where `slots` point is not looked at: that would wait for the GPU.
    """
    values = feature.values
    if values.ndim != 4:
        raise ValueError(f"expected {name} to have four axes, (slots, channels, height, width), got {values.ndim}")
    rows = samples if feature.slots is None else values.shape[0]
    dtypes = (dtype,) if feature.scales is None else tuple(QUANTISED)
    expect(name, values, (rows, *values.shape[1:]), dtypes, device)
    if feature.slots is not None:
        expect(f"{name}'s slots", feature.slots, (samples,), (torch.int32,), device)
    if feature.scales is None:
        return
    groups = feature.scales.shape[-1] if feature.scales.ndim == 2 else 0
    if groups < 1 or values.shape[1] % groups:
        raise ValueError(
            f"expected {name}'s scales of shape (slots, groups), groups a divisor of its {values.shape[1]} channels, "
            f"got {list(feature.scales.shape)}"
        )
    expect(f"{name}'s scales", feature.scales, (rows, groups), (torch.float32,), device)
