"""The passes of a cut as engines, so that the loop can be tested without building any, and a small run on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastcache.bundle.manifest import PassEntry
from fastcache.cut.names import FULL, shallow_pass
from fastcache.cut.partition import Cuts, partition_branches
from fastcache.loop.drivers import Guidance
from fastcache.loop.lane import Lane
from fastcache.loop.plan import CachePlan
from fastcache.loop.steps import PlainRun, Sampler
from fastcache_engines import TensorSpec
from small_unets import small_unet

IMAGES, BRANCHES = 2, (0, 2, 5)
GUIDANCE = {"guidance_scale": 1.0, "guidance_rescale": 0.0, "image_guidance_scale": 0.0}


@dataclass
class EagerEngine:
    """A pass as an engine; `names` are the module's for the tensors that the graph calls otherwise."""

    module: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    names: dict[str, str]

    def bind(self, tensors: Mapping[str, Tensor]) -> EagerBinding:
        return EagerBinding(self, tensors)


@dataclass
class EagerBinding:
    engine: EagerEngine
    tensors: Mapping[str, Tensor]

    def run(self) -> None:
        engine = self.engine
        given = {engine.names.get(spec.name, spec.name): self.tensors[spec.name] for spec in engine.inputs}
        assert all(tensor.is_contiguous() for tensor in given.values())
        with torch.no_grad():
            results = engine.module(**given)
        results = results if isinstance(results, tuple) else (results,)
        for spec, result in zip(engine.outputs, results, strict=True):
            self.tensors[spec.name].copy_(result)

    def capturable(self) -> bool:
        return True


def eager_engines(
    cuts: Cuts, sample: Tensor, encoder_hidden_states: Tensor
) -> tuple[dict[str, EagerEngine], dict[str, PassEntry]]:
    """The engines of the passes, by name, for tensors shaped as these, and what each pass takes and stores."""
    timestep = torch.zeros(len(sample), device=sample.device)
    inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
    with torch.no_grad():
        results = cuts.full(**inputs)
    named = inputs | dict(zip(("noise_pred", *cuts.cached), results, strict=True))
    specs = {name: TensorSpec(name, "float32", ("batch", *value.shape[1:])) for name, value in named.items()}

    def listed(*names: str) -> tuple[TensorSpec, ...]:
        return tuple(specs[name] for name in names)

    engines = {FULL: EagerEngine(cuts.full, listed(*inputs), listed("noise_pred", *cuts.cached), {})}
    passes = {FULL: PassEntry(engines=(FULL,), takes=(), stores=tuple(cuts.cached))}
    for branch_id, cut in cuts.at.items():
        name = shallow_pass(branch_id)
        names = {feature: feature.removesuffix(f"_{branch_id}") for feature in cut.cached}
        engines[name] = EagerEngine(
            cut.shallow, listed(*inputs, *cut.cached), listed("noise_pred", *cut.refreshes), names
        )
        passes[name] = PassEntry(engines=(name,), takes=tuple(cut.cached), stores=tuple(cut.refreshes))
    return engines, passes


@cache
def small_cuts(device: str = "cpu") -> Cuts:
    return partition_branches(small_unet("one-layer").to(device), BRANCHES)


@cache
def conditioning() -> Tensor:
    """The text of two images, unconditional rows first."""
    return torch.randn(2 * IMAGES, 7, 24, generator=torch.Generator().manual_seed(3))


def start() -> Tensor:
    return torch.randn(IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def small_lane(*, halves: int = 2, device: str = "cpu") -> Lane:
    """Two images of a small U-Net, ready to run from `start`."""
    found = eager_engines(small_cuts(device), start().to(device), conditioning()[:IMAGES].to(device))
    lane = Lane(*found, images=IMAGES, halves=halves, channels=4, device=device)
    refill(lane)
    return lane


def refill(lane: Lane) -> None:
    """A new run with the same inputs."""
    lane.set_inputs({"encoder_hidden_states": conditioning()[-IMAGES * lane.halves :]})


def plain_run(lane: Lane, sampler: Sampler, plan: CachePlan, x: Tensor | None = None, **options: Any) -> PlainRun:
    """A run from latents drawn from a unit normal, guided by `guidance_scale`, `guidance_rescale`, `image_scale`."""
    numbers = [options.pop(name, usual) for name, usual in GUIDANCE.items()]
    run = PlainRun(lane, sampler, plan, Guidance(*numbers), **options)
    run.latents.copy_(start() if x is None else x).mul_(sampler.init_noise_sigma)
    return run
