"""A noise prediction -> the next latents and the model's next input, as one launch that reads its step from memory.

Checks the loop's buffers once, chooses block sizes and launches `triton_guidance.py`'s kernels; where no kernel can be
launched it computes the plain PyTorch meaning. Knows tensors and nothing else.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastcache_kernels import reference
from fastcache_kernels.launch import Argument, Launch, prepare
from fastcache_kernels.values import FLOATS, StepTables, expect

CHUNKS = 64  # a sample's partial sums, for its standard deviation; one program each
BLOCK, NUM_WARPS = 256, 4  # latents are tiny: many programs of little work each, for latency
STATISTICS_BLOCK = 1024


class GuidanceStep:
    """The loop's own work between two model calls, on the loop's own buffers.

    `ring` (ring calls, 3, N, C, H, W), float32, holds the rows x, e and z of the last calls, call i in place
    i % ring calls: the latents, the guided prediction and the noise drawn. `ring_calls` of the tables says how many.

    `run` reads `noise_pred` and the number of the step, i, from device memory. It writes the call's e, the next call's
    x, and while there is a next call its `model_input` (scaled x, for each half, in the first C channels) and
    `timestep`. Before it, the call's noise stands in its z, or in `noise[i]`, from where it is copied to z; a sampler
    that draws none needs neither. It allocates nothing and waits for nothing.

    A whole loop that is captured needs no counting on the device: give each of its launches a view of
    `torch.arange(steps)` for `step`. Shapes: `noise_pred` (halves * N, C, H, W), halves 2 under guidance and 1 without;
    `model_input` (halves * N, C or more, H, W); `timestep` (halves * N,), float32; `step` (1,), int32;
    `noise` (steps, N, C, H, W), float32.

    Raises: `ValueError` for tensors that do not fit.
    Source: arXiv 2207.12598, equation 6 (guidance); arXiv 2305.08891, equations 15 and 16 (rescaling).
    """

    def __init__(
        self,
        noise_pred: Tensor,
        ring: Tensor,
        tables: StepTables,
        step: Tensor,
        model_input: Tensor,
        timestep: Tensor,
        *,
        rescale: float = 0.0,
        noise: Tensor | None = None,
    ) -> None:
        self._noise_pred, self._ring, self._tables, self._step = noise_pred, ring, tables, step
        self._model_input, self._timestep = model_input, timestep
        self._noise, self._rescale = noise, float(rescale)
        self._check()
        self._halves = len(noise_pred) // ring.shape[2]
        self.run: Launch = self._launches() or partial(
            reference.guidance_step,
            *(noise_pred, ring, tables, step, model_input, timestep),
            rescale=self._rescale,
            noise=noise,
        )

    def _check(self) -> None:
        ring, tables, device = self._ring, self._tables, self._ring.device
        calls, steps = tables.ring_calls, tables.num_steps
        if ring.ndim != 6 or ring.numel() == 0 or ring.numel() >= 2**31:
            raise ValueError(f"expected ring of shape (calls, 3, N, C, H, W), none of them 0, got {list(ring.shape)}")
        samples, channels, *plane = ring.shape[2:]
        fp32 = (torch.float32,)
        expect("ring", ring, (calls, 3, samples, channels, *plane), fp32, device)
        rows = self._noise_pred.shape[0]
        if rows not in (samples, 2 * samples):
            raise ValueError(f"expected noise_pred of {samples} or {2 * samples} rows for {samples} images, got {rows}")
        expect("noise_pred", self._noise_pred, (rows, channels, *plane), FLOATS, device)
        inputs = self._model_input.shape[1] if self._model_input.ndim == 4 else 0
        if inputs < channels:
            raise ValueError(
                f"expected model_input of {channels} channels or more, got {list(self._model_input.shape)}"
            )
        expect("model_input", self._model_input, (rows, inputs, *plane), FLOATS, device)
        expect("timestep", self._timestep, (rows,), fp32, device)
        expect("step", self._step, (1,), (torch.int32,), device)
        expect("the tables' weights", tables.weights, (steps, calls, 3), fp32, device)
        for name in ("guidance", "input_scales", "timesteps"):
            expect(f"the tables' {name}", getattr(tables, name), (steps,), fp32, device)
        if self._noise is not None:
            expect("noise", self._noise, (steps, samples, channels, *plane), fp32, device)
        if not 0 <= self._rescale <= 1:
            raise ValueError(f"expected rescale from 0 to 1, got {self._rescale:g}")

    def _launches(self) -> Launch | None:
        """The kernels, the standard deviations' only where they are needed; None where they cannot be launched."""
        ring, tables, noise = self._ring, self._tables, self._noise
        samples, channels, height, width = ring.shape[2:]
        plane, size = height * width, channels * height * width
        rescaled = self._rescale > 0 and self._halves == 2
        arguments: dict[str, Argument] = {
            "noise_pred": self._noise_pred,
            "ring": ring,
            "noise": ring if noise is None else noise,
            "model_input": self._model_input,
            "timestep": self._timestep,
            "weights": tables.weights,
            "guidance": tables.guidance,
            "input_scales": tables.input_scales,
            "timesteps": tables.timesteps,
            "step": self._step,
            "partials": torch.empty(samples, CHUNKS, 4, device=ring.device) if rescaled else ring,
            "size": size,
            "chunk": -(-size // CHUNKS),
            "ring_calls": tables.ring_calls,
            "num_steps": tables.num_steps,
            "noise_rows": 0 if noise is None else tables.num_steps,
            "noise_stride": 0 if noise is None else samples * size,
            "input_stride": self._model_input.shape[1] * plane,
            "halves": self._halves,
            "rescale": self._rescale if rescaled else 0.0,
        }
        rows = max(16, 1 << (3 * tables.ring_calls - 1).bit_length())  # five calls, as the named samplers need
        grid = (-(-size // BLOCK), samples, 1)
        step = prepare("guidance_step", grid, arguments, num_warps=NUM_WARPS, ROWS=rows, CHUNKS=CHUNKS, BLOCK=BLOCK)
        if not rescaled:
            return step
        read = {name: arguments[name] for name in ("noise_pred", "guidance", "step", "partials", "size", "chunk")}
        grid = (CHUNKS, samples, 1)
        statistics = prepare("guidance_statistics", grid, read, num_warps=NUM_WARPS, BLOCK=STATISTICS_BLOCK)
        if statistics is None or step is None:
            return None

        def launch() -> None:
            statistics()
            step()

        return launch
