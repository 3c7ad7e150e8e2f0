"""Noise by a CPU's generator for a GPU: the same numbers, and no step waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eager_engines import EagerBinding, generators, plain_run, small_lane
from fastcache import CachePlan, compile_sampler
from fastcache.loop.noise import draw
from fastcache.sampler.scheduler import make_scheduler

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (2, 4, 8, 8)


class OnGpu:
    """A tensor of a GPU, as far as drawing knows one; `copies` are what came, and whether anyone waited."""

    device, is_cuda = torch.device("cuda", 0), True

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.copies = shape, list[tuple[Tensor, bool]]()
        self.images: list[OnGpu] = []

    def __iter__(self) -> Any:
        self.images = [OnGpu(self.shape[1:]) for _ in range(self.shape[0])]
        return iter(self.images)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> None:
        self.copies.append((source.clone(), non_blocking))


def test_a_gpu_gets_the_cpus_numbers_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, empty = list[bool](), torch.empty

    def record(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", record)
    out: Any = OnGpu(SHAPE)
    draw(out, torch.Generator().manual_seed(7))
    ((numbers, unwaited),) = out.copies
    assert unwaited
    assert torch.equal(numbers, torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)))
    draw(out, generators())
    for image, own in zip(out.images, generators(), strict=True):
        ((numbers, unwaited),) = image.copies
        assert unwaited
        assert torch.equal(numbers, torch.randn(SHAPE[1:], generator=own))
    assert pinned == [True] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["euler_a", "dpm++_2m_sde", "ddpm", "lcm", "ddim"])
def test_no_step_waits_for_the_gpu(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a step does but the U-Net; a wait is an error here."""
    monkeypatch.setattr(EagerBinding, "run", lambda self: None)
    table, lane = compile_sampler(make_scheduler(sampler, CONFIG), 8), small_lane(device="cuda")
    for tensor in lane.tensors.values():
        tensor.zero_()
    run = plain_run(lane, table, CachePlan.uniform(table.num_calls, 3), guidance_scale=3.0, generator=generators())
    steps = run.steps
    next(steps)  # the first may still allocate
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        *_, last = steps
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert last.latents.isfinite().all()
