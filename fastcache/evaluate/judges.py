"""What judges a picture: likeness to the uncached one, the bundled model's scenes, and networks from local files.

A judge takes pictures, the uncached ones and their prompts, and gives a number for each picture (`evaluate.Judge`).
Nothing is downloaded: networks are given as files in safetensors, or as a folder in transformers' layout.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastcache.demo import reader
from fastcache.demo.features import scene_features
from fastcache.demo.scenes import Object, Scene, held_out_scenes, render, training_scenes
from fastcache.errors import BackendUnavailable
from fastcache.evaluate.evaluate import Judge
from fastcache.evaluate.quality import psnr_db_each
from fastcache_engines.extras import install

Array = npt.NDArray[np.floating]

_OBJECT = re.compile(r"an? (\w+) (\w+) (\w+) at the (\w+)")
_RENDERS = 16  # true pictures of each scene, which differ in jitter


def psnr_db(images: Tensor, reference: Tensor, _: Sequence[str]) -> Array:
    return psnr_db_each(images, reference)


def ssim(images: Tensor, reference: Tensor, _: Sequence[str]) -> Array:
    """Structural similarity. Raises: `BackendUnavailable` without torchmetrics."""
    similarity = _torchmetrics().functional.image.structural_similarity_index_measure
    # in double precision: in single, a picture is like itself to 0.9995 only
    return similarity(images.double(), reference.double(), data_range=1.0, reduction="none").reshape(-1).numpy()


def _torchmetrics() -> Any:
    try:
        import torchmetrics
    except ImportError as error:
        raise BackendUnavailable(f"SSIM and LPIPS need torchmetrics ({error}); run: {install('bench')}") from None
    return torchmetrics


def held_out_prompts(count: int) -> list[str]:
    """Captions of scenes that the bundled model was not trained on."""
    return [scene.caption() for scene in held_out_scenes(count)]


def calibration_prompts(count: int) -> list[str]:
    """Captions of scenes that are never held out, so that plans are made on other prompts than they are judged on."""
    rng = np.random.default_rng(7)
    return [scene.caption() for scene in islice(training_scenes(rng), count)]


def scene_of(prompt: str) -> Scene | None:
    """The scene that a full caption of the bundled model describes, or None for any other text."""
    objects = tuple(Object(*words) for words in _OBJECT.findall(prompt))
    ground = re.search(r"on a (\w+) background$", prompt)
    scene = Scene(objects, ground.group(1)) if ground else None
    return scene if scene is not None and scene.caption() == prompt else None


def scene_right(images: Tensor, _: Tensor, prompts: Sequence[str]) -> Array:
    """1 where a picture shows every attribute asked for and no further object, else 0."""
    return np.array([float(reader.matches(seen, wanted)) for seen, wanted in _read(images, prompts)])


def attribute_accuracy(images: Tensor, _: Tensor, prompts: Sequence[str]) -> Array:
    """The share of what is asked for that a picture shows: its background, and each object's size, colour and shape."""
    return np.array([_share(seen, wanted) for seen, wanted in _read(images, prompts)])


def _read(images: Tensor, prompts: Sequence[str]) -> list[tuple[Scene, Scene]]:
    wanted = [scene_of(prompt) for prompt in prompts]
    if None in wanted:
        raise ValueError(f"expected full captions of scenes, got {prompts[wanted.index(None)]!r}")
    return [(seen, scene) for seen, scene in zip(read_scenes(images), wanted, strict=True) if scene is not None]


def read_scenes(images: Tensor) -> list[Scene]:
    """What the bundled model's reader sees in its pictures. Shapes: (N, 3, 64, 64) in [0, 1]."""
    return [reader.read_scene(pixels) for pixels in _uint8(images).permute(0, 2, 3, 1).numpy()]


def _share(seen: Scene, wanted: Scene) -> float:
    """An object is looked for at the place where it was asked for."""
    at = {found.place: found for found in seen.objects}
    right = [seen.background == wanted.background]
    for o in wanted.objects:
        found = at.get(o.place)
        right += [found is not None and getattr(found, a) == getattr(o, a) for a in ("size", "colour", "shape")]
    return float(np.mean(right))


