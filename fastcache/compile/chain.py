"""A U-Net as a chain of pieces -> what is exported of it, with example inputs.

That is the stem, trunks and blocks; or where an engine may have conditions the full pass, and the shallow ones.

The stem makes the time embedding and skip connection 0; every other piece takes tensors that pieces before it gave,
by the names of `cut.pieces`. Knows what a U-Net takes and gives; how a piece becomes an engine is `workshop.py`'s
business.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from fastcache.bundle.manifest import Role
from fastcache.bundle.parity import ADJUSTED
from fastcache.compile.export import Exportable, Inputs
from fastcache.compile.lower import widened
from fastcache.compile.passes import call_unet
from fastcache.cut.chain import ADJUSTMENT, RUNS, kept, neutral, run_order
from fastcache.cut.names import FULL, shallow_pass
from fastcache.cut.pieces import Block, BlockUNet, Piece, ResnetBlock, Sum, TransformerBlock, skip
from fastcache.cut.signals import Signals

TIME, TEXT, CONTEXT = "time_embedding", "encoder_hidden_states", "context"  # what pieces may take beside features


class _Stem(nn.Module):
    """What comes before the chain. `gives_context` where a piece reads something else than the text as it came."""

    def __init__(self, unet: BlockUNet, gives_context: bool) -> None:
        super().__init__()
        self.embeddings, self.conv_in, self._gives_context = unet.embeddings, unet.conv_in, gives_context
        self._enter = unet.enter

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        first, signals = call_unet(self._call, inputs)
        return (first, signals.temb, signals.context) if self._gives_context else (first, signals.temb)

    def _call(self, sample: Tensor, timestep: Tensor, text: Tensor | None = None, **conditioning: Any) -> Any:
        return self._enter(sample, timestep, conditioning.pop(TEXT, text), conditioning)


class _Link(nn.Module):
    """A piece called with plain named tensors, as in the graph. The noise prediction is given in float32."""

    def __init__(self, piece: Piece, dtype: torch.dtype, sizes: dict[int, torch.Size] | None) -> None:
        super().__init__()
        self.piece, self._dtype, self._sizes = piece, dtype, sizes

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        context: Any = inputs.get(CONTEXT, inputs.get(TEXT))
        signals = Signals(inputs.get(TIME, torch.empty(0)), None if context is None else context.to(self._dtype))
        results = zip(self.piece.gives, self.piece(inputs, signals, self._sizes), strict=True)
        return tuple(one.float() if name == "noise_pred" else one for name, one in results)


def exportable_chain(unet: BlockUNet, inputs: Inputs, scale: int = 8) -> tuple[Exportable, ...]:
    """The stem and every piece, in turn. `scale` is how many pixels a latent is."""
    rows = inputs["sample"].shape[-2]
    dtype = next(unet.conv_in.parameters()).dtype
    stem = _Stem(unet, gives_context=bool(getattr(unet.embeddings.embedder.config, "encoder_hid_dim_type", None)))
    with torch.no_grad():
        results = stem(inputs)
    stem_outputs = (skip(0), TIME, CONTEXT)[: len(results)]
    values = dict(zip(stem_outputs, results, strict=True))
    context = CONTEXT if CONTEXT in values else TEXT
    values |= {TEXT: inputs[TEXT]} if TEXT in inputs else {}
    values[ADJUSTMENT] = neutral(len(inputs["sample"]), unet.channels)
    sized = unet.needs_sizes(values[skip(0)])
    parts = [Exportable("stem", stem, inputs, stem_outputs, {"sample": scale, skip(0): scale})]
    trunks = itertools.count()
    for piece in unet.pieces:
        sizes = {one: values[skip(one)].shape[-2:] for one in unet.skips if skip(one) in values} if sized else None
        link = _Link(piece, dtype, sizes)
        taken = {name: values[name] for name in (*piece.takes, *_signals_of(piece, context))}
        with torch.no_grad():
            given = dict(zip(piece.gives, link(taken), strict=True))
        values |= given
        every = {name: scale * rows // value.shape[-2] for name, value in (taken | given).items() if value.ndim == 4}
        role = f"block-{piece.index}" if isinstance(piece, Block) else f"trunk-{next(trunks)}"
        parts.append(Exportable(role, link, taken, piece.gives, every))
    return tuple(parts)


def _signals_of(piece: Piece, context: str) -> tuple[str, ...]:
    """What a piece takes beside features: the time embedding where it has resnets, the text where it has attention."""
    found = (TIME,) if _has(piece, ResnetBlock2D, ResnetBlock) else ()
    found += (context,) if _has(piece, Transformer2DModel, DualTransformer2DModel, TransformerBlock) else ()
    return found + ((ADJUSTMENT,) if _has(piece, Sum) else ())


def _has(piece: Piece, *kinds: type[nn.Module]) -> bool:
    return any(isinstance(module, kinds) for module in piece.modules())


def chain_reference(unet: nn.Module, chain: BlockUNet, inputs: Inputs) -> Inputs:
    """What the U-Net computes in float32: `noise_pred`, all that a call of its chain stores, and `ADJUSTED`.

    That is the noise prediction with every residual reused, scaled and shifted by `ADJUSTMENT`.
    """
    generator = torch.Generator().manual_seed(0)
    off = torch.randn(len(inputs["sample"]), 2, chain.channels, generator=generator)
    adjustment = neutral(*off.shape[::2]) + 0.1 * off
    with torch.no_grad(), widened(unet, chain):
        noise_pred = call_unet(unet, inputs).sample
        _, stored = call_unet(chain, inputs)
        reuse = {name: stored[name] for block in chain.blocks for name in block.gives}
        adjusted, _ = call_unet(partial(chain, reuse=reuse, scale_shift=adjustment), inputs)
    return {"noise_pred": noise_pred, **stored, ADJUSTMENT: adjustment, ADJUSTED: adjusted}


class _Whole(nn.Module):
    """All parts of a chain, in turn."""

    def __init__(self, parts: Sequence[Exportable], outputs: Sequence[str]) -> None:
        super().__init__()
        self.modules_in_turn = nn.ModuleList([part.module for part in parts])
        self._takes, self._gives = [[*part.inputs] for part in parts], [part.outputs for part in parts]
        self._outputs = outputs

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        values = dict(inputs)
        for module, takes, gives in zip(self.modules_in_turn, self._takes, self._gives, strict=True):
            values |= zip(gives, module({name: values[name] for name in takes}), strict=True)
        return tuple(values[name] for name in self._outputs)


def whole(parts: Sequence[Exportable], role: Role = FULL, outputs: Sequence[str] = ()) -> Exportable:
    """Pieces of a chain as one part, which gives these of what lies between them, or all of it."""
    made = tuple(dict.fromkeys(name for part in parts for name in part.outputs))
    given = tuple(name for name in made if name in outputs) if outputs else made
    inputs = {name: x for part in parts for name, x in part.inputs.items() if name not in made}
    strides = {name: stride for part in parts for name, stride in part.strides.items()}
    return Exportable(role, _Whole(parts, given), inputs, given, strides)


def merged(parts: Sequence[Exportable], unet: BlockUNet, branches: Sequence[int]) -> tuple[Exportable, ...]:
    """A chain as the full pass, which takes which blocks run and the residuals of the others, and each shallow one."""
    outputs = ("noise_pred", *unet.known)
    full = whole(parts, FULL, outputs)
    examples = {name: x for part in parts for name, x in part.inputs.items()}
    residuals = [name for block in unet.blocks for name in block.gives]
    further = {RUNS: torch.ones(len(full.inputs["sample"]), len(residuals))}
    further |= {kept(name): examples[name] for name in residuals}
    strides = full.strides | {kept(name): full.strides[name] for name in residuals}
    links = [(part, [*part.inputs], part.outputs) for part in parts]
    cuts = zip(branches, unet.features, strict=True)
    return (
        replace(full, inputs=full.inputs | further, strides=strides),
        *(whole(run_order(links, [given]), shallow_pass(branch), outputs) for branch, given in cuts),
    )


def conditions(parts: Sequence[Exportable]) -> dict[str, list[str]]:
    """What each block of a chain takes, by the residual that it gives."""
    return {part.outputs[0]: [*part.inputs] for part in parts if part.role.startswith("block-")}
