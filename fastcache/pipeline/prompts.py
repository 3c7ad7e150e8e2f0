"""Prompts, or embeddings of them -> what the U-Net is told, one row an image, by a bundle's text encoders.

Does for Stable Diffusion and SDXL what `encode_prompt` does in diffusers. Knows tokens and embeddings; knows nothing
about steps or images.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastcache.bundle.bundle import Bundle
from fastcache.bundle.manifest import ModelInfo, Role
from fastcache.bundle.recipe import Size
from fastcache.loop.runtime import Runtime
from fastcache.pipeline.request import Sizes, Texts
from fastcache.pipeline.tokenizer import Tokenizer

_TOKENIZERS: dict[Role, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class Embeds:
    """Shapes: `hidden` (N, tokens, width), `pooled` (N, width) where the model has it."""

    hidden: Tensor
    pooled: Tensor | None = None

    def zeros(self) -> Embeds:
        return Embeds(torch.zeros_like(self.hidden), None if self.pooled is None else torch.zeros_like(self.pooled))

    def repeat(self, times: int) -> Embeds:
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(times, dim=0)
        return Embeds(self.hidden.repeat_interleave(times, dim=0), pooled)


@dataclass(frozen=True)
class Prompt:
    """One side of guidance, as diffusers' arguments give it: texts, or embeddings of them."""

    name: str
    text: Texts = None
    text_2: Texts = None
    embeds: Tensor | None = None
    pooled: Tensor | None = None


class Prompts:
    """A bundle's tokenizers and text encoders."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self._bundle, self._runtime, self._info = bundle, runtime, bundle.manifest.model

    @cached_property
    def roles(self) -> list[Role]:
        """The text encoders of the bundle. Raises: `BundleError` where there is none."""
        roles = [role for role in _TOKENIZERS if role in self._bundle.manifest.engines]
        if not roles:
            self._bundle.engine_path("text_encoder")  # says what is missing
        return roles

    @cached_property
    def tokenizers(self) -> dict[Role, Tokenizer]:
        with self._bundle.reading():
            return {role: Tokenizer(self._bundle.file(_TOKENIZERS[role])) for role in self.roles}

    def condition(
        self, positive: Prompt, negative: Prompt, *, count: int, guided: bool, clip_skip: int | None = None
    ) -> Embeds:
        """One row an image, `count` images a prompt; under guidance the unconditional rows first.

        Raises: `ValueError` for prompts and embeddings that do not go together; `BundleError` without text encoders.
        """
        if (positive.text is None) == (positive.embeds is None):
            raise ValueError(
                "expected either prompt or prompt_embeds, got " + ("neither" if positive.text is None else "both")
            )
        wanted = self._given(positive) or self.encode(_texts(positive.text) or [], _texts(positive.text_2), clip_skip)
        if not guided:
            return wanted.repeat(count)
        unwanted = self._negative(negative, wanted)
        if unwanted.hidden.shape != wanted.hidden.shape:
            raise ValueError(
                f"expected negative_prompt_embeds of shape {list(wanted.hidden.shape)}, "
                f"got {list(unwanted.hidden.shape)}"
            )
        first, second = unwanted.repeat(count), wanted.repeat(count)
        if first.pooled is None or second.pooled is None:
            return Embeds(torch.cat([first.hidden, second.hidden]))
        return Embeds(torch.cat([first.hidden, second.hidden]), torch.cat([first.pooled, second.pooled]))

    def _given(self, prompt: Prompt) -> Embeds | None:
        """The embeddings that were passed in; SDXL's need the pooled ones with them."""
        if prompt.embeds is None:
            return None
        if self._info.time_ids is not None and prompt.pooled is None:
            name = prompt.name.removesuffix("prompt")
            raise ValueError(f"expected {name}pooled_prompt_embeds with {prompt.name}_embeds for {self._info.name}")
        return Embeds(prompt.embeds, prompt.pooled)

    def _negative(self, negative: Prompt, wanted: Embeds) -> Embeds:
        given = self._given(negative)
        if given is not None:
            return given
        if negative.text is None and self._info.zero_negative:
            return wanted.zeros()
        rows = wanted.hidden.shape[0]
        texts, texts_2 = _texts(negative.text or ""), _texts(negative.text_2)
        for name, found in (("negative_prompt", texts), ("negative_prompt_2", texts_2)):
            if found is not None and len(found) not in (1, rows):
                raise ValueError(f"expected one {name}, or one for each of {rows} prompts, got {len(found)}")
        spread = [found if found is None or len(found) == rows else found * rows for found in (texts, texts_2)]
        return self.encode(spread[0] or [], spread[1])

    def encode(self, texts: list[str], texts_2: list[str] | None = None, clip_skip: int | None = None) -> Embeds:
        """Text -> embeddings; words past the encoders' length are left out, with a warning.

        `texts_2` go to the second encoder, `clip_skip` is how many of the encoders' last layers to leave out.

        Raises: `ValueError` for a clip_skip that the encoders do not have, or as many texts_2 as there are not texts.
        """
        if texts_2 is not None and len(texts_2) not in (1, len(texts)):
            raise ValueError(f"expected one prompt_2, or one for each of {len(texts)} prompts, got {len(texts_2)}")
        second = texts if texts_2 is None else texts_2 * (len(texts) // len(texts_2))
        hidden, pooled = list[Tensor](), None
        for role in self.roles:
            found = self._encode(role, second if role == "text_encoder_2" else texts)
            depth = found["hidden_states"].shape[1]
            if not 0 <= (clip_skip or 0) < depth:
                raise ValueError(f"expected clip_skip from 0 to {depth - 1}, got {clip_skip}; leave out fewer layers")
            hidden.append(found["hidden_states"][:, clip_skip or 0])
            pooled = found.get("text_embeds", pooled)
        return Embeds(torch.cat(hidden, dim=-1), pooled)

    def _encode(self, role: Role, texts: list[str]) -> dict[str, Tensor]:
        tokenizer, most = self.tokenizers[role], self._bundle.manifest.profiles["batch"].max
        tokens = tokenizer(texts)
        for text, is_cut in zip(texts, tokens.is_cut, strict=True):
            if is_cut:
                length = tokenizer.model_max_length
                warnings.warn(f"only the first {length} tokens of the prompt count: {text!r}", stacklevel=6)
        ids = torch.tensor(tokens.ids, dtype=torch.int64, device="cpu")
        found = [self._runtime.once(role, {"input_ids": part}) for part in ids.split(most)]
        return {name: torch.cat([some[name] for some in found]) for name in found[0]}


def unet_inputs(
    info: ModelInfo, embeds: Embeds, size: Size, told: Sizes, *, guided: bool, from_image: bool = False
) -> dict[str, Tensor]:
    """What a U-Net takes besides latents and timestep, by its names, from prompts and what SDXL is told of sizes.

    Shapes: one row for each of the U-Net's, the unconditional ones first; of a model that edits an image under guidance
    two thirds of them, for those without the image and with it.
    """
    hidden = embeds.hidden
    if info.edits and guided:
        hidden = torch.cat([hidden[: len(hidden) // 2], hidden])
    if info.time_ids is None or embeds.pooled is None:
        return {"encoder_hidden_states": hidden}
    ids = told.time_ids(
        (size.height, size.width), num_ids=info.time_ids, rows=len(hidden), guided=guided, from_image=from_image
    )
    return {"encoder_hidden_states": hidden, "text_embeds": embeds.pooled, "time_ids": ids}


def _texts(value: Texts) -> list[str] | None:
    return [value] if isinstance(value, str) else None if value is None else list(value)
