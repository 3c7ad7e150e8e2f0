"""A live U-Net -> its passes as torch modules on its own submodules, cut where the passes' names say."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fastcache.cut.fused import fuse_first_norm
from fastcache.cut.names import FULL, branch_of, shallow_pass
from fastcache.cut.partition import partition_branches
from fastcache.helper.features import Features
from fastcache.helper.passes import UNetCall
from fastcache.loop.plan import Forecast


class EagerPasses:
    """The full pass and the shallow ones named; with `kernels`, the first norm above a cut is fastcache's operator.

    Raises: `PartitionError` for a U-Net, or a pass, that cannot be cut, or a layer that the operator does not fit.
    """

    def __init__(
        self, unet: nn.Module, names: Iterable[str], forecast: Forecast | None = None, kernels: bool = False
    ) -> None:
        self._unet, self._kernels = unet, kernels
        self._branch_ids = [branch for branch in map(branch_of, names) if branch is not None]
        self._features = Features(forecast)
        self.refresh()

    def refresh(self) -> None:
        self._features.clear()
        self._cuts = partition_branches(self._unet, self._branch_ids)
        self._shallow = {shallow_pass(branch_id): cut for branch_id, cut in self._cuts.at.items()}
        for cut in self._shallow.values() if self._kernels else ():
            fuse_first_norm(cut)

    def serves(self, name: str, halved: bool) -> bool:
        return all(self._features.serves(feature, halved) for feature in self._shallow[name].cached)

    def halve(self) -> bool:
        self._features.halve()
        return True

    def run(self, name: str, call: UNetCall) -> Tensor:
        if name == FULL:
            stores, (noise_pred, *stored) = self._cuts.cached, self._cuts.full(**call.arguments)
        else:
            cut = self._shallow[name]
            (feature,) = cut.cached  # the plain cut's only one
            taken = self._features.at(feature, call.step, call.halved, call.sigmas)
            result = cut.shallow(**call.arguments, cached_feature=taken)
            stores, (noise_pred, *stored) = cut.refreshes, result if cut.refreshes else (result,)
        self._features.store(call.step, dict(zip(stores, stored, strict=True)), call.halved)
        return noise_pred
