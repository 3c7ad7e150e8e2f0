"""Train the scene network for Frechet distances: python tools/train_features.py (about three minutes on one core).

The network (`fastcache/demo/features.py`) learns to name what stands at each place of a rendered scene, through noise,
blur and shifts of brightness, so that its features tell clean images from spoiled ones instead of ignoring the damage.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from train_demo import describe_targets, pictures, take

from fastcache.demo.features import WEIGHTS, SceneNetwork
from fastcache.demo.scenes import held_out_scenes


def main(
    output: Annotated[Path, typer.Option(help="The weights' file.")] = WEIGHTS,
    iterations: int = 3000,
    batch: int = 64,
) -> None:
    """Train, measure on held-out scenes, write the weights in float16."""
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    scenes = take(rng, 20000)
    images, targets = pictures(scenes, rng), describe_targets(scenes)
    network = SceneNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=iterations)
    start = time.monotonic()
    for i in range(1, iterations + 1):
        rows = torch.randint(len(images), (batch,))
        logits = network(spoiled(images[rows].float() / 255))
        losses = [functional.cross_entropy(part, targets[rows, k]) for k, part in enumerate(logits)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if i % 250 == 0:
            typer.echo(f"{i:5d}  loss {loss.item():.4f}  {time.monotonic() - start:.0f} s", err=True)
    with torch.no_grad():
        found = network.features(images[:4000].float() / 255)
    network.mean.copy_(found.mean(0))
    network.spread.copy_(found.std(0))
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, output)
    held_out = held_out_scenes(1000)
    with torch.no_grad():
        logits = network(pictures(held_out, rng).float() / 255)
    wanted = describe_targets(held_out)
    right = torch.stack([part.argmax(1) == wanted[:, k] for k, part in enumerate(logits)]).all(0).float().mean()
    typer.echo(f"{output}: {output.stat().st_size} bytes; {right:.1%} of 1000 held-out scenes read without a mistake")


def spoiled(images: Tensor) -> Tensor:
    """Half of the images with noise of up to a tenth of the range, some of them blurred."""
    strength = 0.1 * torch.rand(len(images), 1, 1, 1) * (torch.rand(len(images), 1, 1, 1) < 0.5)
    blurred = functional.avg_pool2d(images, 3, stride=1, padding=1)
    blur = (torch.rand(len(images), 1, 1, 1) < 0.2).float()
    return (torch.lerp(images, blurred, blur) + strength * torch.randn_like(images)).clamp(0, 1)


if __name__ == "__main__":
    typer.run(main)
