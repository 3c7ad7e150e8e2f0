"""LoRA and IP-Adapter, loaded, scaled and taken away between two calls of a pipeline with FastCacheHelper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionPipeline

from fastcache import FastCacheHelper
from live_pipelines import add_lora, agreement_db, draw, full_calls, helped, switch
from tiny_controls import EMBEDS, load_ip_adapter

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")


def test_lora_loaded_scaled_and_unloaded(own_pipe: StableDiffusionPipeline) -> None:
    """Also on the outermost convolutions, which loading replaces."""
    pipe = own_pipe
    with helped(pipe):
        plain = draw(pipe)
        add_lora(pipe.unet, "a", "to_q", "to_v", "conv_in", "conv_out")
        styled = draw(pipe)
        assert agreement_db(styled, plain) < 40
        half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
        assert agreement_db(half, styled) < 45
        assert torch.allclose(draw(pipe, cross_attention_kwargs={"scale": 0.0}), plain, atol=1e-4)
        pipe.unet.set_adapters(["a"], [0.5])
        assert torch.allclose(draw(pipe), half, atol=1e-4)
        pipe.unet.set_adapters(["a"], [1.0])
    with helped(pipe):
        assert torch.equal(draw(pipe), styled)
    pipe.unet.delete_adapters("a")
    with helped(pipe, interval=1):
        assert torch.allclose(draw(pipe), draw(pipe), atol=1e-5)


@pytest.mark.parametrize("change", ["loaded", "scaled", "fused"])
def test_lora_changed_on_the_way(change: str, own_pipe: StableDiffusionPipeline) -> None:
    pipe = own_pipe
    add_lora(pipe.unet, "a", "to_q")

    def act(pipe: Any, tensors: dict[str, Any]) -> None:
        if change == "loaded":
            add_lora(pipe.unet, "b", "conv_in")
        elif change == "scaled":
            pipe.unet.set_adapters(["a"], [0.5])
        else:
            pipe.unet.fuse_lora()

    with helped(pipe, DeepCacheSDHelper):  # which does not notice
        assert full_calls(pipe.unet, lambda: draw(pipe)) == [0, 3, 6]
    for module in pipe.unet.modules():
        module.__dict__.pop("forward", None)
    with helped(pipe):
        assert full_calls(pipe.unet, lambda: draw(pipe, **switch(3, act))) == [0, 3, 4, 6]


def test_an_ip_adapter_loaded_and_scaled(own_pipe: StableDiffusionPipeline) -> None:
    pipe = own_pipe
    images = {"ip_adapter_image_embeds": [torch.randn(2, 1, EMBEDS, generator=torch.Generator().manual_seed(3))]}
    with helped(pipe):
        plain = draw(pipe)
        load_ip_adapter(pipe.unet)
        pipe.set_ip_adapter_scale(1.0)
        styled = draw(pipe, **images)
        assert agreement_db(styled, plain) < 40
        change = switch(3, lambda pipe, tensors: pipe.set_ip_adapter_scale(0.2))
        assert full_calls(pipe.unet, lambda: draw(pipe, **images, **change)) == [0, 3, 4, 6]
        pipe.set_ip_adapter_scale(1.0)
        assert torch.equal(draw(pipe, **images), styled)
    plain_ip = draw(pipe, **images)
    with FastCacheHelper(pipe):
        assert torch.equal(draw(pipe, **images), plain_ip)
