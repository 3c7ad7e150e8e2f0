"""A U-Net -> a chain of pieces, cut where a block's residual may be reused in place of running the block.

A block is the residual branch of a spatial transformer, or on request of a resnet: what it adds to its input. Between
two blocks lies a trunk, which runs on every call. Further joints let a shallow pass of DeepCache leave the chain and
enter it again. All pieces in turn compute bit for bit what the U-Net does. Knows nothing about steps, plans or engines.
Source: Block Caching, arXiv 2312.03209, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from fastcache.cut.chain import ADJUSTMENT, residual, run_order
from fastcache.cut.names import BlockKind
from fastcache.cut.project import SecondHalf
from fastcache.cut.signals import Signals, Steered
from fastcache.cut.unet import Layer, Middle, UNetParts, check_branches, take_apart

Values = Mapping[str, Tensor]  # what lies between pieces, by name
Sizes = Mapping[int, torch.Size]  # of skip connections, where upsamplers must be told


def hidden(block: int) -> str:
    """The name of a block's input."""
    return f"hidden_{block}"


def skip(index: int) -> str:
    """The name of a skip connection."""
    return f"skip_{index}"


def feature(branch_id: int, primary: int) -> str:
    """The name of the feature that DeepCache's cut at a branch caches."""
    return "cached_feature" if branch_id == primary else f"cached_feature_{branch_id}"


class TransformerBlock(nn.Module):
    """The residual branch of a spatial transformer. Shapes: (N, C, H, W) -> the same."""

    def __init__(self, transformer: Transformer2DModel) -> None:
        super().__init__()
        model: Any = transformer
        self.norm, self.proj_in, self.proj_out = model.norm, model.proj_in, model.proj_out
        self.transformer_blocks = model.transformer_blocks
        self._linear: bool = model.use_linear_projection

    @property
    def channels(self) -> int:
        return self.norm.num_channels

    def forward(self, x: Tensor, signals: Signals) -> Tensor:
        n, _, height, width = x.shape
        h = self.norm(x)
        h = _tokens(h) if self._linear else _tokens(self.proj_in(h))
        h = self.proj_in(h) if self._linear else h
        for block in self.transformer_blocks:
            h = block(h, encoder_hidden_states=signals.context, **signals.attention)
        h = self.proj_out(h) if self._linear else h
        h = h.reshape(n, height, width, -1).permute(0, 3, 1, 2).contiguous()
        return h if self._linear else self.proj_out(h)


def _tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[2] * x.shape[3], x.shape[1])


class ResnetBlock(SecondHalf):
    """The residual branch of a resnet that keeps its size. Shapes: (N, C, H, W) -> (N, C_out, H, W)."""

    def __init__(self, resnet: ResnetBlock2D) -> None:
        super().__init__(resnet)
        model: Any = resnet
        self.first_norm, self.first_conv = model.norm1, model.conv1

    @property
    def channels(self) -> int:
        return self.conv.out_channels

    def forward(self, x: Tensor, signals: Signals) -> Tensor:
        return self._transform(self.first_conv(self.act(self.first_norm(x))), signals.temb)


class Block(nn.Module):
    """What may be left out: the residual branch of one module. `place` says where in the U-Net that stands."""

    def __init__(self, index: int, place: str, branch: TransformerBlock | ResnetBlock) -> None:
        super().__init__()
        self.index, self.place, self.branch = index, place, branch
        self.takes, self.gives = (hidden(index),), (residual(index),)

    @property
    def kind(self) -> BlockKind:
        return "resnet" if isinstance(self.branch, ResnetBlock) else "transformer"

    def forward(self, values: Values, signals: Signals, sizes: Sizes | None = None) -> tuple[Tensor, ...]:
        return (self.branch(values[hidden(self.index)], signals),)


