"""A U-Net's arguments, by class -> the sample as its first convolution takes it, and what every layer receives.

This is all that differs from one U-Net class to the next: what comes in beside the sample, and the shape of a video.
The embeddings are the U-Net's own. Knows nothing about blocks, skip connections or cuts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from fastcache.errors import PartitionError

_NOT_EMBEDDINGS = {"conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"}


class Conditioning(TypedDict, total=False):
    """What a U-Net's forward may take beside sample, timestep and text, by diffusers' names."""

    class_labels: Tensor | None
    timestep_cond: Tensor | None
    attention_mask: Tensor | None
    encoder_attention_mask: Tensor | None
    cross_attention_kwargs: dict[str, Any] | None
    added_cond_kwargs: dict[str, Any] | None
    added_time_ids: Tensor


class Steered(Conditioning, total=False):
    """The same, and what networks beside the U-Net add to its features."""

    down_block_additional_residuals: Sequence[Tensor] | None
    mid_block_additional_residual: Tensor | None
    down_intrablock_additional_residuals: Sequence[Tensor] | None


@dataclass(frozen=True)
class Signals:
    """What the layers of one call receive beside the feature: each takes what its class needs.

    `context` is what cross-attention reads: text, or text and a list of image tokens. `attention` holds its masks and
    `cross_attention_kwargs`. Of a video, `num_frames`, and for SVD `image_only`, its mark of frames that stand alone.
    """

    temb: Tensor
    context: Any = None
    attention: dict[str, Any] = field(default_factory=dict)
    num_frames: int = 1
    image_only: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Signals:
        """The same in the dtype of the layers; what `cross_attention_kwargs` holds stays as it came."""
        attention = {name: _cast(value, dtype) for name, value in self.attention.items()}
        temb, context, image_only = (_cast(value, dtype) for value in (self.temb, self.context, self.image_only))
        return Signals(temb, context, attention, self.num_frames, image_only)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) else value


class Embeddings(nn.Module):
    """A U-Net's arguments -> (sample, signals); each class of U-Net has a `forward` of its own."""

    def __init__(self, unet: nn.Module, without: Iterable[str] = _NOT_EMBEDDINGS) -> None:
        super().__init__()
        # The U-Net's own methods compute the embeddings for every configuration; a copy of the object without its
        # blocks carries those methods and no more weights than they need.
        self.embedder: Any = copy.copy(unet)
        self.embedder._modules = {k: m for k, m in unet._modules.items() if k not in without}

    def enter(
        self, dtype: torch.dtype, sample: Tensor, timestep: Tensor, text: Tensor | None, conditioning: Conditioning
    ) -> tuple[Tensor, Signals]:
        """The embeddings, in the dtype that the layers compute in; their own may be wider (`compile.lower`)."""
        sample, signals = self(sample, timestep, text, **conditioning)
        return sample.to(dtype), signals.to(dtype)

    def restore(self, noise_pred: Tensor, signals: Signals) -> Tensor:
        """The noise prediction in the shape that the U-Net returns it in."""
        return noise_pred

    def _time(self, sample: Tensor, timestep: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        """The timestep's embedding, one row a sample; other classes have inline what this one has as a method."""
        unet = self.embedder
        return unet.time_embedding(UNet2DConditionModel.get_time_embed(unet, sample, timestep), timestep_cond)


class _TextEmbeddings(Embeddings):
    """`UNet2DConditionModel`'s arguments."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Signals]:
        unet = self.embedder
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        temb = self._time(sample, timestep, timestep_cond)
        classes = unet.get_class_embed(sample, class_labels)
        if classes is not None:
            temb = torch.cat([temb, classes], -1) if unet.config.class_embeddings_concat else temb + classes
        added = unet.get_aug_embed(temb, encoder_hidden_states, added_cond_kwargs)
        if unet.config.addition_embed_type == "image_hint":
            added, hint = added
            sample = torch.cat([sample, hint], dim=1)
        if added is not None:
            temb = temb + added
        if unet.time_embed_act is not None:
            temb = unet.time_embed_act(temb)
        context = unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
        attention = attention_signals(sample, attention_mask, encoder_attention_mask, cross_attention_kwargs)
        return sample, Signals(temb, context, attention)


def attention_signals(
    sample: Tensor, mask: Tensor | None, text_mask: Tensor | None, kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """The arguments of attention that were given. Masks of ones and zeros become biases, -10000 where hidden."""
    masks = {"attention_mask": mask, "encoder_attention_mask": text_mask}
    biases = {k: ((1 - m.to(sample.dtype)) * -10000.0).unsqueeze(1) for k, m in masks.items() if m is not None}
    return biases if kwargs is None else biases | {"cross_attention_kwargs": kwargs}


class _ControlEmbeddings(Embeddings):
    """`ControlNetModel`'s arguments, less its image."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Signals]:
        unet = self.embedder
        temb = self._time(sample, timestep, timestep_cond)
        classes = UNet2DConditionModel.get_class_embed(unet, sample, class_labels)
        if classes is not None:
            temb = temb + classes
        if unet.config.addition_embed_type in ("text", "text_time"):
            added: Any = UNet2DConditionModel.get_aug_embed(unet, temb, encoder_hidden_states, added_cond_kwargs or {})
            temb = temb + added
        attention = attention_signals(sample, attention_mask, None, cross_attention_kwargs)
        return sample, Signals(temb, encoder_hidden_states, attention)


class _ImageEmbeddings(Embeddings):
    """`UNet2DModel`'s arguments: no text, and perhaps a class."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: None = None,
        *,
        class_labels: Tensor | None = None,
    ) -> tuple[Tensor, Signals]:
        unet = self.embedder
        if encoder_hidden_states is not None:
            raise ValueError("expected no encoder_hidden_states for a UNet2DModel, got some; name class_labels")
        if class_labels is not None and unet.class_embedding is None:
            raise ValueError("expected no class_labels, for this U-Net has no classes; leave them out")
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        temb = self._time(sample, timestep)
        classes = UNet2DConditionModel.get_class_embed(unet, sample, class_labels)
        return sample, Signals(temb if classes is None else temb + classes)


class _VideoEmbeddings(Embeddings):
    """`UNetSpatioTemporalConditionModel`'s arguments: samples (N, frames, C, H, W)."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *, added_time_ids: Tensor
    ) -> tuple[Tensor, Signals]:
        unet = self.embedder
        batch, frames = sample.shape[:2]
        temb = self._time(sample, timestep)
        times = unet.add_time_proj(added_time_ids.flatten()).reshape(batch, -1)
        temb = temb + unet.add_embedding(times.to(temb.dtype))
        still = torch.zeros(batch, frames, dtype=sample.dtype, device=sample.device)
        temb, context = (_per_frame(value, frames) for value in (temb, encoder_hidden_states))
        return sample.flatten(0, 1), Signals(temb, context, num_frames=frames, image_only=still)

    def restore(self, noise_pred: Tensor, signals: Signals) -> Tensor:
        return noise_pred.reshape(-1, signals.num_frames, *noise_pred.shape[1:])


