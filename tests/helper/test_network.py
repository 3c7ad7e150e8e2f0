"""What changes in a U-Net between two steps is noticed: the step is FULL, or refused where engines stand in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from fastcache import Bundle, FastCacheHelper
from fastcache.demo import MODEL_DIRECTORY
from fastcache.helper.network import NetworkWatch, fingerprint
from live_pipelines import add_lora, draw, full_calls, helped, switch
from repeats import mostly_slow

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

Change = Callable[[Any], object]


def other_weights(unet: Any) -> None:
    unet.load_state_dict({name: value * 1.5 for name, value in unet.state_dict().items()})


def write_in_place(unet: Any) -> None:
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.bias[3] += 1.0


def write_in_inference_mode(unet: Any) -> None:
    with torch.inference_mode():
        unet.conv_out.bias.mul_(2.0)


def replace_parameter(unet: Any) -> None:
    unet.conv_out.bias = nn.Parameter(torch.ones(4))


def replace_module(unet: Any) -> None:
    unet.mid_block.resnets[0].nonlinearity = nn.ReLU()


def free_u(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def one_processor(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = AttnProcessor()


def fuse_lora(unet: Any) -> None:
    add_lora(unet, "a", "to_q")
    unet.fuse_lora()


def lora_come_and_gone(unet: Any) -> None:
    fuse_lora(unet)
    unet.unload_lora()


def write_data(unet: Any) -> None:
    unet.conv_out.weight.data.mul_(1.5)


def replace_data(unet: Any) -> None:
    unet.conv_out.weight.data = torch.zeros_like(unet.conv_out.weight)


def another_class(unet: Any) -> None:
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = type("Merging", (type(block),), {})


# What a step sees, and in which word; and what is written behind PyTorch's back, which a run's first step sees.
AT_ONCE: list[tuple[Change, str]] = [
    (other_weights, "other weights"),
    (write_in_place, "other weights"),
    (write_in_inference_mode, "other weights"),
    (replace_parameter, "other parameters"),
    (replace_module, "other modules"),
    (lambda unet: add_lora(unet, "a", "conv_out"), "LoRA"),
    (fuse_lora, "LoRA"),
    (free_u, "FreeU"),
    (one_processor, "attention processors"),
    (lambda unet: unet.train(), "training"),
    (lambda unet: unet.to(torch.bfloat16), "dtype"),
]
AT_A_RUN: list[Change] = [lora_come_and_gone, write_data, replace_data, another_class]


def after(step: int, change: Change) -> dict[str, Any]:
    def act(pipe: Any, tensors: dict[str, Any]) -> None:
        change(pipe.unet)

    return switch(step, act)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(MODEL_DIRECTORY, subfolder="unet")


@pytest.mark.parametrize(("change", "word"), AT_ONCE)
def test_what_a_step_sees(change: Change, word: str, unet: Any) -> None:
    watch = NetworkWatch(unet)
    unet.register_forward_hook(lambda *_: None)  # which changes nothing of it
    assert watch.change() is None
    change(unet)
    assert word.removeprefix("other ") in str(watch.change())
    assert NetworkWatch(unet).change() is None


@pytest.mark.parametrize("change", AT_A_RUN)
def test_what_a_run_sees(change: Change, unet: Any) -> None:
    watch, before = NetworkWatch(unet), fingerprint(unet)
    assert fingerprint(unet) == before
    change(unet)
    assert watch.change() is None  # if a step ever sees it, this list and the docstring are to be changed
    assert fingerprint(unet) != before


def test_what_is_undone_or_moved_is_no_change(unet: Any) -> None:
    watch, before = NetworkWatch(unet), fingerprint(unet)
    free_u(unet)
    unet.disable_freeu()
    add_lora(unet, "a", "to_q")
    assert watch.change() is not None
    unet.unload_lora()
    unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(dict(unet.attn_processors))
    assert watch.change() is None
    assert fingerprint(unet) == before


def test_weights_of_every_type_have_a_fingerprint() -> None:
    network = nn.ParameterList(
        torch.nn.Parameter(weight, requires_grad=False)
        for weight in (
            torch.tensor(1.0),
            torch.empty(0, 3),
            torch.full((3, 2), torch.nan, dtype=torch.bfloat16),
            torch.ones(20, 3, 3, 3, dtype=torch.float8_e4m3fn),
            torch.ones(5, dtype=torch.int8),
            torch.ones(2, device="meta"),
        )
    )
    before = fingerprint(network)
    assert fingerprint(network) == before
    network[4][0] = 2
    assert fingerprint(network) != before


@pytest.mark.parametrize(("change", "word"), AT_ONCE[:9])
def test_a_changed_network_makes_the_step_full(change: Change, word: str, own_pipe: StableDiffusionPipeline) -> None:
    with helped(own_pipe):
        if change is free_u:
            with pytest.raises(ValueError, match="FreeU"):
                draw(own_pipe, **after(3, change))
            return
        assert full_calls(own_pipe.unet, lambda: draw(own_pipe)) == [0, 3, 6]
        assert full_calls(own_pipe.unet, lambda: draw(own_pipe, **after(3, change))) in ([0, 3, 4, 6], [0, 3])
        drawn = draw(own_pipe)
    with helped(own_pipe):
        assert torch.equal(draw(own_pipe), drawn)


def test_weights_that_come_and_go_are_no_change(own_pipe: StableDiffusionPipeline) -> None:
    """Accelerate's offload puts others in their place for each call."""
    from accelerate import cpu_offload

    cpu_offload(own_pipe.unet, execution_device="cpu")
    with helped(own_pipe):
        assert full_calls(own_pipe.unet, lambda: draw(own_pipe)) == [0, 3, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "computed"), [(torch.bfloat16, torch.float32), (torch.float8_e4m3fn, torch.bfloat16)]
)
def test_weights_that_are_cast_for_each_call_are_no_change(
    stored: torch.dtype, computed: torch.dtype, own_pipe: StableDiffusionPipeline
) -> None:
    """Layers compute in another dtype than the one that their weights are stored in."""
    own_pipe.to(computed)
    own_pipe.unet.enable_layerwise_casting(storage_dtype=stored, compute_dtype=computed)
    plain = draw(own_pipe)
    with helped(own_pipe, interval=1):
        assert torch.equal(draw(own_pipe), plain)
    with helped(own_pipe):
        assert full_calls(own_pipe.unet, lambda: draw(own_pipe)) == [0, 3, 6]


