"""A pipeline or its U-Net copied, pickled or exchanged while FastCacheHelper is enabled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from fastcache import Bundle, FastCacheHelper
from live_pipelines import add_lora, draw, full_calls, helped
from repeats import mostly_slow

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")


def through_torch(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own)), through_torch]


def blank(unet: Any) -> None:
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()


@pytest.mark.parametrize("copied", mostly_slow(COPIES, lambda copied: copied is copy.deepcopy))
def test_a_copied_pipeline_is_a_plain_one(copied: Callable[[Any], Any], pipe: StableDiffusionPipeline) -> None:
    plain = draw(pipe)
    with helped(pipe):
        drawn = draw(pipe)
        other = copied(pipe)
        assert type(other) is StableDiffusionPipeline
        assert type(other.unet) is UNet2DConditionModel
        assert torch.equal(draw(other), plain)
        with helped(other):
            assert torch.equal(draw(other), drawn)
        blank(other.unet)
        assert not torch.equal(draw(other), plain)
        assert torch.equal(draw(pipe), drawn)


@pytest.mark.parametrize("copied", [*COPIES, copy.copy])
def test_a_copied_unet_is_the_plain_one(copied: Callable[[Any], Any], own_pipe: StableDiffusionPipeline) -> None:
    unet: Any = own_pipe.unet
    add_lora(unet, "a", "to_q")
    with helped(own_pipe):
        other = copied(own_pipe.unet)
    assert type(other) is type(unet)
    assert other.config == unet.config
    assert other.peft_config.keys() == {"a"}
    state: dict[str, Tensor] = unet.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_a_copy_leaves_accelerates_hooks_behind(own_pipe: StableDiffusionPipeline) -> None:
    """They call the U-Net that they were put on."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    plain = draw(own_pipe)
    with helped(own_pipe):
        add_hook_to_module(own_pipe.unet, ModelHook())
        other = copy.deepcopy(own_pipe)
        assert torch.equal(draw(other), plain)
        blank(other.unet)
        assert not torch.equal(draw(other), plain)


def test_a_copied_helper_is_not_enabled(pipe: StableDiffusionPipeline) -> None:
    with helped(pipe) as helper:
        drawn = draw(pipe)
        other = copy.deepcopy(helper)
        assert not other.enabled
        other.enable()
        assert full_calls(other.pipe.unet, lambda: draw(other.pipe)) == [0, 3, 6]
        with pytest.raises(ValueError, match="another has enabled"):
            copy.copy(helper).enable()
        assert helper.enabled
        assert torch.equal(draw(pipe), drawn)


@pytest.mark.slow
def test_a_copied_helper_with_engines(
    demo_bundle: Callable[[int], Bundle], native_pipe: StableDiffusionPipeline
) -> None:
    with FastCacheHelper(native_pipe, engines=demo_bundle(0)) as helper:
        drawn = draw(native_pipe)
        other = copy.deepcopy(helper)
        with other:
            assert torch.equal(draw(other.pipe), drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_unet_is_refused_while_enabled(dtype: torch.dtype, own_pipe: StableDiffusionPipeline) -> None:
    kind, unet = type(own_pipe), own_pipe.unet
    other = copy.deepcopy(unet).to(dtype)
    with helped(own_pipe) as helper:
        with pytest.raises(ValueError, match=r"^expected unet to be left alone [^\n]*disable it first") as refused:
            own_pipe.unet = other
        assert "UNet2DConditionModel" in str(refused.value)
        with pytest.raises(ValueError, match="left alone"):
            own_pipe.register_modules(unet=nn.Identity())
        own_pipe.unet = own_pipe.unet.eval()  # the very same
        own_pipe.vae = own_pipe.vae
        assert helper.enabled
        assert full_calls(own_pipe.unet, lambda: draw(own_pipe)) == [0, 3, 6]
        helper.disable()
        assert own_pipe.unet is unet
        own_pipe.unet = other
        helper.enable()
    assert own_pipe.unet is other
    assert type(own_pipe) is kind
