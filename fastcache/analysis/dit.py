"""A small diffusion transformer on the bundled model's latents -> the measures of the U-Net, to set beside them.

It draws one object on a background, told its colour and shape by class; place, size and background are its own choice.
Trained weights come from `tools/train_dit.py`; without them its weights are random, which says how the measures behave
and nothing about trained transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from fastcache.analysis.measure import AnalysisSettings, sampler_table
from fastcache.analysis.recorder import FeatureMeasures, FeatureRecorder, Predict, joined
from fastcache.analysis.subject import Subject
from fastcache.analysis.taps import dit_taps
from fastcache.demo.scenes import COLOURS, SHAPES, Scene
from fastcache.evaluate.evaluate import batches
from fastcache.planning.trajectory import draw_noise, guide, run_uncached

CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
LATENT_SHAPE = (4, 16, 16)  # the bundled model's
Say = Callable[[str], None]


def class_of(scene: Scene) -> int:
    """The class of a scene's first object."""
    return CLASSES.index(f"{scene.objects[0].colour} {scene.objects[0].shape}")


def build_dit(seed: int = 0) -> DiTTransformer2DModel:
    """The architecture of DiT (arXiv 2212.09748, adaLN-Zero) with 8 blocks of width 128, of seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=8,
            in_channels=LATENT_SHAPE[0],
            sample_size=LATENT_SHAPE[1],
            patch_size=2,
            num_embeds_ada_norm=len(CLASSES),
        )


def load_dit(folder: Path | None) -> DiTTransformer2DModel:
    """Trained weights, or random ones where no folder is named.

    Raises: `ValueError` for a folder without such a model in safetensors.
    """
    if folder is None:
        return build_dit().eval().requires_grad_(False)
    try:
        model: Any = DiTTransformer2DModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"expected a transformer that tools/train_dit.py trained in {folder}: {str(error).splitlines()[0]}"
        ) from None
    if model.config.num_embeds_ada_norm != len(CLASSES) or model.config.sample_size != LATENT_SHAPE[1]:
        own = f"{model.config.num_embeds_ada_norm} on {model.config.sample_size}x{model.config.sample_size}"
        raise ValueError(f"expected a transformer of {len(CLASSES)} classes on 16x16 latents in {folder}, got {own}")
    return model.eval().requires_grad_(False)


def denoiser_of(model: DiTTransformer2DModel, classes: Sequence[int]) -> Predict:
    """The guided noise prediction of a DiT for P images of given classes; the class after the last is none.

    Shapes: the sample (P, C, H, W), as the noise prediction returned.
    """
    labels = torch.tensor([*[len(CLASSES)] * len(classes), *classes])

    @torch.no_grad()
    def predict(sample: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        timesteps = torch.full((2 * len(sample),), timestep)
        both: Any = model(torch.cat([sample, sample]), timesteps, labels, return_dict=False)
        return guide(both[0].unflatten(0, (2, -1)), guidance_scale)

    return predict


@dataclass(frozen=True, eq=False)
class DiTStudy:
    """What was measured on a DiT, whether it was trained, and what it drew. Shapes: `latents` (N, 4, 16, 16)."""

    trained: bool
    recorded: FeatureMeasures
    kinds: dict[str, str]
    latents: Tensor


def study_dit(folder: Path | None, subject: Subject, settings: AnalysisSettings, images: int, say: Say) -> DiTStudy:
    """Draw `images` pictures of as many classes, with the bundled model's noise schedule.

    Raises: `ValueError` for another subject than the bundled model, whose latents the transformer draws.
    """
    if subject.name != "demo":
        raise ValueError(
            f"expected --model demo for --dit and --dit-weights, which draw in its latents, got {subject.name}"
        )
    model, table = load_dit(folder), sampler_table(subject, settings)
    taps = dit_taps(model)
    records, latents = list[FeatureMeasures](), list[Tensor]()
    for start, names in batches(CLASSES[:: max(1, len(CLASSES) // images)][:images], settings.batch):
        say(f"measuring the transformer on classes {start + 1} to {start + len(names)}")
        recorder = FeatureRecorder(taps, table.num_calls, len(names))
        predict = recorder.watching(denoiser_of(model, [CLASSES.index(name) for name in names]))
        noise = draw_noise(LATENT_SHAPE, range(start, start + len(names)), "cpu")
        *_, last = run_uncached(predict, table, noise, lambda _: settings.guidance_scale)
        records.append(recorder.recorded())
        latents.append(last)
    return DiTStudy(folder is not None, joined(records), {tap.name: tap.kind for tap in taps}, torch.cat(latents))
