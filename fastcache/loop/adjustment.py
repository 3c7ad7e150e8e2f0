"""What the residuals of blocks are multiplied by, and what is added to them, at the steps that reuse them.

A table a plan: a scale and a shift for every step and every channel of every block. Knows numbers; nothing about
engines. Source: Block Caching, arXiv 2312.03209, section 3.3.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from fastcache.expect import expected, is_int

_MOST_BYTES: Final = 2**26  # SD 1.5 has 12,480 channels: 5 MB at 50 steps
_MOST_STEPS: Final = 2000
_LARGEST: Final = 1e4
_REMEDY: Final = "make the plan with `fastcache plan --blocks`"


@dataclass(frozen=True)
class ScaleShift:
    """Scales and shifts of a plan's steps. Shapes: `data` (steps, 2, `channels`), little-endian float32, scales first.

    Raises: `ValueError` for data of another size, or a number that is not finite.
    """

    channels: int
    data: bytes

    def __post_init__(self) -> None:
        if not is_int(self.channels) or not 1 <= self.channels <= _MOST_BYTES:
            raise expected("channels of 1 or more in scale_shift", self.channels, _REMEDY)
        row = 8 * self.channels
        if not isinstance(self.data, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected("the data of scale_shift to be bytes", self.data, _REMEDY)
        if not self.data or len(self.data) % row or len(self.data) > _MOST_BYTES:
            raise expected(f"a multiple of {row} bytes in scale_shift, up to {_MOST_BYTES}", len(self.data), _REMEDY)
        if not np.all(np.abs(self.table) <= _LARGEST):  # False for nan
            raise ValueError(f"expected numbers of at most {_LARGEST:g} in scale_shift, got others; {_REMEDY}")

    @classmethod
    def of(cls, table: npt.NDArray[np.floating]) -> ScaleShift:
        """Of a table of numbers. Shapes: (steps, 2, channels)."""
        return cls(table.shape[-1], table.astype("<f4").tobytes())

    @property
    def table(self) -> npt.NDArray[np.float32]:
        """Shapes: (steps, 2, channels)."""
        return np.frombuffer(self.data, "<f4").reshape(-1, 2, self.channels)

    @property
    def num_steps(self) -> int:
        return len(self.data) // (8 * self.channels)

    def last_steps(self, count: int) -> ScaleShift:
        return ScaleShift(self.channels, self.data[-8 * self.channels * count :])

    def to_json(self) -> dict[str, Any]:
        """The table, compressed, as text."""
        return {"channels": self.channels, "data": base64.b64encode(zlib.compress(self.data)).decode()}

    @classmethod
    def from_json(cls, value: object) -> ScaleShift:
        """What `to_json` gave. Raises: `ValueError` for anything else."""
        found = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        if found.keys() != {"channels", "data"} or not isinstance(found["data"], str):
            raise expected("scale_shift to have the keys channels and data", value, _REMEDY)
        channels = found["channels"] if is_int(found["channels"]) else 0
        most = min(_MOST_BYTES, 8 * channels * _MOST_STEPS) + 1  # a few bytes may say millions
        try:
            unpacked = zlib.decompressobj().decompress(base64.b64decode(found["data"], validate=True), max(most, 1))
        except (binascii.Error, zlib.error) as error:
            raise ValueError(f"expected the data of scale_shift as it was written, got: {error}; {_REMEDY}") from None
        return cls(found["channels"], unpacked)
