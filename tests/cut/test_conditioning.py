"""What enters the layers from outside: ControlNet, T2I-Adapter, IP-Adapter, LoRA and masks, in both passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MultiControlNetModel, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from fastcache import PartitionError, partition_unet
from fastcache.compile.lower import lower
from fastcache.cut.controlnet import shallow_controlnet
from small_unets import any_small_unet, named_example, small_controlnet, small_unet
from tiny_controls import EMBEDS, load_ip_adapter

Inputs = dict[str, Any]


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check_every_branch(unet: Any, inputs: Inputs, residuals: Inputs, fewer: Any = lambda branch_id: {}) -> None:
    """The U-Net, its full and its shallow pass agree bit for bit, and the residuals matter."""

    def given(changes: Inputs) -> Inputs:  # T2I-Adapter residuals are taken off the list that diffusers is given
        both = {**residuals, **changes}
        return inputs | {key: list(value) if isinstance(value, list) else value for key, value in both.items()}

    expected = unet(**given({})).sample
    assert not torch.equal(expected, unet(**inputs).sample)
    for branch_id in range(partition_unet(unet).num_branches):
        cut = partition_unet(unet, branch_id)
        noise_pred, feature = cut.full(**given({}))
        assert torch.equal(noise_pred, expected), branch_id
        for arguments in (given({}), given(fewer(branch_id))):
            assert torch.equal(cut.shallow(**arguments, cached_feature=feature), expected), branch_id


def control_inputs(unet: Any, controlnet: Any, **further: Any) -> tuple[Inputs, Inputs]:
    inputs = named_example(unet)
    with torch.no_grad():
        down, middle = controlnet(**inputs, controlnet_cond=randn(2, 3, 32, 32), **further, return_dict=False)
    return inputs, {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def test_controlnet_residuals() -> None:
    unet = small_unet("sd15")
    inputs, residuals = control_inputs(unet, small_controlnet())

    def fewer(branch_id: int) -> Inputs:
        used = residuals["down_block_additional_residuals"][: branch_id + 1]
        return {"down_block_additional_residuals": used, "mid_block_additional_residual": None}

    check_every_branch(unet, inputs, residuals, fewer)


def test_controlnet_residuals_of_a_video() -> None:
    unet = any_small_unet("animatediff")
    control = named_example(small_unet("sd15"), batch=6)
    with torch.no_grad():
        down, middle = small_controlnet()(**control, controlnet_cond=randn(6, 3, 32, 32), return_dict=False)
    residuals = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
    check_every_branch(unet, named_example(unet), residuals)


@pytest.mark.parametrize("missing", ["down_block_additional_residuals", "mid_block_additional_residual"])
def test_half_of_a_controlnets_residuals_is_refused(missing: str) -> None:
    unet = small_unet("sd15")
    inputs, residuals = control_inputs(unet, small_controlnet())
    del residuals[missing]
    with pytest.raises(ValueError, match="together, got one of them"):
        partition_unet(unet, 0).full(**inputs, **residuals)


def test_too_few_controlnet_residuals_are_refused() -> None:
    unet = small_unet("sd15")
    inputs, residuals = control_inputs(unet, small_controlnet())
    residuals["down_block_additional_residuals"] = residuals["down_block_additional_residuals"][:3]
    with pytest.raises(ValueError, match="for 12 skip connections, got 3"):
        partition_unet(unet, 0).full(**inputs, **residuals)
    with pytest.raises(ValueError, match="for 4 skip connections, got 3"):
        partition_unet(unet, 3).shallow(**inputs, **residuals, cached_feature=torch.zeros(2, 64, 8, 8))


ADAPTED = {  # channels and size of what a T2I-Adapter gives each block, and the middle
    "sd15": [(32, 16), (32, 8), (64, 4), (64, 2)],
    "sdxl": [(32, 8), (64, 8), (64, 4), (64, 4)],  # T2I-Adapter-XL: the last is the middle's
    "no-attention": [(32, 8), (32, 4), (64, 2), (64, 2)],
}


@pytest.mark.parametrize("name", ADAPTED)
def test_t2i_adapter_residuals(name: str) -> None:
    unet = small_unet(name)
    residuals = [randn(2, channels, size, size, seed=size) for channels, size in ADAPTED[name]]
    inputs = named_example(unet)
    check_every_branch(unet, inputs, {"down_intrablock_additional_residuals": residuals})
    check_every_branch(unet, inputs, {"down_intrablock_additional_residuals": residuals[:2]})


def test_controlnet_and_t2i_adapter_together() -> None:
    unet = small_unet("sd15")
    inputs, residuals = control_inputs(unet, small_controlnet())
    adapter = [randn(2, channels, size, size) for channels, size in ADAPTED["sd15"]]
    check_every_branch(unet, inputs, residuals | {"down_intrablock_additional_residuals": adapter})


@pytest.mark.parametrize("name", ["sd15", "animatediff"])
def test_ip_adapter(name: str) -> None:
    unet = any_small_unet(name)
    load_ip_adapter(unet)
    inputs = named_example(unet) | {"added_cond_kwargs": {"image_embeds": [randn(2, 1, EMBEDS)]}}
    check_every_branch(unet, inputs, {"added_cond_kwargs": {"image_embeds": [randn(2, 1, EMBEDS, seed=4)]}})


def test_lora_scale() -> None:
    unet = small_unet("sd15")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    scale = {"cross_attention_kwargs": {"scale": 0.3}}
    check_every_branch(unet, named_example(unet), scale)
    with pytest.raises(PartitionError, match="carry an adapter"):  # its halves would be those of the base weights
        partition_unet(unet, 0, "projected")


def test_attention_masks() -> None:
    unet = small_unet("sd15")
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    check_every_branch(unet, named_example(unet), {"encoder_attention_mask": mask})


@torch.no_grad()
def test_layers_in_half_precision_take_conditioning_in_single() -> None:
    """As in engines: the embeddings stay in float32 (`compile.lower`), and so do masks and residuals that come in."""
    unet = small_unet("sd15")
    inputs, residuals = control_inputs(unet, small_controlnet())
    inputs |= residuals | {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)}
    expected = unet(**inputs).sample
    cut = partition_unet(unet, 2)
    lower(cut, "bf16")
    noise_pred, feature = cut.full(**inputs)
    assert noise_pred.dtype == feature.dtype == torch.bfloat16
    torch.testing.assert_close(noise_pred.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert torch.equal(cut.shallow(**inputs, cached_feature=feature), noise_pred)


@pytest.mark.parametrize(
    ("changes", "further"),
    [
        ({}, {}),
        ({}, {"conditioning_scale": 0.6, "guess_mode": True}),
        ({"global_pool_conditions": True}, {"guess_mode": True}),
        ({"controlnet_conditioning_channel_order": "bgr"}, {"conditioning_scale": 0.6}),
    ],
)
@torch.no_grad()
def test_the_shallow_controlnet_gives_the_first_residuals(changes: Inputs, further: Inputs) -> None:
    controlnet = small_controlnet(**changes)
    inputs = named_example(small_unet("sd15")) | {"controlnet_cond": randn(2, 3, 32, 32)} | further
    expected, _ = controlnet(**inputs, return_dict=False)
    for branch_id in range(12):
        found = shallow_controlnet(controlnet, branch_id)(**inputs)
        assert len(found) == branch_id + 1
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=False)), branch_id


@torch.no_grad()
def test_the_shallow_controlnet_of_sdxl_and_of_classes() -> None:
    for name in ("sdxl", "class-labels"):
        unet = small_unet(name)
        controlnet = partial_controlnet(unet)
        inputs = named_example(unet) | {"controlnet_cond": randn(2, 3, 32, 32)}
        expected, _ = controlnet(**inputs, return_dict=False)
        found = shallow_controlnet(controlnet, 4)(**inputs)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected[:5], strict=True))


def partial_controlnet(unet: UNet2DConditionModel) -> Any:
    """A ControlNet of a U-Net's own configuration."""
    names = (
        "block_out_channels down_block_types transformer_layers_per_block attention_head_dim use_linear_projection "
        "addition_embed_type addition_time_embed_dim projection_class_embeddings_input_dim num_class_embeds"
    )
    config: Any = unet.config
    return small_controlnet(**{name: config[name] for name in names.split()})


