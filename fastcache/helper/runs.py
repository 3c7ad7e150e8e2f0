"""U-Net calls, one after the other -> which run each belongs to, and its index in it.

A pipeline does not say where a run begins. It is read off objects, which waits for no device; only where these do not
tell, off the values of timesteps and latents. Knows nothing about plans or about what is cached.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of two latents that share nothing 2ab / (aa + bb) is 0, with a deviation of 0.12 over 8x8 values and 0.02 over 64x64;
# each image's every channel counts. From call to call of a run of DDIM or Euler on the bundled model the least of them
# was 0.21 with two steps in all, 0.43 with four and 0.76 with twenty.
_LEAST_LIKENESS = 0.15


class _Called(NamedTuple):
    timestep: object
    sample: Tensor
    schedule: object  # the timesteps that the pipeline's scheduler had set


class RunCounter:
    """Counts the calls of the run at hand.

    A run goes on where the scheduler's timesteps are the same tensor as before and the call's own is the entry behind
    the last one: every diffusers scheduler's `set_timesteps` makes a new tensor, of which pipelines pass the entries.
    They count by their place and never by their value, which PNDM and Heun repeat.

    A hand-written loop may skip entries, or pass numbers or tensors of its own. There a run goes on where the timestep
    fell and the latents go on too, which is read off the device. What is in doubt begins a run, and so every call of
    a loop that passes numbers and climbs, or that adds so much noise in a step that nothing of the latents is left. So
    does, once an entry came twice, every call with a later one: several images take turns, and two of one prompt may
    look alike towards the end.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.forget()

    def forget(self) -> None:
        """The next call begins a run."""
        self._calls, self._last, self._turns = 0, None, False

    def index(self, timestep: object, sample: Tensor) -> int:
        """The index of the call that comes now, from 0, without counting it."""
        return self._calls if self._goes_on(timestep, sample) else 0

    def count(self, index: int, timestep: object, sample: Tensor) -> None:
        """A call is made, whose index is known."""
        ahead = None if self._last is None else _ahead(self._last.timestep, timestep)
        self._turns = ahead == 0 or (self._turns and ahead is not None and ahead > 0)
        kept = sample.detach() if _is_entry(timestep) else sample.detach().clone()  # a loop may write to its own
        self._calls, self._last = index + 1, _Called(timestep, kept, self._set_timesteps())

    def timesteps_ahead(self) -> Tensor:
        """The timesteps of the run's calls, from the last that was counted on.

        Raises: `ValueError` for a timestep that is no entry of the scheduler's.
        """
        here, every = self._last and self._last.timestep, self._set_timesteps()
        if not (isinstance(every, Tensor) and isinstance(here, Tensor) and _ahead(every, here) is not None):
            raise ValueError(
                f"expected timesteps out of the scheduler's own, as pipelines give them, got {here!r}; use a plan "
                "that forecasts by step"
            )
        return every[here.storage_offset() - every.storage_offset() :]

    def _goes_on(self, timestep: object, sample: Tensor) -> bool:
        last = self._last
        if last is None or self._calls == 0 or self._set_timesteps() is not last.schedule:
            return False
        ahead = _ahead(last.timestep, timestep)
        if ahead is not None:
            return ahead > 0 and not self._turns and (ahead == 1 or _latents_go_on(last.sample, sample))
        if _is_entry(timestep) or _is_entry(last.timestep):
            return False
        return _fell(last.timestep, timestep) and _latents_go_on(last.sample, sample)

    def _set_timesteps(self) -> object:
        return getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)


def _is_entry(timestep: object) -> bool:
    """Whether a timestep is part of another tensor, as a loop over `scheduler.timesteps` gives it."""
    if not isinstance(timestep, Tensor):
        return False
    # Tensors of inference mode do not say that they are views.
    return timestep._is_view() or timestep.untyped_storage().nbytes() > timestep.nbytes  # pyright: ignore[reportPrivateUsage]


def _ahead(before: object, now: object) -> int | None:
    """How many entries one timestep lies behind another in the same memory, if it is the same."""
    if not (isinstance(before, Tensor) and isinstance(now, Tensor)):
        return None
    # The one before is held, so that its memory is nobody else's.
    if before.untyped_storage().data_ptr() != now.untyped_storage().data_ptr():
        return None
    return int(now.storage_offset()) - int(before.storage_offset())


def _fell(before: object, now: object) -> bool:
    """Whether every timestep of a call is below the same one of the call before, whatever their types and shapes."""
    earlier, later = (sorted(set(torch.as_tensor(value).flatten().tolist())) for value in (before, now))
    return len(earlier) == len(later) and all(b > a for b, a in zip(earlier, later, strict=True))


def _latents_go_on(before: Tensor, now: Tensor) -> bool:
    """Whether latents look like what a step made of those before, each image and channel for itself.

    Masks and images among the channels do not change within a run, and tell nothing. After guidance was switched off
    there are half the rows.
    """
    if before.shape[1:] != now.shape[1:] or len(before) < len(now):
        return False
    a, b = (x.detach().float().flatten(-2) for x in (before[-len(now) :], now))
    return bool((2 * (a * b).sum(-1) >= _LEAST_LIKENESS * (a.square() + b.square()).sum(-1)).all())


def is_guided(pipe: Any) -> bool:
    """Whether a pipeline guides: whether it calls its U-Net with two rows for each image, the conditional one last.

    Raises: `ValueError` for a pipeline that does not say so, or calls it with three.
    """
    kind = type(pipe)
    three = hasattr(kind, "image_guidance_scale") or getattr(pipe, "do_perturbed_attention_guidance", False)
    if three or not hasattr(kind, "do_classifier_free_guidance"):
        raise ValueError(
            f"expected a pipeline with two halves for guidance to tell them apart, got {kind.__name__}; use a plan "
            "without unguided_steps, and one that is not fitted"
        )
    return bool(pipe.do_classifier_free_guidance)
