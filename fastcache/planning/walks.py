"""A bundle and prompts -> calibration pictures on their way, one pass at a time, as a run's own lane would take it.

Every batch has a lane of its own, so that all pictures take a step before any takes the next. Knows engines, prompts
and passes; what happens between two calls is its caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastcache.cut.chain import ADJUSTMENT, neutral
from fastcache.cut.names import FULL
from fastcache.loop.features import Calls, forecasts
from fastcache.loop.lane import Lane
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.request import Request
from fastcache.planning.trajectory import guide
from fastcache.sampler.table import SamplerTable


class Walks:
    """Pictures of these prompts and seeds on the calls of a reference, in lanes of the bundle's largest batch.

    Shapes: `start` (N, C, H, W), what a run of the sampler starts from; float64.
    """

    def __init__(
        self,
        pipe: FastCachePipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        table: SamplerTable,
        guidance_scale: float,
    ) -> None:
        self._guidance_scale, most = guidance_scale, pipe.bundle.manifest.profiles["batch"].max
        self._lanes, starts = list[Lane](), list[Tensor]()
        for first in range(0, len(prompts), most):
            request = Request(
                list(prompts[first : first + most]),
                num_inference_steps=1,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + most]],
            )
            run = pipe.begin(request)
            starts.append(run.latents.double().cpu() / run.sampler.init_noise_sigma * table.init_noise_sigma)
            self._lanes.append(run.lane)
            pipe.runtime.keep_lane()
        self.start, self._table = torch.cat(starts), table
        self._around: list[tuple[Calls, Calls]] = []

    def forecast(self, plan: CachePlan, points: Sequence[int]) -> None:
        """From now on extrapolate the cached features of a run that visits these points as its plan says."""
        sigmas = None if self._table.sigmas is None else [self._table.sigmas[point] for point in points]
        self._around = [forecasts(lane, plan, sigmas) for lane in self._lanes]

    def takes(self, name: str) -> tuple[str, ...]:
        """The features that a pass takes."""
        return self._lanes[0].passes[name].takes

    def read(self, names: Sequence[str] = ()) -> dict[str, Tensor]:
        """These features, or all, of every row, as they are now. Shapes: (rows, C, h, w), a picture's rows together."""
        lanes = [(lane.images, lane.rows().tensors) for lane in self._lanes]
        every = names or self._lanes[0].features
        return {
            name: torch.cat([own[name].unflatten(0, (-1, n)).transpose(0, 1).flatten(0, 1) for n, own in lanes])
            for name in every
        }

    def write(self, features: Mapping[str, Tensor]) -> None:
        """Put back what `read` gave."""
        for name, rows in features.items():
            parts = rows.split([len(lane.rows().tensors[name]) for lane in self._lanes])
            for lane, part in zip(self._lanes, parts, strict=True):
                lane.rows().tensors[name].copy_(part.unflatten(0, (lane.images, -1)).transpose(0, 1).flatten(0, 1))

    def predict(
        self, name: str, point: int, x: Tensor, step: int | None = None, scale_shift: Tensor | None = None
    ) -> Tensor:
        """A pass on every picture at a call of the reference; `step` is that of a plan with a forecast.

        Shapes: `x`, and the guided prediction returned, (N, C, H, W); `scale_shift` (2, channels) for what is reused.
        """
        return self.guided(name, point, x, step, scale_shift)[0]

    @torch.no_grad()
    def guided(
        self, name: str, point: int, x: Tensor, step: int | None = None, scale_shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `predict`, and what guidance added to the conditional prediction; None where there is no guidance."""
        found, parts = list[Tensor](), x.split([lane.images for lane in self._lanes])
        added, beyond = list[Tensor](), self._guidance_scale - 1
        scale, timestep = float(self._table.input_scale[point]), float(self._table.timesteps[point])
        for k, (lane, part) in enumerate(zip(self._lanes, parts, strict=True)):
            rows, (before, after) = lane.rows(), (({}, {}) if step is None else self._around[k])
            rows.model_input.copy_(part * scale)
            rows.tensors["timestep"].fill_(timestep)
            if (adjustment := rows.tensors.get(ADJUSTMENT)) is not None:
                adjustment.copy_(neutral(*adjustment.shape[::2]) if scale_shift is None else scale_shift)
            for call in (*before.get(step or 0, ()), lane.call(name), *after.get(step or 0, ())):
                call()
            found.append(guide(torch.stack([*rows.noise_pred]), self._guidance_scale).double().cpu())
            if len(rows.noise_pred) == 2:
                added.append(beyond * (rows.noise_pred[1].double() - rows.noise_pred[0].double()).cpu())
        return torch.cat(found), torch.cat(added) if added else None

    def reference(self) -> list[Tensor]:
        """The states of the uncached run, as `run` has them."""
        return self.run(lambda call, x: self.predict(FULL, call, x))

    def run(self, predict: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """The states of a run whose predictions come from a function of the call and the state.

        Shapes: (N, C, H, W) each, float64; x_T first, the result last.
        """
        states, predictions = [self.start], list[Tensor]()
        for call, update in enumerate(self._table.recursion()):
            predictions.append(predict(call, states[call]))
            history = [(states[k], predictions[k]) for k in range(update.first, call + 1)]
            weighed = zip(history, update.weights[::3], update.weights[1::3], strict=True)
            states.append(torch.stack([of_x * x + of_e * e for (x, e), of_x, of_e in weighed]).sum(0))
        return states
