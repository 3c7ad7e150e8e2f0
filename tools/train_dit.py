"""Train the small diffusion transformer that `fastcache analyze --dit` measures: python tools/train_dit.py --output DIR

It learns v-prediction on the latents of scenes with one object, in the bundled model's VAE and on its noise schedule,
told the object's colour and shape by class.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from train_demo import Log, encode_images, pictures, schedule, v_prediction_scheduler

from fastcache.analysis.dit import LATENT_SHAPE, build_dit, class_of
from fastcache.demo import MODEL_DIRECTORY
from fastcache.demo.scenes import Scene, training_scenes


def one_object_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    scenes = (scene for scene in training_scenes(rng) if len(scene.objects) == 1)
    return [scene for scene, _ in zip(scenes, range(count), strict=False)]


def train(iterations: int, batch: int, images: int, output: Path) -> None:
    """Save the running average of the weights now and then, in half precision."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = AutoencoderKL.from_pretrained(MODEL_DIRECTORY / "vae", torch_dtype=torch.float32).requires_grad_(False)
    scenes = one_object_scenes(rng, images)
    latents = torch.cat([encode_images(vae, pictures(scenes[k : k + 256], rng)) for k in range(0, images, 256)])
    labels = torch.tensor([class_of(scene) for scene in scenes])
    model = build_dit().train()  # in training, diffusers drops one label in ten by itself
    average = copy.deepcopy(model).requires_grad_(False)
    typer.echo(f"dit: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", err=True)
    alphas = v_prediction_scheduler().alphas_cumprod
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    rate, log = schedule(optimizer, iterations, warmup=200), Log("dit", 50)
    for i in range(1, iterations + 1):
        rows, t = torch.randint(images, (batch,)), torch.randint(1000, (batch,))
        x, noise = latents[rows], torch.randn(batch, *LATENT_SHAPE)
        a, b = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        v = model(a * x + b * noise, t, labels[rows], return_dict=False)[0]
        loss = F.mse_loss(v, a * noise - b * x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        decay = min(0.998, (1 + i) / (10 + i))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        log(i, loss.item())
        if i % 250 == 0 or i == iterations:
            copy.deepcopy(average).half().save_pretrained(output)


def main(
    output: Annotated[Path, typer.Option(help="Where the trained transformer goes.")],
    iterations: int = 3000,
    batch: int = 64,
    images: Annotated[int, typer.Option(help="Different scenes to learn from.")] = 20000,
    threads: int = 0,
) -> None:
    """Train the transformer and save it."""
    if threads:
        torch.set_num_threads(threads)
    train(iterations, batch, images, output)


if __name__ == "__main__":
    typer.run(main)
