"""An image of the bundled model -> 64 features that say what is drawn, where, and how well, for Frechet distances.

A small network that was trained to name the attributes of rendered scenes (`tools/train_features.py`), and never saw an
image of the model that it judges.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcache.demo.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, PLACES, RADII, SHAPES

WEIGHTS = Path(__file__).parent / "features.safetensors"
WIDTH = 64

# The background, and for each place the shape, colour and size there, where one more class is nothing.
HEADS = (len(BACKGROUNDS), *[len(SHAPES) + 1, len(COLOURS) + 1, len(RADII) + 1] * len(PLACES))


class SceneNetwork(nn.Module):
    """Images -> features -> the attributes' classes. Shapes: (N, 3, 64, 64) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 96)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.SiLU()]
        side = IMAGE_SIZE // 2 ** (len(widths) - 1)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, WIDTH))
        self.heads = nn.Linear(WIDTH, sum(HEADS))
        self.mean, self.spread = nn.Buffer(torch.zeros(WIDTH)), nn.Buffer(torch.ones(WIDTH))

    def features(self, images: Tensor) -> Tensor:
        """Of mean 0 and spread 1 each over rendered scenes. Shapes: returns (N, 64)."""
        return (self.body(images * 2 - 1) - self.mean) / self.spread

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The classes' logits, an entry for each of `HEADS`."""
        return self.heads(nn.functional.silu(self.body(images * 2 - 1))).split(HEADS, dim=1)


@cache
def _network() -> SceneNetwork:
    from safetensors.torch import load_file

    network = SceneNetwork().eval().requires_grad_(False)
    network.load_state_dict(load_file(WEIGHTS))
    return network


@torch.inference_mode()
def scene_features(images: Tensor) -> Tensor:
    """The features of images in [0, 1]. Shapes: `images` (N, 3, 64, 64); returns (N, 64)."""
    if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"expected images of shape [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], as the bundled model draws, "
            f"got {list(images.shape)}"
        )
    return _network().features(images.float().cpu())
