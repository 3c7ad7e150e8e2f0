"""tools/train_demo.py: true pictures near drawn ones, how round circles are, and a VAE made deeper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import train_demo

from fastcache.demo.scenes import Object, Scene, held_out_scenes, outlines, render, render_at


@pytest.mark.parametrize("scene", held_out_scenes(6), ids=Scene.caption)
def test_the_nearest_true_picture_of_a_render_is_that_render(scene: Scene) -> None:
    image = render(scene, np.random.default_rng(3))
    found = train_demo.nearest_render(image, scene)
    assert np.abs(found.astype(int) - image).max() <= 2
    assert np.abs(render_at(scene, outlines(scene)) - image).max() > 20  # which is not what the search starts from


def test_only_an_uneven_circle_is_uneven() -> None:
    scene = Scene((Object("large", "red", "circle", "left"), Object("small", "blue", "square", "right")), "white")
    image = render(scene, np.random.default_rng(0))
    (round_one,) = train_demo.unevenness(image, scene)
    assert round_one < 0.06
    dented = image.copy()
    dented[:24, :32] = 255  # the top of the circle is cut off
    (uneven,) = train_demo.unevenness(dented, scene)
    assert uneven > 0.5
    assert train_demo.unevenness(np.full_like(image, 255), scene) == []


def test_a_vae_made_deeper_computes_the_same() -> None:
    torch.manual_seed(0)
    vae = train_demo.build_vae()
    deep = train_demo.deepened(vae)
    assert sum(p.numel() for p in deep.parameters()) > sum(p.numel() for p in vae.parameters())
    with torch.no_grad():
        z, x = torch.randn(1, 4, 16, 16), torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(deep.decode(z).sample, vae.decode(z).sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            deep.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode(), rtol=1e-4, atol=1e-4
        )
