"""A fixed batch of prompts, a sampler's table and a U-Net -> trajectories that a study can branch, steer and look into.

`Walk` carries latents, of several variants of each image at once, from step to step; a `Denoiser` gives the guided
noise prediction in full or from features stored earlier. `eager.py` makes one of a diffusers U-Net, `EngineDenoiser`
one of a bundle. Nothing here is fast or allocates nothing: for that there is `fastcache.loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastcache.cut.names import FULL, shallow_pass
from fastcache.loop.noise import draw
from fastcache.loop.runtime import Runtime
from fastcache.sampler.table import SamplerTable

Feature = tuple[Tensor, ...]
"""What crosses one cut at one step: the cached feature, or the two tensors of a projected cut. Shapes: (rows, C, h, w),
where rows are the images, once for each half under guidance, the unconditional half first."""


class Denoiser(Protocol):
    """The U-Net with its conditioning set for P images, and the cuts that it can reuse features at.

    A guidance scale counts where the conditioning has two halves.
    """

    @property
    def branch_ids(self) -> tuple[int, ...]: ...
    @property
    def images(self) -> int: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def device(self) -> str: ...

    def full(self, samples: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        """The whole U-Net. Shapes: `samples`, and the guided noise prediction returned, (K, P, C, H, W); float32."""
        ...

    def store(self, sample: Tensor, timestep: float, guidance_scale: float) -> tuple[Tensor, tuple[Feature, ...]]:
        """The whole U-Net, and the features at the cuts, as `branch_ids` has them. Shapes: `sample` (P, C, H, W)."""
        ...

    def reuse(
        self, sample: Tensor, timestep: float, guidance_scale: float, branch_id: int, features: Sequence[Feature]
    ) -> Tensor:
        """The shallow pass on each of K stored features. Shapes: `sample` (P, C, H, W); returns (K, P, C, H, W)."""
        ...


class Walk:
    """Latents on their way through a sampler's table. Holds as many past steps as the sampler looks back over.

    Shapes: `noise` (..., C, H, W), drawn from a unit normal; all that comes and goes has this shape.
    """

    def __init__(self, table: SamplerTable, noise: Tensor) -> None:
        self._table, self._window = table, table.widest_window
        self.latents = noise * table.init_noise_sigma
        self.call = 0
        self._past: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    @property
    def finished(self) -> bool:
        return self.call == self._table.num_calls

    @property
    def timestep(self) -> float:
        return float(self._table.timesteps[self.call])

    @property
    def model_input(self) -> Tensor:
        return self.latents * float(self._table.input_scale[self.call])

    def drawn(self, generators: Sequence[torch.Generator]) -> Tensor | None:
        """What the sampler draws at this call, the same for all variants of an image, if anything."""
        if not self._table.draws_noise(self.call):
            return None
        noise = torch.empty(self.latents.shape[-4:], device=self.latents.device)
        draw(noise, generators)
        return noise.expand_as(self.latents)

    def step(self, noise_pred: Tensor, noise: Tensor | None = None) -> None:
        """Take the update of this call. `noise` is what the sampler draws at a call that does."""
        update = self._table.recursion()[self.call]
        self._past[self.call] = (self.latents, noise_pred, noise)
        following = torch.zeros_like(self.latents)
        for i, weight in enumerate(update.weights):
            term = self._past[update.first + i // 3][i % 3]
            if weight != 0 and term is not None:
                following += weight * term
        self.latents, self.call = following, self.call + 1
        self._past.pop(self.call - self._window, None)


def draw_noise(shape: Sequence[int], seeds: Sequence[int], device: str) -> tuple[Tensor, list[torch.Generator]]:
    """A batch of unit normal noise, as `FastCachePipeline` draws it for these seeds, and its generators to go on with.

    Shapes: `shape` (C, H, W); returns (seeds, C, H, W).
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.empty(len(generators), *shape, device=device)
    draw(noise, generators)
    return noise, generators


class EngineDenoiser:
    """A bundle's engines, one variant at a time. The lane is the runtime's own: no other run may use it meanwhile.

    Shapes: `conditioning`, the U-Net's inputs by name beside sample and timestep, of 2P rows, unconditional first.
    """

    def __init__(self, runtime: Runtime, conditioning: Mapping[str, Tensor]) -> None:
        hidden = conditioning["encoder_hidden_states"]
        self.images, self.device = hidden.shape[0] // 2, runtime.device
        self._lane = runtime.lane(images=self.images, guided=True, tokens=hidden.shape[1])
        self._lane.set_inputs(conditioning)
        self._rows = self._lane.rows()
        self.branch_ids = runtime.manifest.branches
        _, channels, height, width = self._lane.latent_shape
        self.latent_shape = (channels, height, width)

    def full(self, samples: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        return torch.stack([self._run(FULL, sample, timestep, guidance_scale) for sample in samples])

    def store(self, sample: Tensor, timestep: float, guidance_scale: float) -> tuple[Tensor, tuple[Feature, ...]]:
        guided = self._run(FULL, sample, timestep, guidance_scale)
        taken = (self._lane.passes[shallow_pass(branch_id)].takes for branch_id in self.branch_ids)
        return guided, tuple(tuple(self._lane.tensors[name].clone() for name in names) for names in taken)

    def reuse(
        self, sample: Tensor, timestep: float, guidance_scale: float, branch_id: int, features: Sequence[Feature]
    ) -> Tensor:
        if branch_id not in self.branch_ids:
            raise ValueError(f"expected a branch out of {self.branch_ids}, which the bundle has, got {branch_id}")
        results, name = list[Tensor](), shallow_pass(branch_id)
        for feature in features:
            for taken, tensor in zip(self._lane.passes[name].takes, feature, strict=True):
                self._lane.tensors[taken].copy_(tensor)
            results.append(self._run(name, sample, timestep, guidance_scale))
        return torch.stack(results)

    def _run(self, name: str, sample: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        self._rows.model_input.copy_(sample)  # every half
        self._rows.tensors["timestep"].fill_(timestep)
        self._lane.call(name)()
        return guide(torch.stack([*self._rows.noise_pred]), guidance_scale)


def guide(halves: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance in float32, or none. Shapes: `halves` (2, ...), unconditional first, or (1, ...)."""
    halves = halves.float()
    return halves[0] if len(halves) == 1 else torch.lerp(halves[0], halves[1], guidance_scale)


def run_uncached(
    predict: Callable[[Tensor, float, float], Tensor],
    table: SamplerTable,
    start: tuple[Tensor, Sequence[torch.Generator]],
    guidance_scale: Callable[[int], float],
) -> Iterator[Tensor]:
    """A run in full, yielding the latents after each step. `predict` takes (sample, timestep, guidance scale of the
    step); `start` is what `draw_noise` gives."""
    noise, generators = start
    walk = Walk(table, noise)
    while not walk.finished:
        guided = predict(walk.model_input, walk.timestep, guidance_scale(walk.call))
        walk.step(guided, walk.drawn(generators))
        yield walk.latents