class _MotionEmbeddings(Embeddings):
    """`UNetMotionModel`'s arguments: samples (N, C, frames, H, W), and text for every frame."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Signals]:
        unet = self.embedder
        frames = sample.shape[2]
        temb = self._time(sample, timestep, timestep_cond)
        if unet.config.addition_embed_type == "text_time":
            added: Any = UNet2DConditionModel.get_aug_embed(unet, temb, encoder_hidden_states, added_cond_kwargs or {})
            temb = temb + added
        context: Any = encoder_hidden_states
        if unet.encoder_hid_proj is not None and unet.config.encoder_hid_dim_type == "ip_image_proj":
            images = unet.encoder_hid_proj((added_cond_kwargs or {})["image_embeds"])
            context = (context, [_per_frame(image, frames) for image in images])
        attention = attention_signals(sample, attention_mask, None, cross_attention_kwargs)
        temb = _per_frame(temb, frames)
        return sample.transpose(1, 2).flatten(0, 1), Signals(temb, context, attention, frames)

    def restore(self, noise_pred: Tensor, signals: Signals) -> Tensor:
        return noise_pred.reshape(-1, signals.num_frames, *noise_pred.shape[1:]).transpose(1, 2)


def _per_frame(value: Tensor, frames: int) -> Tensor:
    return value.repeat_interleave(frames, dim=0, output_size=value.shape[0] * frames)


_EMBEDDINGS: dict[type[nn.Module], type[Embeddings]] = {
    UNet2DConditionModel: _TextEmbeddings,
    UNet2DModel: _ImageEmbeddings,
    UNetSpatioTemporalConditionModel: _VideoEmbeddings,
    UNetMotionModel: _MotionEmbeddings,
}


UNET_CLASSES: dict[str, type[Any]] = {kind.__name__: kind for kind in _EMBEDDINGS}  # that can be cut


def control_embeddings(controlnet: nn.Module) -> Embeddings:
    """The embeddings of a ControlNet."""
    outputs = {"controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"}
    return _ControlEmbeddings(controlnet, _NOT_EMBEDDINGS | outputs)


def embeddings_of(unet: nn.Module) -> Embeddings:
    """The embeddings of a U-Net, by its class.

    Raises: `PartitionError` for a class or an option whose signals these would not reproduce.
    """
    for kind, embeddings in _EMBEDDINGS.items():
        if isinstance(unet, kind):
            config: Any = unet.config
            if getattr(config, "time_embedding_type", None) == "fourier" and kind is UNet2DModel:
                raise PartitionError(
                    "cannot cut a UNet2DModel with Fourier time: it divides its output by the timestep"
                )
            return embeddings(unet)
    names = ", ".join(UNET_CLASSES)
    raise PartitionError(f"expected a U-Net of {names}, got {type(unet).__name__}; pass pipe.unet of a U-Net pipeline")
