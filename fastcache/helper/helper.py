"""A live diffusers pipeline -> the same pipeline, its U-Net's calls FULL or SHALLOW after a plan.

The pipeline's U-Net, its ControlNet where there is one, and for a fitted plan its scheduler are exchanged for objects
that stand for them, and put back. Which call is FULL is `caching.py`'s business, how it is computed `eager.py`'s and
`engines.py`'s.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import numpy as np
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from fastcache.bundle.bundle import Bundle, open_bundle
from fastcache.cut.names import is_pattern
from fastcache.expect import at_least, expected
from fastcache.helper.blocks import EagerBlocks
from fastcache.helper.caching import Caching, ControlCaching, Pacing, can_cut
from fastcache.helper.eager import EagerPasses
from fastcache.helper.engines import EnginePasses
from fastcache.helper.fitted import fitted_scheduler
from fastcache.helper.passes import PassRunner
from fastcache.helper.standin import check_free, dismiss, guard, release, stand_in
from fastcache.loop.plan import CachePlan


class _Exchange(NamedTuple):
    """A component of the pipeline, by its name, and the object that stands for it."""

    name: str
    own: Any
    twin: Any


class FastCacheHelper:
    """Drop-in for DeepCache's `DeepCacheSDHelper`: caching on a diffusers pipeline that is used as before.

    Without `engines` the passes are torch modules over the pipeline's own weights and nothing has to be built. With
    `engines`, a bundle or its folder, the bundle's engines compute in the U-Net's place.

        helper = FastCacheHelper(pipe)
        helper.set_params(cache_interval=3, cache_branch_id=0)
        helper.enable()
        image = pipe("a large red circle").images[0]
        helper.disable()

    Steps are counted from each run's first U-Net call, whatever the sampler and whoever calls. A change of batch, size,
    prompt, weights, LoRA, IP-Adapter or ControlNet between two calls makes the second FULL; engines refuse another one
    than they were enabled with. `runs.py` and `network.py` say what is seen. Where guidance was switched off between
    two calls, the run goes on with the conditional half of what is cached. A ControlNet computes at SHALLOW steps what
    these use of it. Copies and pickles of the pipeline are of the plain one. Not for several threads at once.

    With `kernels` the torch modules' first norm above the cut is fastcache's own operator: kernels on a GPU, the same
    arithmetic in another order elsewhere. Whether that is faster there has not been measured.
    Source: DeepCache, arXiv 2312.00858.
    """

    def __init__(
        self,
        pipe: Any,
        engines: Bundle | str | os.PathLike[str] | None = None,
        *,
        kernels: bool = False,
        trusted: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(getattr(pipe, "unet", None), nn.Module):
            raise ValueError(f"expected pipe with a U-Net, got {type(pipe).__name__} without one; give a pipeline")
        if not isinstance(kernels, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected("kernels to be True or False", kernels, "docs/kernels.md says what they are")
        if not isinstance(engines, Bundle | str | os.PathLike | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected("engines to be a bundle or its folder", engines, "build one with `fastcache build-engines`")
        if kernels and engines is not None:
            raise ValueError(
                "expected kernels or engines, got both; an engine's kernels are chosen when it is built (--kernels)"
            )
        if trusted is not None and (engines is None or isinstance(engines, Bundle)):
            raise ValueError("expected trusted with the folder of engines, got it without; open_bundle takes it, too")
        self.pipe = pipe
        self._bundle = engines if engines is None or isinstance(engines, Bundle) else open_bundle(engines, trusted)
        self._kernels = kernels
        self._pacing = Pacing(1, 0 if self._bundle is None else self._bundle.manifest.branch_id)
        self._caching: Caching | None = None  # while enabled
        self._exchanged: list[_Exchange] = []

    @property
    def enabled(self) -> bool:
        return any(exchange.name == "unet" and self.pipe.unet is exchange.twin for exchange in self._exchanged)

    def set_params(
        self,
        cache_interval: int = 1,
        cache_branch_id: int = 0,
        skip_mode: str = "uniform",
        *,
        plan: CachePlan | None = None,
    ) -> None:
        """A FULL step every `cache_interval` calls (1: no caching), or `plan` step by step.

        `cache_branch_id` names the skip connection of the cut, 0 the shallowest; a plan names its own, one or several.
        At a plan's unguided steps the U-Net runs on the conditional half alone, and the pipeline's guidance, between
        two equal halves, changes nothing. Where the helper is enabled, this holds from the next call on, which is FULL.
        A fitted plan steps by its own rows: the pipeline is asked for as many steps as the plan was fitted for.

        Raises: `ValueError` for arguments out of range.
        """
        interval, branch_id = _whole(1, cache_interval=cache_interval), _whole(0, cache_branch_id=cache_branch_id)
        if not (isinstance(skip_mode, str) and skip_mode == "uniform"):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected('skip_mode to be "uniform"', skip_mode, "give plan= for any other schedule")
        if not isinstance(plan, CachePlan | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected("plan to be a CachePlan or None", plan, "make one with CachePlan.uniform or from_json")
        if plan is not None and interval != 1:
            raise ValueError("expected cache_interval or plan, got both; leave cache_interval out")
        before, pacing = self._pacing, Pacing(interval, branch_id, plan)
        if self._caching is not None and pacing.fitted is not before.fitted:
            self._enable_again(pacing)
        elif self._caching is not None:
            told, was = ((own.names, own.forecast, own.scale_shift) for own in (pacing, before))
            same_passes = told == was
            self._caching.change(pacing, None if same_passes else self._passes(self._exchanged[0].own, pacing))
        self._pacing = pacing  # only now: what was refused changes nothing

    def _enable_again(self, pacing: Pacing) -> None:
        """Exchange the scheduler too, or put it back; where that is refused all stays as it was."""
        before = self._pacing
        self.disable()
        try:
            self._pacing = pacing
            self.enable()
        except Exception:
            self._pacing = before
            self.enable()
            raise

    def enable(self) -> None:
        """Exchange the pipeline's U-Net and ControlNet. Does nothing where that is done.

        Raises: `PartitionError` for a U-Net or branch id that cannot be cut; `ValueError` for a U-Net that is compiled
        or that another helper holds, or engines of another model; `BackendUnavailable`.
        """
        if self.enabled:
            return
        self.disable()  # of a U-Net that the pipeline has no more
        unet, control_net = self.pipe.unet, getattr(self.pipe, "controlnet", None)
        for module in filter(None, (unet, control_net)):
            check_free(module)
        fitted = self._pacing.fitted
        caching = Caching(self.pipe, unet, self._passes(unet, self._pacing), self._pacing)
        scheduler = None if fitted is None else fitted_scheduler(fitted, self.pipe, lambda: caching.last)
        self._caching, self._exchanged = caching, [_Exchange("unet", unet, stand_in(unet, caching.forward))]
        if can_cut(control_net):
            twin = stand_in(control_net, ControlCaching(control_net, caching).forward)
            self._exchanged.append(_Exchange("controlnet", control_net, twin))
        if scheduler is not None:
            self._exchanged.append(_Exchange("scheduler", self.pipe.scheduler, scheduler))
        for exchange in self._exchanged:
            setattr(self.pipe, exchange.name, exchange.twin)
        if isinstance(self.pipe, DiffusionPipeline):
            guard(self.pipe, [exchange.name for exchange in self._exchanged])

    def disable(self) -> None:
        """Put the very objects back that were there before. Does nothing where that is done."""
        if self._exchanged:
            release(self.pipe)
        for name, own, twin in self._exchanged:
            if getattr(self.pipe, name, None) is twin:
                setattr(self.pipe, name, own)
            if isinstance(own, nn.Module):
                dismiss(twin, own)
        if self._caching is not None:
            self._caching.stop()
        self._caching, self._exchanged = None, []

    def _passes(self, unet: nn.Module, pacing: Pacing) -> PassRunner:
        if self._bundle is not None:
            return EnginePasses(unet, pacing.names, self._bundle, pacing.forecast, pacing.scale_shift)
        if any(map(is_pattern, pacing.names)):
            if self._kernels:
                raise ValueError("expected kernels with full and shallow passes, got a plan of blocks; leave them out")
            return EagerBlocks(unet, pacing.names, pacing.forecast, pacing.scale_shift)
        return EagerPasses(unet, pacing.names, pacing.forecast, self._kernels)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, which is not enabled: copies of the pipeline have a plain U-Net."""
        return vars(self) | {"_caching": None, "_exchanged": []}

    def __enter__(self) -> Self:
        self.enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def _whole(least: int, **named: Any) -> int:
    """The one argument given by its name, which may be an integer of numpy's.

    Raises: `ValueError` for another value, or a smaller one.
    """
    ((name, value),) = named.items()
    return at_least(least, **{name: cast(Any, value).item() if isinstance(value, np.generic) else value})
