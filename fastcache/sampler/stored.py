"""The tables of a model's samplers -> one file of a bundle, and back: a run by one of them imports no scheduler.

Knows names, step counts and numbers; who checks that the file is the one that was built is the bundle's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fastcache.errors import BundleError
from fastcache.sampler.recursion import Update
from fastcache.sampler.scheduler import SAMPLERS, Scheduler, make_scheduler, own_sampler, same_sampler, step_arguments
from fastcache.sampler.table import SamplerTable, compile_sampler

TABLES: Final = "samplers.safetensors"
USUAL_STEPS: Final = (4, 8, 20, 25, 30)  # 50 is most models' own


def tables_file(config: Mapping[str, Any], usual_steps: int) -> bytes:
    """The tables of the samplers that have names, and of a model's own, at the usual step counts and the model's.

    Left out are samplers without a table, and step counts that a scheduler cannot make.
    """
    own = own_sampler(config)
    names = [name for name in SAMPLERS if _stored_name(name) == name]
    tensors = dict[str, Tensor]()
    for name in dict.fromkeys((own, *names)):
        scheduler = make_scheduler(name, config)
        for steps in {*USUAL_STEPS, usual_steps}:
            try:
                table = compile_sampler(scheduler, steps, **step_arguments(scheduler, 0.0))
            except ValueError:
                continue
            tensors |= {f"{name}/{steps}/{field}": value for field, value in _fields(table).items()}
    return save(tensors, {"own": own, "scheduler": _as_text(config)})


class _File(NamedTuple):
    """What a file of tables holds: the model's own sampler, and of each table its name, steps and calls."""

    own: str
    calls: dict[tuple[str, int], int]


class Samplers:
    """A model's samplers, by the names that users know: tables out of a file where it has them, else diffusers' own.

    `reading` is entered around every look at the file.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        file: Path | None = None,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.config, self._path, self._reading = config, file, reading

    @cached_property
    def own(self) -> str:
        """What the model's own is called. Raises: as `table`."""
        return own_sampler(self.config) if self._file is None else self._file.own

    @property
    def prediction_type(self) -> str:
        """What the model's network foretells."""
        return str(self.config.get("prediction_type", "epsilon"))

    def make(self, name: str) -> Scheduler:
        """The scheduler of diffusers that a name stands for. Raises: as `make_scheduler`."""
        return make_scheduler(name, self.config)

    def steps_for(self, name: str, num_calls: int) -> int | None:
        """How many steps of a sampler make so many U-Net calls, if a table says so. Raises: as `table`."""
        found = {} if self._file is None else self._file.calls
        stored = _stored_name(name)
        return next((steps for (of, steps), calls in found.items() if (of, calls) == (stored, num_calls)), None)

    def table(self, sampler: str, steps: int) -> SamplerTable | None:
        """The table of a whole run without noise of its own (eta 0), where the file has it.

        Raises: `BundleError` for a file that holds no tables.
        """
        key = _stored_name(sampler), steps
        if self._file is None or self._path is None or key not in self._file.calls:
            return None
        calls, begin = self._file.calls[key], f"{key[0]}/{steps}/"
        try:
            with self._reading(), safe_open(self._path, "pt") as file:
                names = file.keys()
                fields = {name: file.get_tensor(name) for name in names if name.startswith(begin)}
            return _table({name.removeprefix(begin): value for name, value in fields.items()}, calls)
        except BundleError:
            raise
        except Exception as error:  # safetensors' own, or a table of other fields
            raise BundleError(f"expected a table for {sampler}, {steps} steps, in {self._path}, got: {error}") from None

    @cached_property
    def _file(self) -> _File | None:
        """None where there is no file, or one for another scheduler than the model's."""
        if self._path is None:
            return None
        try:
            with self._reading(), safe_open(self._path, "pt") as file:
                said, names = file.metadata(), file.keys()
                timesteps = [name for name in names if name.endswith("/timesteps")]
                shapes = {name: file.get_slice(name).get_shape() for name in timesteps}
            if said["scheduler"] != _as_text(self.config):
                return None
            parts = {tuple(name.split("/")[:2]): shape[0] for name, shape in shapes.items()}
            return _File(said["own"], {(name, int(steps)): calls for (name, steps), calls in parts.items()})
        except BundleError:
            raise
        except Exception as error:  # safetensors' own, or other names
            raise BundleError(f"expected samplers' tables in {self._path}, got: {error}; build it again") from None


def _stored_name(name: str) -> str:
    """Of several names for the same sampler the first."""
    return next((other for other in SAMPLERS if same_sampler(other, name)), name)


def _as_text(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)


def _fields(table: SamplerTable) -> dict[str, Tensor]:
    """A table as tensors; `weights` are those of all updates, one after the other."""
    found = {
        "timesteps": table.timesteps,
        "input_scale": table.input_scale,
        "x": table.x,
        "eps": table.eps,
        "init_noise_sigma": _numbers([table.init_noise_sigma]),
        "noise_drawn": torch.tensor(table.noise_drawn, device="cpu"),
        "first": torch.tensor([update.first for update in table.stepwise], device="cpu"),
        "weights": _numbers(weight for update in table.stepwise for weight in update.weights),
    }
    if table.noise.any():
        found["noise"] = table.noise
    if table.sigmas is not None:
        found["sigmas"] = _numbers(table.sigmas)
    return found


def _table(fields: Mapping[str, Tensor], calls: int) -> SamplerTable:
    """Raises: `ValueError` for fields of other shapes, or updates that would look back beyond a run's first call."""
    one, square = (calls,), (calls, calls)
    shapes = dict.fromkeys(("timesteps", "input_scale", "x", "noise_drawn", "first"), one)
    shapes |= {"eps": square, "init_noise_sigma": (1,)}
    shapes |= {"noise": square} if "noise" in fields else {}
    shapes |= {"sigmas": one} if "sigmas" in fields else {}
    for name, shape in shapes.items():
        if tuple(fields[name].shape) != shape or not fields[name].isfinite().all():
            raise ValueError(f"{name} of shape {list(fields[name].shape)} in place of finite numbers, {list(shape)}")
    first: list[int] = fields["first"].tolist()
    lengths = [3 * (call + 1 - at) for call, at in enumerate(first)]
    if not all(0 <= at <= call for call, at in enumerate(first)) or sum(lengths) != len(fields["weights"]):
        raise ValueError("updates of calls that are not there")
    weights = [tuple(each) for each in (part.tolist() for part in fields["weights"].split(lengths))]
    return SamplerTable(
        timesteps=fields["timesteps"],
        input_scale=fields["input_scale"],
        x=fields["x"],
        eps=fields["eps"],
        noise=fields.get("noise", torch.zeros_like(fields["eps"])),
        init_noise_sigma=float(fields["init_noise_sigma"]),
        noise_drawn=tuple(fields["noise_drawn"].tolist()),
        stepwise=tuple(map(Update, first, weights)),
        sigmas=tuple(fields["sigmas"].tolist()) if "sigmas" in fields else None,
    )


def _numbers(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device="cpu")
