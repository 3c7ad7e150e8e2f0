"""What the kernels take besides plain tensors: a sampler's numbers as tables; and the check that a tensor fits.

Knows tensors and nothing else; what it checks, it checks without waiting for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
