"""The bundled model, left to draw what it likes -> from which step, and at which depth, a linear probe can tell what.

Pictures are drawn from the empty prompt, so nothing tells the network what to draw: whatever a feature holds of the
final picture's attributes, the trajectory has settled by then. The truth is what the reader sees in the final picture.
A probe is ridge regression to one column a class, of a few figures of each channel; it is judged on pictures that it
was not fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fastcache.analysis.experiments import LATENTS
from fastcache.analysis.measure import AnalysisSettings, sampler_table
from fastcache.analysis.recorder import Array, Capture
from fastcache.analysis.subject import Subject
from fastcache.analysis.taps import unet_taps
from fastcache.demo.scenes import Scene
from fastcache.evaluate.judges import read_scenes
from fastcache.planning.eager import EagerDenoiser
from fastcache.planning.trajectory import draw_noise, run_uncached

GRID = 2  # cells a side: with the whole plane's extremes, places are told apart, and what does not lie at one is too
FOLDS = 5
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # in units of the features' mean square: they are standardised
_BATCH = 32
_CLASSES = 5  # pictures that an attribute's value must have at least, one a fold
Say = Callable[[str], None]

# What a picture has, and how one is told from its scene; all but the first two are asked of pictures of one object.
ATTRIBUTES: dict[str, Callable[[Scene], str]] = {
    "background": lambda scene: scene.background,
    "number of objects": lambda scene: str(len(scene.objects)),
    "place": lambda scene: scene.objects[0].place,
    "size": lambda scene: scene.objects[0].size,
    "colour": lambda scene: scene.objects[0].colour,
    "shape": lambda scene: scene.objects[0].shape,
}
_OF_ANY_PICTURE = ("background", "number of objects")


@dataclass(frozen=True, eq=False)
class Probes:
    """Held-out accuracy by attribute and feature, at some steps. `chance` is that of always naming the commonest value.

    Shapes: `steps` (S,); each of `accuracy[attribute][feature]` (S,). `pictures` is how many an attribute was told of.
    """

    steps: tuple[int, ...]
    accuracy: dict[str, dict[str, Array]]
    chance: dict[str, float]
    pictures: dict[str, int]


def probe(subject: Subject, settings: AnalysisSettings, images: int, say: Say, most_steps: int = 20) -> Probes:
    """Draw `images` pictures from the empty prompt, unguided, and fit probes at up to `most_steps` steps.

    Raises: `ValueError` for another model than the bundled one, or too few images to hold any out.
    """
    if subject.name != "demo":
        raise ValueError(f"expected --model demo for --probes, whose pictures can be read, got {subject.name}")
    table = sampler_table(subject, settings)
    steps = tuple(sorted(set(np.linspace(0, table.num_calls - 1, most_steps).round().astype(int).tolist())))
    parts: list[dict[tuple[str, int], Tensor]] = []
    scenes: list[Scene] = []
    for start in range(0, images, _BATCH):
        count = min(_BATCH, images - start)
        say(f"drawing pictures {start + 1} to {start + count} of {images} for the probes")
        features, latents = _draw(subject, settings, range(start, start + count), steps)
        parts.append(features)
        scenes += read_scenes(subject.decode(latents))
    features = {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
    return _fit(features, scenes, steps, say)


def _draw(
    subject: Subject, settings: AnalysisSettings, seeds: range, steps: Sequence[int]
) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """One batch's features at the steps asked for, pooled, by (name, step), and its final latents."""
    table = sampler_table(subject, settings)
    empty = {name: rows[:1].repeat(len(seeds), 1, 1) for name, rows in subject.conditioning([""]).items()}
    denoiser = EagerDenoiser(subject.unet, empty, len(seeds), subject.latent_size, branch_ids=())
    capture = Capture([tap for tap in unet_taps(subject.unet, ()) if tap.measure == "similarity"])
    features: dict[tuple[str, int], Tensor] = {}
    call = 0

    def predict(sample: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        nonlocal call
        with capture:
            noise_pred = denoiser.full(sample[None], timestep, guidance_scale)[0]
        if call in steps:
            for name, found in {LATENTS: sample, **capture.found}.items():
                features[name, call] = channel_figures(found).cpu()
        call += 1
        return noise_pred

    start = draw_noise(denoiser.latent_shape, seeds, denoiser.device)
    *_, latents = run_uncached(predict, table, start, lambda _: 1.0)
    return features, latents


def channel_figures(feature: Tensor) -> Tensor:
    """Of each channel the means over 2x2 cells, and the mean, deviation, least and greatest value over the plane.

    Of the bundled model's 162 pictures of one object this told shape and colour 10 to 20 points better than 16 or 64
    cells, and place as well. Shapes: (N, C, H, W) to (N, 8 C).
    """
    cells, plane = functional.adaptive_avg_pool2d(feature, GRID).flatten(1), feature.flatten(2)
    return torch.cat([cells, plane.mean(2), plane.std(2), plane.amin(2), plane.amax(2)], 1)


def _fit(features: dict[tuple[str, int], Array], scenes: Sequence[Scene], steps: tuple[int, ...], say: Say) -> Probes:
    accuracy: dict[str, dict[str, Array]] = {}
    chance, pictures = dict[str, float](), dict[str, int]()
    names = list(dict.fromkeys(name for name, _ in features))
    for attribute, tell in ATTRIBUTES.items():
        say(f"fitting probes for {attribute}")
        asked = [k for k, s in enumerate(scenes) if len(s.objects) == 1 or (attribute in _OF_ANY_PICTURE and s.objects)]
        rows, classes = _frequent(np.array(asked), np.array([tell(scenes[k]) for k in asked]))
        if len(rows) < 2 * FOLDS or len(set(classes)) < 2:
            continue
        _, counts = np.unique(classes, return_counts=True)
        chance[attribute], pictures[attribute] = float(counts.max() / len(rows)), len(rows)
        accuracy[attribute] = {
            name: np.array([held_out_accuracy(features[name, step][rows], classes) for step in steps]) for name in names
        }
    if not accuracy:
        raise ValueError(f"expected pictures enough to hold some out, got {len(scenes)}; ask for more --probe-images")
    return Probes(steps, accuracy, chance, pictures)


def _frequent(
    rows: npt.NDArray[np.int64], classes: npt.NDArray[np.str_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.str_]]:
    """Those of classes that every fold can have one of."""
    values, counts = np.unique(classes, return_counts=True)
    keep = np.isin(classes, values[counts >= _CLASSES])
    return rows[keep], classes[keep]


def held_out_accuracy(features: Array, classes: npt.NDArray[np.str_], seed: int = 0) -> float:
    """The share of rows whose class a ridge regression fitted to the other folds tells right.

    Each fold chooses its ridge among its own rows by leaving out one at a time, which has a closed form.
    Shapes: `features` (rows, width); `classes` (rows,).
    """
    values, targets = np.unique(classes, return_inverse=True)
    onehot = np.eye(len(values))[targets]
    order = np.random.default_rng(seed).permutation(len(classes))
    right = 0
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        right += int((_predict(features[rest], onehot[rest], features[fold]).argmax(1) == targets[fold]).sum())
    return right / len(classes)


def _predict(features: Array, targets: Array, others: Array) -> Array:
    """Ridge regression in its dual form, with the ridge whose leave-one-out error is least. Shapes: all (rows, ...)."""
    mean, scale = features.mean(0), features.std(0) + 1e-6
    known, asked, centre = (features - mean) / scale, (others - mean) / scale, targets.mean(0)
    kernel = known @ known.T / known.shape[1]
    eigenvalues, vectors = np.linalg.eigh(kernel)
    rotated = vectors.T @ (targets - centre)
    best, dual = np.inf, np.zeros_like(targets)
    for ridge in _RIDGES:
        inverse = 1 / (eigenvalues.clip(0) + ridge)
        weights = vectors @ (inverse[:, None] * rotated)
        # leaving row i out changes its residual to alpha_i / (K + ridge)^-1_ii
        left_out = weights / (vectors**2 @ inverse)[:, None]
        if (error := float(np.square(left_out).mean())) < best:
            best, dual = error, weights
    return asked @ known.T / known.shape[1] @ dual + centre