class Sum(nn.Module):
    """A block's input and its residual -> what the block's module gives.

    With `scale_shift` among the values the residual is first scaled and shifted channel by channel, in `channels`.
    """

    def __init__(self, block: Block, first: int, shortcut: nn.Module | None, divisor: float) -> None:
        super().__init__()
        self.name, self.shortcut, self._divisor = residual(block.index), shortcut, divisor
        self.channels = slice(first, first + block.branch.channels)
        self._of_transformer = block.kind == "transformer"

    def forward(self, x: Tensor, values: Values) -> Tensor:
        added = values[self.name]
        if (adjustment := values.get(ADJUSTMENT)) is not None:
            scale, shift = adjustment[:, :, self.channels, None, None].to(added.dtype).unbind(1)
            added = added * scale + shift
        if self._of_transformer:  # operands in diffusers' order, which decides on the sum's memory layout
            return added + x
        return ((x if self.shortcut is None else self.shortcut(x)) + added) / self._divisor


@dataclass(frozen=True)
class Part:
    """One thing that a trunk does: join a skip connection, then run a layer, then add a value that it is given, if any.

    Its result is skip connection `makes`. `sized` is the one whose size the layer's upsampler may have to give back.
    """

    layer: nn.Module | None = None
    joins: int | None = None
    makes: int | None = None
    adds: str | None = None
    sized: int | None = None


class Trunk(nn.Module):
    """What runs on every call, between two joints of the chain: from the value `enters` to the value `leaves`.

    Where it follows a block it begins with that block's sum.
    """

    def __init__(self, enters: str, entry: Sum | None, parts: Sequence[Part], leaves: str) -> None:
        super().__init__()
        self.enters, self.entry, self.leaves, self.parts = enters, entry, leaves, tuple(parts)
        self.layers = nn.ModuleList([part.layer for part in parts if part.layer is not None])
        made = [skip(part.makes) for part in parts if part.makes is not None]
        joined = [skip(part.joins) for part in parts if part.joins is not None]
        given: list[str] = [enters, *([] if entry is None else [entry.name]), *joined]
        self.takes: tuple[str, ...] = tuple(name for name in dict.fromkeys(given) if name not in made)
        left: list[str] = [*(name for name in made if name not in joined), leaves]
        self.gives: tuple[str, ...] = tuple(dict.fromkeys(left))

    def forward(self, values: Values, signals: Signals, sizes: Sizes | None = None) -> tuple[Tensor, ...]:
        h, made = values[self.enters], dict[str, Tensor]()
        if self.entry is not None:
            h = self.entry(h, values)
        for part in self.parts:
            if part.joins is not None:
                name = skip(part.joins)
                joined, control = made.get(name, values.get(name)), values.get(f"control_{part.joins}")
                h = torch.cat([h, _plus(joined, control)], dim=1)
            if isinstance(part.layer, Layer):
                h = part.layer(h, signals, sizes[part.sized] if sizes and part.sized is not None else None)
            elif part.layer is not None:
                h = part.layer(h, signals) if isinstance(part.layer, Middle) else part.layer(h)
            h = _plus(h, values.get(part.adds) if part.adds is not None else None)
            if part.makes is not None:
                made[skip(part.makes)] = h
        return tuple(h if name == self.leaves else made[name] for name in self.gives)


def _plus(x: Any, added: Tensor | None) -> Tensor:
    return x if added is None else x + added.to(x.dtype)


Piece = Trunk | Block


