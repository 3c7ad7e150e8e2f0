"""Images, or their features -> how alike they are, and how sure a mean over images is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import bootstrap
from torch import Tensor

Array = npt.NDArray[np.floating]

_FIXED: dict[str, Any] = {"method": "percentile", "rng": 0}  # one seed, so that two estimates agree in pairs
MOST_DB = 100.0  # what an image equal to its reference counts as in a mean, which infinity would swallow


def psnr_db(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over whole sets of images, infinite where they are equal.

    Shapes: both (N, 3, H, W), values in [0, 1].
    """
    error = torch.mean((images.double() - reference.double()) ** 2).item()
    return math.inf if error == 0 else -10 * math.log10(error)


def psnr_db_each(images: Tensor, reference: Tensor) -> Array:
    """Peak signal-to-noise ratio of each image, at most `MOST_DB`.

    Shapes: both (N, 3, H, W), values in [0, 1]; returns (N,).
    """
    error = (images.double() - reference.double()).square().mean((1, 2, 3))
    return (-10 * error.clamp(min=10 ** (-MOST_DB / 10)).log10()).cpu().numpy()


def frechet_distance(features: Array, reference: Array) -> float:
    """Distance of two sets of features, each taken as a normal distribution.

    Biased upwards for few images: compare only sets of equal numbers. Shapes: (N, width) and (M, width).
    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    means = features.mean(0) - reference.mean(0)
    own, other = _deviations(features), _deviations(reference)
    # of covariances A = a'a and B = b'b, tr sqrt(A B) is the sum of the singular values of a b'
    cross = np.linalg.norm(own @ other.T, "nuc")
    return float(means @ means + np.square(own).sum() + np.square(other).sum() - 2 * cross)


def _deviations(features: Array) -> Array:
    """A matrix a, of no more rows than columns, whose product a'a is the covariance."""
    return np.linalg.qr(features - features.mean(0)).R / math.sqrt(len(features) - 1)


@dataclass(frozen=True)
class Estimate:
    """A statistic over images, with the bounds that 95% of its bootstrap resamples lie within."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Of the interval, towards its farther end."""
        return max(self.high - self.value, self.value - self.low)


def mean_of(values: Array, resamples: int = 1000) -> Estimate:
    """The mean of one value an image. Shapes: `values` (N,)."""
    return estimate(np.mean, values, resamples=resamples)


def ratio_of_medians(above: Array, below: Array) -> Estimate:
    """How the medians of two rows of numbers, taken in pairs, compare. Shapes: (N,) each."""
    return estimate(lambda a, b, axis: np.median(a, axis) / np.median(b, axis), above, below)


def frechet_estimate(features: Array, truth: Array) -> Estimate:
    """The distance, and around it 1.96 standard errors: resampled pictures repeat, which alone raises a distance."""
    rows = np.arange(len(features))
    found = bootstrap(
        (rows,), lambda drawn: frechet_distance(features[drawn], truth), vectorized=False, n_resamples=100, **_FIXED
    )
    value, error = frechet_distance(features, truth), 1.96 * float(found.standard_error)
    return Estimate(value, max(0.0, value - error), value + error)


def estimate(statistic: Callable[..., Any], *values: Array, resamples: int = 1000) -> Estimate:
    """A statistic of rows of one number an image, which are resampled together; of one image alone it is certain."""
    value = float(statistic(*values, axis=0))
    if len(values[0]) < 2:
        return Estimate(value, value, value)
    found = bootstrap(values, statistic, paired=True, n_resamples=resamples, **_FIXED).confidence_interval
    return Estimate(value, float(found.low), float(found.high))
