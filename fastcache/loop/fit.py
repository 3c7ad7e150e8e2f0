"""What a fitted plan says besides its passes: the calls of a reference run that it visits, its rows, their validity.

Pure Python: knows nothing about tensors, engines or schedulers. `fitted.py` makes a sampler's table of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from fastcache.expect import expected, is_int, is_number

MOST_LOOKED_BACK: Final = 5  # calls, as many as a lane's ring has places for with any named sampler
_MOST_GUIDANCE: Final = 1.4  # times the fit's: rows for 4 gain 11 dB at 4, 7 to 9 at 5.5, none at 8 (docs/findings.md)
_LARGEST: Final = 1e9  # weights are below 100; what has no end is no number
_MOST_CALLS: Final = 1000  # a model is trained on as many timesteps


@dataclass(frozen=True)
class Fit:
    """Rows that keep a run of few calls near a reference run of many.

    The reference takes `num_inference_steps` of the plan's sampler; `points` are those of its U-Net calls that the run
    visits, ascending, one for each step of the plan. `rows[k]` are what x and e of the last calls, oldest first,
    step k's own last, count in the state before the next point, or in the result: x, e, x, e, ... Besides,
    `contrasts[k]` are what counts of that which guidance added at the last calls, step k's own last: the guidance scale
    less 1, times the conditional prediction less the unconditional one. None where no row gains by it.

    The rest says what the rows hold for: the guidance scale, the picture's size in pixels, the model's weights, backend
    and dtype of the engines; and what they came from: so many calibration `images` (none for rows by a formula),
    left-out pictures at `psnr_db` to the reference's, and the U-Net's time in uncached `full_steps`, where these were
    measured.

    Raises: `ValueError` for points or rows that do not fit each other.
    """

    num_inference_steps: int
    points: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]
    guidance_scale: float
    height: int
    width: int
    weights_sha256: str
    backend: str
    dtype: str
    images: int
    psnr_db: float | None = None
    full_steps: float | None = None
    contrasts: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("num_inference_steps", 1), ("height", 1), ("width", 1), ("images", 0)):
            if not is_int(value := getattr(self, name)) or value < least:
                raise expected(f"{name} of {least} or more in a fit", value, _REMEDY)
        for name in ("weights_sha256", "backend", "dtype"):
            if not isinstance(value := getattr(self, name), str):
                raise expected(f"{name} to be a string in a fit", value, _REMEDY)
        for name in ("psnr_db", "full_steps"):
            if (value := getattr(self, name)) is not None and not _is_finite(value):
                raise expected(f"{name} to be a number in a fit", value, _REMEDY)
        if not _is_finite(self.guidance_scale):
            raise expected("a finite guidance_scale in a fit", self.guidance_scale, _REMEDY)
        _check_points(self.points)
        if len(self.rows) != len(self.points):
            raise expected(f"{len(self.points)} rows in a fit, one a point", len(self.rows), _REMEDY)
        if len(self.contrasts) not in (0, len(self.points)):
            raise expected(f"{len(self.points)} contrasts in a fit, one a point, or none", len(self.contrasts), _REMEDY)
        for step, row in enumerate(self.rows):
            _check_weights(step, row, self.contrast(step))

    def contrast(self, step: int) -> tuple[float, ...]:
        """What counts, after a step, of that which guidance added at the last calls; nothing where no row has any."""
        return self.contrasts[step] if self.contrasts else ()

    def check_guidance(self, guidance_scale: float | None) -> None:
        """Warn of a run at more guidance than the rows are good for; less does them no harm (docs/findings.md)."""
        if guidance_scale is not None and guidance_scale > _MOST_GUIDANCE * self.guidance_scale:
            warnings.warn(
                f"a plan fitted at guidance {self.guidance_scale:g} runs at {guidance_scale:g}: its rows may not help "
                "there; fit one with --guidance-scale",
                stacklevel=6,
            )


_REMEDY: Final = "make the plan with `fastcache plan --budget` or --fit"


def _is_finite(value: object) -> bool:
    return is_number(value) and abs(value) <= _LARGEST  # False for nan


def _check_weights(step: int, row: tuple[float, ...], contrast: tuple[float, ...]) -> None:
    calls = min(step + 1, MOST_LOOKED_BACK)
    if not 2 <= len(row) <= 2 * calls or len(row) % 2 or not all(map(_is_finite, row)):
        raise expected(f"pairs of finite weights of at most {calls} calls in row {step}", row, _REMEDY)
    if len(contrast) > calls or not all(map(_is_finite, contrast)):
        raise expected(f"finite weights of at most {calls} calls in contrast {step}", contrast, _REMEDY)


def _check_points(points: tuple[int, ...]) -> None:
    if not 1 <= len(points) <= _MOST_CALLS or not all(map(is_int, points)) or points[0] < 0:
        raise expected(f"1 to {_MOST_CALLS} points in a fit", points, _REMEDY)
    if not all(before < after for before, after in pairwise(points)):
        raise expected("ascending points in a fit", points, _REMEDY)