class _Chain:
    """Puts pieces together, in the order in which the U-Net runs them."""

    def __init__(self, parts: UNetParts, kinds: Iterable[BlockKind], branch_ids: Sequence[int]) -> None:
        self._kinds, self._branch_ids = frozenset(kinds), branch_ids
        self.pieces, self.blocks, self._channels = list[Piece](), list[Block](), 0
        self._enters, self._entry, self._parts = skip(0), None, list[Part]()
        for index, layer in enumerate(parts.down):
            self._layer(layer, f"down.{index}")
            self._parts.append(Part(makes=index + 1, adds=f"adapter_{index}" if index in parts.adapted else None))
            if index + 1 in branch_ids:
                self._joint(skip(index + 1))
        self._middle(parts.middle)
        self._parts.append(Part(adds="control_middle"))
        for index, layer in enumerate(parts.up):
            joins = parts.num_skips - 1 - index
            if joins in branch_ids:
                self._joint(feature(joins, branch_ids[0]))
            self._parts.append(Part(joins=joins))
            self._layer(layer, f"up.{index}", sized=joins - 1 if joins else None)
        self._parts.append(Part(layer=parts.head))
        self._joint("noise_pred")

    def _joint(self, leaves: str) -> None:
        """End the trunk at hand; another may go on where it leaves off."""
        self.pieces.append(Trunk(self._enters, self._entry, self._parts, leaves))
        self._enters, self._entry, self._parts = leaves, None, []

    def _middle(self, middle: Middle) -> None:
        block: Any = middle.block
        if not isinstance(block, UNetMidBlock2DCrossAttn):
            self._parts.append(Part(layer=middle))
            return
        first, *resnets = block.resnets
        self._layer(Layer(resnet=first), "middle.0")
        for index, (attention, resnet) in enumerate(zip(block.attentions, resnets, strict=True), 1):
            self._layer(Layer(attention=attention), f"middle.{index}")
            self._layer(Layer(resnet=resnet), f"middle.{index}")

    def _layer(self, layer: Layer, place: str, sized: int | None = None) -> None:
        resnet: Any = layer.resnet
        if "resnet" in self._kinds and _keeps_size(resnet):
            self._block(f"{place}.resnet", ResnetBlock(resnet), resnet.conv_shortcut, resnet.output_scale_factor)
        elif resnet is not None:
            self._parts.append(Part(layer=Layer(resnet=resnet)))
        attention: Any = layer.attention
        if "transformer" in self._kinds and _is_spatial(attention):
            self._block(f"{place}.attention", TransformerBlock(attention))
        elif attention is not None:
            self._parts.append(Part(layer=Layer(attention=attention)))
        if layer.motion is not None or layer.resampler is not None:
            rest = Layer(motion=layer.motion, resampler=layer.resampler)
            self._parts.append(Part(layer=rest, sized=None if layer.resampler is None else sized))

    def _block(
        self, place: str, branch: TransformerBlock | ResnetBlock, shortcut: Any = None, divisor: float = 1.0
    ) -> None:
        block = Block(len(self.blocks), place, branch)
        self._joint(hidden(block.index))
        self.pieces.append(block)
        self.blocks.append(block)
        self._entry = Sum(block, self._channels, shortcut, divisor)
        self._channels += branch.channels


def _is_spatial(attention: Any) -> bool:
    return isinstance(attention, Transformer2DModel) and attention.is_input_continuous


def _keeps_size(resnet: Any) -> bool:
    plain = isinstance(resnet, ResnetBlock2D) and resnet.upsample is None and resnet.downsample is None
    return plain and resnet.time_embedding_norm in ("default", "scale_shift")


