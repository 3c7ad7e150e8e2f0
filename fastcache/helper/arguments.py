"""A call of a U-Net or a ControlNet -> its arguments by name, and whether a later call's say the same.

Knows nothing about runs, plans or what is cached.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

Arguments = dict[str, Any]

# What is new in every call; of the sample the shape must stay, and of residuals whether there are any.
_PER_STEP = ("sample", "timestep")
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Arguments, bool]:
    """The arguments of a call by name, those that say nothing left out, and whether its result has names."""
    arguments = _signature(type(module)).bind(module, *args, **kwargs).arguments
    return_dict = arguments.pop("return_dict", True)
    given = {name: value for name, value in arguments.items() if value is not None and name != "self"}
    return given, return_dict


class Kept:
    """What has to stay as it is while a feature is reused: a call's arguments but for those of each step.

    Tensors are held and their version counters noted, so that one that was written to is no longer what it was.
    Tensors of inference mode have no counter, so that copies of them are held.
    """

    def __init__(self, arguments: Arguments) -> None:
        sample: Tensor = arguments["sample"]
        kept = {k: v for k, v in arguments.items() if k not in _PER_STEP and k not in _RESIDUALS}
        present = [name for name in _RESIDUALS if name in arguments]
        self._values = _snapshot(kept | {"residuals": present})
        self._sample = (tuple(sample.shape), sample.dtype, sample.device)
        self._versions = self._versions_now()

    def fits(self, now: Kept) -> bool:
        """Whether a later call has the same arguments."""
        return now._sample == self._sample and self._unwritten() and same(self._values, now._values)

    def fits_half(self, now: Kept) -> bool:
        """Whether a later call has the conditional half of these, as where guidance was switched off."""
        (rows, *others), *kind = self._sample
        if rows % 2 or now._sample != ((rows // 2, *others), *kind):
            return False
        return self._unwritten() and same(conditional_half(self._values, rows), now._values)

    def _unwritten(self) -> bool:
        return self._versions_now() == self._versions

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in _tensors(self._values)]  # pyright: ignore[reportPrivateUsage]


def _snapshot(value: Any) -> Any:
    """Dicts and lists as they are now, for pipelines add to their own and take from them after a call."""
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_snapshot(item) for item in value]
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of a snapshot that counts its changes."""
    if isinstance(value, Tensor) and not value.is_inference():
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def conditional_half(value: Any, rows: int) -> Any:
    """A call's arguments, for `rows` rows, with the last half of every tensor that counts by them."""
    if isinstance(value, Tensor):
        counts = value.ndim > 0 and value.shape[0] % rows == 0  # a video's text has a row for each frame
        return value[value.shape[0] // 2 :] if counts else value
    if isinstance(value, Mapping):
        return {key: conditional_half(item, rows) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [conditional_half(item, rows) for item in value]
    return value


def same(a: object, b: object) -> bool:
    """Whether two arguments say the same.

    Tensors are compared by value only where they are not the same object: that waits for the device, and happens where
    a pipeline makes its conditioning anew for each step, as `LDMTextToImagePipeline` does, and in inference mode.
    """
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, cast("Iterable[Any]", a), cast("Iterable[Any]", b)))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


@functools.cache
def output_class(kind: type[nn.Module]) -> Any:
    """The class that a U-Net's forward returns: that of its file, where diffusers has one for each U-Net."""
    for base in kind.__mro__:
        names = vars(importlib.import_module(base.__module__)).values()
        found = [
            value
            for value in names
            if inspect.isclass(value) and issubclass(value, BaseOutput) and value.__module__ == base.__module__
        ]
        if len(found) == 1:
            return found[0]
    raise ValueError(f"expected a U-Net of diffusers, got {kind.__name__}, whose output class is unknown")