@torch.no_grad()
def test_several_controlnets_are_summed() -> None:
    nets = [small_controlnet(), small_controlnet(global_pool_conditions=True)]
    several = MultiControlNetModel(nets)
    inputs = named_example(small_unet("sd15"))
    inputs |= {"controlnet_cond": [randn(2, 3, 32, 32), randn(2, 3, 32, 32, seed=4)], "conditioning_scale": [0.5, 1.0]}
    expected, _ = several(**inputs, return_dict=False)
    found = shallow_controlnet(several, 2)(**inputs)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected[:3], strict=True))


def test_the_shallow_controlnet_holds_only_what_it_runs() -> None:
    controlnet = small_controlnet()
    shallow = shallow_controlnet(controlnet, 0)
    own, all_ids = {id(p) for p in shallow.parameters()}, {id(p) for p in controlnet.parameters()}
    assert own < all_ids
    assert not own & {id(p) for p in controlnet.down_blocks.parameters()}


def test_bad_controlnets_and_branches_are_named() -> None:
    with pytest.raises(PartitionError, match="from 0 to 11 for this ControlNet"):
        shallow_controlnet(small_controlnet(), 12)
    with pytest.raises(PartitionError, match="expected a ControlNetModel, got Linear"):
        shallow_controlnet(torch.nn.Linear(1, 1), 0)