class BlockUNet(nn.Module):
    """A U-Net as a chain of pieces over its own weights, and what is reused of an earlier call.

    `chain` are the pieces after the embeddings, in turn, `blocks` those among them that may be left out.
    """

    def __init__(self, parts: UNetParts, kinds: Iterable[BlockKind], branch_ids: Sequence[int]) -> None:
        super().__init__()
        self.embeddings, self.conv_in = parts.embeddings, parts.conv_in
        chain = _Chain(parts, kinds, branch_ids)
        self.chain, self.blocks = nn.ModuleList(chain.pieces), tuple(chain.blocks)
        self.features = tuple(feature(branch_id, branch_ids[0]) for branch_id in branch_ids)
        self._adapted, self.skips = parts.adapted, range(parts.num_skips)
        self._up_factor = 2 ** sum(layer.resampler is not None for layer in parts.up)

    @property
    def channels(self) -> int:
        """Of all blocks together."""
        return sum(block.branch.channels for block in self.blocks)

    @property
    def known(self) -> tuple[str, ...]:
        """What a call computes that another may reuse."""
        return (*self.features, *(name for block in self.blocks for name in block.gives))

    def enter(self, sample: Tensor, timestep: Tensor, text: Tensor | None, conditioning: Any) -> tuple[Tensor, Signals]:
        """Skip connection 0, and what every piece receives, in the dtype of the layers."""
        sample, signals = self.embeddings.enter(get_parameter_dtype(self.conv_in), sample, timestep, text, conditioning)
        return self.conv_in(sample), signals

    def needs_sizes(self, first_skip: Tensor) -> bool:
        """Whether upsamplers must be told what to double back to, as in diffusers."""
        return any(n % self._up_factor for n in first_skip.shape[-2:])

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        reuse: Values | None = None,
        scale_shift: Tensor | None = None,
        **conditioning: Unpack[Steered],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run what is not reused. Returns `noise_pred`, and by name what this call computed that another may reuse.

        `reuse` are such values of an earlier call: `residual_3` leaves block 3 out, `cached_feature` all that lies
        below the cut. Other arguments are those of the U-Net's own forward, by name.

        Shapes: `scale_shift` (N, 2, `channels`), by which the residuals that are reused are multiplied, and what is
        added to them then; 1 and 0 for those of blocks that run.

        Raises: `ValueError` for values to reuse that this chain does not give.
        """
        known, given = self.known, dict(reuse or {})
        if strange := [name for name in given if name not in known]:
            raise ValueError(
                f"expected to reuse {', '.join(known)}, got {', '.join(strange)}; take what a call returned"
            )
        values: dict[str, Tensor] = given | self._added(conditioning)
        values |= {} if scale_shift is None else {ADJUSTMENT: scale_shift}
        values[skip(0)], signals = self.enter(sample, timestep, encoder_hidden_states, conditioning)
        sizes = dict[int, torch.Size]() if self.needs_sizes(values[skip(0)]) else None
        every = [(piece, piece.takes, piece.gives) for piece in self.pieces]
        for piece in run_order(every, [*given]):
            if sizes is not None:
                sizes |= {one: values[skip(one)].shape[-2:] for one in self.skips if skip(one) in values}
            values |= zip(piece.gives, piece(values, signals, sizes), strict=True)
        stored = {name: values[name] for name in known if name in values and name not in given}
        return self.embeddings.restore(values["noise_pred"], signals), stored

    def _added(self, conditioning: Steered) -> dict[str, Tensor]:
        """Takes out what networks beside the U-Net add, by the names that trunks know it by."""
        controls = conditioning.pop("down_block_additional_residuals", None) or ()
        adapters = conditioning.pop("down_intrablock_additional_residuals", None) or ()
        middle = conditioning.pop("mid_block_additional_residual", None)
        found = {f"control_{index}": one for index, one in enumerate(controls)}
        found |= {f"adapter_{index}": one for index, one in zip(self._adapted, adapters, strict=False)}
        return found if middle is None else found | {"control_middle": middle}

    @property
    def pieces(self) -> list[Piece]:
        return [cast(Piece, piece) for piece in self.chain]


def partition_blocks(
    unet: nn.Module, kinds: Iterable[BlockKind] = ("transformer",), branch_ids: Sequence[int] = (0,)
) -> BlockUNet:
    """A U-Net as a chain of pieces, between blocks whose residual may be reused.

    The pieces share the U-Net's submodules; the U-Net itself is not changed. `branch_ids` are those of DeepCache's cuts
    that the chain can also be entered at, the primary one first. Load adapters before.

    Raises: `PartitionError` for a U-Net that cannot be taken apart, or a branch id out of range.
    Source: Block Caching, arXiv 2312.03209, section 3.2.
    """
    parts, wanted = take_apart(unet), tuple(kinds)
    if not wanted or not set(wanted) <= {"transformer", "resnet"}:
        raise ValueError(f"expected kinds of blocks out of transformer, resnet, got {', '.join(wanted) or 'none'}")
    return BlockUNet(parts, wanted, check_branches(branch_ids, parts))
