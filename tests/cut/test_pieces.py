"""A U-Net as a chain of pieces computes bit for bit what the U-Net does, and with a residual reused what it would."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from fastcache import PartitionError, partition_blocks
from fastcache.cut.chain import neutral, residual
from fastcache.cut.names import BlockKind, pattern_of, pattern_pass
from fastcache.cut.pieces import BlockUNet
from small_unets import CONFIGS, OTHERS, any_small_unet, named_example, small_controlnet, small_unet

TRANSFORMERS = {"sd15": 16, "sdxl": 11, "two-blocks": 6, "no-attention": 0, "self-attention": 1, "ddpm": 0}


def randomly(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kinds", [("transformer",), ("resnet", "transformer")])
@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
@torch.no_grad()
def test_all_pieces_in_turn_equal_the_unet(name: str, kinds: tuple[BlockKind, ...]) -> None:
    unet = any_small_unet(name)
    inputs = named_example(unet)
    expected = unet(**inputs).sample
    chain = partition_blocks(unet, kinds, (1, 0))
    noise_pred, stored = chain(**inputs)
    assert torch.equal(noise_pred, expected)
    assert [*stored] == ["cached_feature", "cached_feature_0", *(residual(block.index) for block in chain.blocks)]
    for reused in ("cached_feature", "cached_feature_0", [residual(block.index) for block in chain.blocks]):
        names = [reused] if isinstance(reused, str) else reused
        again, others = chain(**inputs, reuse={name: stored[name] for name in names})
        assert torch.equal(again, expected), names
        assert not set(names) & set(others)
        assert all(torch.equal(value, stored[name]) for name, value in others.items())


@pytest.mark.parametrize(("name", "count"), TRANSFORMERS.items())
def test_every_spatial_transformer_is_a_block(name: str, count: int) -> None:
    assert len(partition_blocks(any_small_unet(name)).blocks) == count


@pytest.mark.parametrize(("height", "width"), [(18, 22), (15, 17)])
@torch.no_grad()
def test_sizes_that_do_not_halve_evenly(height: int, width: int) -> None:
    unet = small_unet("sd15")
    inputs = named_example(unet, height=height, width=width)
    noise_pred, stored = partition_blocks(unet, ("transformer", "resnet"), (2,))(**inputs)
    assert torch.equal(noise_pred, unet(**inputs).sample)
    assert torch.equal(partition_blocks(unet, branch_ids=(2,))(**inputs, reuse=_feature(stored))[0], noise_pred)


def _feature(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"cached_feature": stored["cached_feature"]}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd21"])
@torch.no_grad()
def test_reuse_is_what_hooks_on_the_plain_unet_give(name: str) -> None:
    """Every third transformer's output is its input and a random tensor, scaled and shifted by channel."""
    unet = small_unet(name)
    inputs = named_example(unet)
    chain = partition_blocks(unet)
    _, stored = chain(**inputs)
    reuse = {residual(k): randomly(*stored[residual(k)].shape) for k in range(0, len(chain.blocks), 3)}
    adjustment = neutral(2, chain.channels) + 0.3 * randomly(2, 2, chain.channels)
    got, found = chain(**inputs, reuse=reuse, scale_shift=adjustment)
    assert not set(found) & set(reuse)
    expected = _hooked(unet, inputs, chain, reuse, adjustment)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, chain(**inputs, reuse=reuse)[0], atol=1e-3)


def _hooked(
    unet: Any, inputs: dict[str, Any], chain: BlockUNet, reuse: dict[str, Tensor], adjustment: Tensor
) -> Tensor:
    found = [module for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) for module in block.modules()]
    transformers = [module for module in found if isinstance(module, Transformer2DModel)]
    first = 0
    with ExitStack() as hooks:
        for index, (transformer, block) in enumerate(zip(transformers, chain.blocks, strict=True)):
            channels = slice(first, first := first + block.branch.channels)
            scale, shift = adjustment[:, 0, channels, None, None], adjustment[:, 1, channels, None, None]

            def give(module: Any, given: Any, out: Any, k: int = index, a: Tensor = scale, b: Tensor = shift) -> Any:
                added = reuse.get(residual(k), out[0] - given[0])
                return (given[0] + a * added + b,)

            hooks.callback(transformer.register_forward_hook(give).remove)
        return unet(**inputs).sample


@torch.no_grad()
def test_networks_beside_the_unet_are_heard() -> None:
    unet, controlnet = small_unet("sd15"), small_controlnet()
    assert isinstance(controlnet, ControlNetModel)
    inputs = named_example(unet)
    down, middle = controlnet(**inputs, controlnet_cond=randomly(2, 3, 32, 32), return_dict=False)
    adapters = [randomly(2, *shape) for shape in ((32, 16, 16), (32, 8, 8), (64, 4, 4), (64, 2, 2))]
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    intra = {"down_intrablock_additional_residuals": adapters}
    for given in (added, intra):
        expected = unet(
            **inputs, **{name: [*value] if isinstance(value, list) else value for name, value in given.items()}
        )
        assert torch.equal(partition_blocks(unet)(**inputs, **given)[0], expected.sample)


def test_bad_arguments_say_what_was_expected() -> None:
    unet = small_unet("sd15")
    with pytest.raises(PartitionError, match="expected a branch_id from 0 to 11"):
        partition_blocks(unet, branch_ids=(12,))
    with pytest.raises(ValueError, match="expected kinds of blocks out of transformer, resnet, got attention"):
        partition_blocks(unet, ("attention",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"expected to reuse cached_feature, .*, got residual_16; take what a call returned"
    ):
        partition_blocks(unet)(**named_example(unet), reuse={"residual_16": randomly(1)})


def test_patterns_have_names() -> None:
    assert pattern_pass([True, False, True]) == "blocks-101"
    assert pattern_pass([True, True]) == "full"
    assert pattern_of("blocks-101", 3) == (True, False, True)
    assert pattern_of("full", 2) == (True, True)
    assert [pattern_of(name, 2) for name in ("blocks-101", "shallow-0", "blocks-12")] == [None, None, None]