def demo_features(images: Tensor) -> Array:
    """Features of the bundled scene network. Shapes: (N, 3, 64, 64) in [0, 1] to (N, 64)."""
    return scene_features(images).double().numpy()


def true_features(prompts: Sequence[str]) -> Array:
    """The features of true pictures of what the captions describe."""
    rng = np.random.default_rng(1)
    scenes = [scene for scene in map(scene_of, prompts) if scene is not None]
    pictures = np.stack([render(scene, rng) for scene in scenes for _ in range(_RENDERS)])
    return demo_features(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)


def lpips_judge(weights: Path) -> Judge:
    """LPIPS on AlexNet: `weights` holds torchvision's alexnet in safetensors (`features.0.weight`, ...).

    The linear heads are those that torchmetrics carries.
    Raises: `ValueError` for a file that is not such a network.
    Source: Zhang et al., arXiv 1801.03924, section 3; version 0.1 of its code.
    """
    backbone = _alexnet(weights)
    heads_file = Path(_torchmetrics().__file__).parent / "functional/image/lpips_models/alex.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    shift, scale = (
        torch.tensor(numbers).view(1, 3, 1, 1) for numbers in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    )

    @torch.inference_mode()
    def judge(images: Tensor, reference: Tensor, _: Sequence[str]) -> Array:
        x = (torch.cat([images, reference]) * 2 - 1 - shift) / scale
        distance, stage = torch.zeros(len(images)), 0
        for layer in backbone:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-8)
                apart = (unit[: len(images)] - unit[len(images) :]).square()
                distance += (apart * heads[f"lin{stage}.model.1.weight"]).sum(1).mean((1, 2))
                stage += 1
        return distance.double().numpy()

    return judge


def _alexnet(weights: Path) -> nn.Sequential:
    """AlexNet's convolutions, at the indices that torchvision gives them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    layers = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    try:
        tensors = load_file(weights)
        layers.load_state_dict(
            {k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")}
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"expected torchvision's alexnet in safetensors for LPIPS, got {weights} ({str(error).splitlines()[0]})"
        ) from None
    return layers.eval().requires_grad_(False)


def clip_judge(folder: Path) -> Judge:
    """The CLIP score by a model in a local folder: a hundred times the cosine of picture and prompt, at least 0.

    Raises: `ValueError` for a folder that holds no CLIP model.
    Source: Hessel et al., arXiv 2104.08718, without its factor 2.5, which tables of CLIP scores leave out.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a folder with a CLIP model, got {folder} ({str(error).split('.')[0]})") from None

    # not by torchmetrics: 1.9 expects tensors where transformers 5 gives structures
    @torch.inference_mode()
    def judge(images: Tensor, _: Tensor, prompts: Sequence[str]) -> Array:
        given = {"text": list(prompts), "images": list(_uint8(images))}
        found = model(**processor(**given, return_tensors="pt", padding=True, truncation=True))
        return torch.cosine_similarity(found.image_embeds, found.text_embeds).double().mul(100).clamp(min=0).numpy()

    return judge


def inception_features(weights: Path) -> Callable[[Tensor], Array]:
    """FID's Inception through torchmetrics: `weights` holds torch-fidelity's network in safetensors.

    Raises: `BackendUnavailable` without torch-fidelity; `ValueError` for a file that is not such a network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        with tempfile.NamedTemporaryFile(suffix=".pth") as stream:  # torch-fidelity reads its own kind of file only
            torch.save(load_file(weights), stream.name)
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], stream.name)
    except ImportError as error:
        raise BackendUnavailable(f"FID needs torch-fidelity ({error}); install it, or leave --inception out") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"expected torch-fidelity's Inception in safetensors, got {weights} ({said})") from None

    def features(images: Tensor) -> Array:
        return network(_uint8(images)).double().numpy()

    return features


def _uint8(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def features_of_folder(folder: Path, look: Callable[[Tensor], Array]) -> Array:
    """The features of all PNG and JPEG pictures in a folder.

    Raises: `ValueError` for fewer than two.
    """
    from PIL import Image

    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(files) < 2:
        raise ValueError(f"expected a folder with two pictures or more, got {len(files)} in {folder}")
    found = list[Array]()
    for file in files:
        with Image.open(file) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
        found.append(look(pixels.permute(2, 0, 1)[None].float() / 255))
    return np.concatenate(found)