QUICK = ("write_in_place", "fuse_lora", "free_u", "replace_module", "lora_come_and_gone")
EVERY = [*AT_ONCE, *((change, "weights or classes") for change in AT_A_RUN)]


@pytest.mark.parametrize(("change", "word"), mostly_slow(EVERY, lambda case: case[0].__name__ in QUICK))
def test_engines_refuse_a_changed_network(
    change: Change, word: str, demo_bundle: Callable[[int], Bundle], native_pipe: StableDiffusionPipeline
) -> None:
    """Between two pictures, and again until it is undone or enabled anew; where a step sees it, between two steps."""
    pipe, bundle = native_pipe, demo_bundle(0)
    if word == "dtype":
        pytest.skip("a pipeline of two dtypes does not run")
    helper, changed = FastCacheHelper(pipe, engines=bundle), after(3, change)
    helper.set_params(cache_interval=3)
    with helper:
        before = draw(pipe)
        assert torch.equal(draw(pipe), before)
        if word in dict(AT_ONCE).values():
            with pytest.raises(ValueError, match=word) as refused:
                draw(pipe, **changed)
        else:
            change(pipe.unet)
        for _ in range(2):
            with pytest.raises(ValueError, match=word) as refused:
                draw(pipe)
            assert "\n" not in str(refused.value)
            assert "without engines" in str(refused.value)
    if change in (one_processor, another_class):  # the same numbers all the same
        with helper:
            assert torch.equal(draw(pipe), before)
    elif word != "training" and change not in (write_in_place, replace_module, write_in_inference_mode):
        with pytest.raises(ValueError, match="from which it differs"):
            helper.enable()


def test_engines_go_on_where_a_change_is_undone(
    demo_bundle: Callable[[int], Bundle], native_pipe: StableDiffusionPipeline
) -> None:
    pipe = native_pipe
    with FastCacheHelper(pipe, engines=demo_bundle(0)):
        before = draw(pipe)
        free_u(pipe.unet)
        with pytest.raises(ValueError, match="FreeU"):
            draw(pipe)
        pipe.disable_freeu()
        assert torch.equal(draw(pipe), before)
