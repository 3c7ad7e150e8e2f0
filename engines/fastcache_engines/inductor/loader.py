"""torch's loader of AOTInductor's packages, which it keeps to itself: the only file that touches `torch._C._aoti`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastcache_engines.machine import BackendUnavailable

TRIED: Final = "2.13"  # what torch promises nobody may be gone, or mean something else, in any other


def untried(name: str) -> BackendUnavailable:
    """What to raise where this torch lacks something of its own that is used here."""
    return BackendUnavailable(
        f"expected torch {TRIED}, with whose AOTInductor fastcache was tried, got {torch.__version__}, which has no "
        f"{name} as it was there; install torch {TRIED}, or use another backend"
    )


class PackageLoader:
    """One package, its shared library in this process. `run` takes a list that it empties, and gives new tensors.

    Raises: `BackendUnavailable` for a torch that has no such loader; what torch raises for a file that is damaged.
    """

    run: Callable[[list[Tensor]], Sequence[Tensor]]

    def __init__(self, path: Path, device_index: int) -> None:
        try:
            from torch._C import _aoti  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs leave it out)

            kind: Any = _aoti.AOTIModelPackageLoader
            # True: without locks and events between threads, which no graph capture allows.
            self._loader = kind(str(path), "model", True, 1, device_index)
            self.run, self._load = self._loader.boxed_run, self._loader.load_constants
        except (ImportError, AttributeError, TypeError) as error:  # TypeError: it takes other arguments
            raise untried("torch._C._aoti.AOTIModelPackageLoader") from error

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Read these constants where they are, from now on; all of them have to be given."""
        # Not into the inactive buffer; all of them, or an error; no copies.
        self._load(constants, False, True, True)
