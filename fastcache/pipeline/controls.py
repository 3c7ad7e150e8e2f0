"""Pictures that steer a run, through a bundle's ControlNet, T2I-Adapter or IP-Adapter -> what its engines take of them.

What depends on a picture alone is computed here, once a run, by engines of their own. Knows arguments, pictures and
tensors' names; knows nothing about steps but how many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastcache.bundle.bundle import Bundle
from fastcache.bundle.manifest import Role
from fastcache.bundle.recipe import ControlKind, Size
from fastcache.loop.plan import FULL, CachePlan
from fastcache.loop.runtime import Runtime
from fastcache.loop.steps import Scales
from fastcache.pipeline.images import processed
from fastcache.pipeline.request import ControlArguments, Numbers


@dataclass(frozen=True)
class _Kind:
    """What users call a network, the flag that builds it in, its arguments, and those one of which it needs."""

    title: str
    flag: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...]


_KINDS: dict[ControlKind, _Kind] = {
    "controlnet": _Kind(
        "ControlNet",
        "--controlnet FOLDER",
        (
            "control_image",
            "controlnet_conditioning_scale",
            "control_guidance_start",
            "control_guidance_end",
            "guess_mode",
        ),
        ("control_image",),
    ),
    "t2i_adapter": _Kind(
        "T2I-Adapter",
        "--t2i-adapter FOLDER",
        ("adapter_image", "adapter_conditioning_scale"),
        ("adapter_image",),
    ),
    "ip_adapter": _Kind(
        "IP-Adapter",
        "--ip-adapter FILE",
        ("ip_adapter_image", "ip_adapter_image_embeds", "ip_adapter_scale"),
        ("ip_adapter_image", "ip_adapter_image_embeds"),
    ),
}


@dataclass(frozen=True)
class Steering:
    """The engines' inputs by name, and where they change from step to step, the ControlNets' scales at each.

    Shapes: inputs (N, ...), one row for each of the U-Net's.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    scales: Scales | None = None


class Controls:
    """The networks that a bundle was built with beside its U-Net; often none."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self._bundle, self._runtime, self._info = bundle, runtime, bundle.manifest.model
        self._names: dict[ControlKind, str] = {}
        for entry in self._info.controls:
            self._names[entry.kind] = " and ".join(filter(None, (self._names.get(entry.kind), entry.name)))
        count = sum(entry.kind == "controlnet" for entry in self._info.controls)
        self._embeddings = ["controlnet_embedding", *(f"controlnet_embedding_{i}" for i in range(2, count + 1))][:count]

    def check(self, given: ControlArguments) -> None:
        """Raises: `ValueError` for arguments of a network that the bundle lacks, or none for one that it has."""
        values = {name: getattr(given, name) for about in _KINDS.values() for name in about.arguments}
        said = {name for name, value in values.items() if value is not None and value is not False}
        for kind, about in _KINDS.items():
            strange = [name for name in about.arguments if name in said]
            if strange and kind not in self._names:
                raise ValueError(
                    f"expected no {strange[0]} for a bundle without {about.title}, got one; build with {about.flag}"
                )
            if kind in self._names and sum(name in said for name in about.needs) != 1:
                found = "both" if set(about.needs) <= said else "none"
                raise ValueError(
                    f"expected {' or '.join(about.needs)} for a bundle with the {about.title} {self._names[kind]}, "
                    f"got {found}"
                )

    @torch.no_grad()
    def steer(self, given: ControlArguments, *, rows: int, guided: bool, size: Size, num_calls: int) -> Steering:
        """What the passes of a run for `rows` pictures take.

        Raises: `ValueError` for pictures that cannot be read, or as many as do not fit, or what `check` refuses.
        """
        self.check(given)
        halves = self._info.guided_rows if guided else 1
        inputs: dict[str, Tensor] = {}
        if "controlnet" in self._names:
            for role, image in zip(self._embeddings, self._control_images(given.control_image), strict=True):
                found = self._of_picture(role, "control_image", image, size, rows)
                inputs |= {name: _halved(value, halves) for name, value in found.items()}
            count = len(self._embeddings)
            each = _each(count, "controlnet_conditioning_scale", given.controlnet_conditioning_scale, 1.0)
            every = [each if count > 1 else each[0]] * (rows * halves)
            inputs["conditioning_scale"] = torch.tensor(every, dtype=torch.float32, device="cpu")
        if "t2i_adapter" in self._names:
            found = self._of_picture("t2i_adapter", "adapter_image", given.adapter_image, size, rows)
            scale = 1.0 if given.adapter_conditioning_scale is None else given.adapter_conditioning_scale
            inputs |= {name: _halved(value * scale, halves) for name, value in found.items()}
        if "ip_adapter" in self._names:
            embeds = self._image_embeds(given, guided)
            tokens = self._runtime.once("ip_adapter", {"image_embeds": embeds})["ip_tokens"]
            inputs["ip_tokens"] = torch.cat([tokens[:1]] * (rows * (halves - 1)) + [tokens[-1:]] * rows)
            scale = 1.0 if given.ip_adapter_scale is None else given.ip_adapter_scale
            inputs["ip_adapter_scale"] = torch.full((rows * halves,), scale, dtype=torch.float32, device="cpu")
        return Steering(inputs, self.scales(given, num_calls))

    def scales(self, given: ControlArguments, num_calls: int) -> Scales | None:
        """The ControlNets' scales at each step, where they change from step to step. Raises: as `steer`."""
        if "controlnet" not in self._names:
            return None
        count = len(self._embeddings)
        each = _each(count, "controlnet_conditioning_scale", given.controlnet_conditioning_scale, 1.0)
        return _scales(given, each, num_calls)

    def _control_images(self, given: Any) -> list[Any]:
        """What each ControlNet is shown. Raises: `ValueError` for no list of as many, where there are several."""
        count = len(self._embeddings)
        if count == 1:
            return [given]
        if not isinstance(given, list | tuple):
            raise ValueError(f"expected control_image as a list of {count}, one for each ControlNet, got one")
        images: list[Any] = list(given)
        if images and all(isinstance(each, list | tuple) for each in images):  # one list a picture
            if any(len(each) != count for each in images):
                lengths = ", ".join(str(len(each)) for each in images)
                raise ValueError(f"expected lists of {count} in control_image, one for each ControlNet, got {lengths}")
            return [list(column) for column in zip(*images, strict=True)]
        if len(images) != count:
            raise ValueError(f"expected control_image as a list of {count}, one for each ControlNet, got {len(images)}")
        return images

    def _of_picture(self, role: Role, name: str, image: Any, size: Size, rows: int) -> dict[str, Tensor]:
        """What an engine makes of pictures: one for all, or as many as divide the rows, in the order of the prompts."""
        from diffusers.image_processor import VaeImageProcessor

        (spec,) = self._bundle.manifest.engines[role].inputs
        gray = spec.shape[1] == 1
        processor = VaeImageProcessor(
            vae_scale_factor=self._info.vae_scale_factor,
            do_normalize=False,
            do_convert_rgb=not gray,
            do_convert_grayscale=gray,
        )
        pixels = processed(name, processor, image, size).float()
        if list(pixels.shape[1:]) != [spec.shape[1], size.height, size.width]:
            raise ValueError(f"expected {name} of {spec.shape[1]} channels at {size}, got {list(pixels.shape[1:])}")
        if rows % len(pixels):
            raise ValueError(f"expected one {name}, or as many as divide {rows} pictures, got {len(pixels)}")
        most = self._bundle.manifest.profiles["batch"].max
        found = [self._runtime.once(role, {spec.name: part}) for part in pixels.split(most)]
        every = {key: torch.cat([some[key] for some in found]) for key in found[0]}
        return {key: value.repeat_interleave(rows // len(pixels), dim=0) for key, value in every.items()}

    def _image_embeds(self, given: ControlArguments, guided: bool) -> Tensor:
        """Shapes: returns (1, ...), or under guidance (2, ...), the one without a picture first."""
        (spec,) = self._bundle.manifest.engines["ip_adapter"].inputs
        if given.ip_adapter_image_embeds is not None:
            shape = [1 + guided, 1, *spec.shape[1:]]
            found = list(given.ip_adapter_image_embeds)
            if len(found) != 1 or list(found[0].shape) != shape:
                shapes = [list(embeds.shape) for embeds in found]
                raise ValueError(f"expected ip_adapter_image_embeds of one tensor of shape {shape}, got {shapes}")
            return found[0][:, 0].float()
        pixels = self._clip_pixels(given.ip_adapter_image)
        embeds = self._runtime.once("image_encoder", {"clip_image": pixels})["image_embeds"]
        if not guided:
            return embeds
        if len(spec.shape) == 2:  # of pooled embeddings nothing is zeros, of a layer's tokens what it makes of zeros
            return torch.cat([torch.zeros_like(embeds), embeds])
        without = self._runtime.once("image_encoder", {"clip_image": torch.zeros_like(pixels)})["image_embeds"]
        return torch.cat([without, embeds])

    def _clip_pixels(self, image: Any) -> Tensor:
        """One picture as CLIP takes it; a tensor is that already, as in diffusers."""
        from transformers import CLIPImageProcessor

        encoder = self._bundle.manifest.engines.get("image_encoder")
        if encoder is None:
            raise ValueError(
                "expected ip_adapter_image_embeds for a bundle without an image encoder, got ip_adapter_image; build "
                "with an image_encoder folder beside the IP-Adapter's file"
            )
        (spec,) = encoder.inputs
        edge: Any = spec.shape[-1]
        if not isinstance(image, Tensor):
            try:
                image = CLIPImageProcessor(size=edge, crop_size=edge)(image, return_tensors="pt").pixel_values
            except (ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ValueError(f"expected ip_adapter_image as a PIL image or an array, got {reason}") from error
        if list(image.shape) != [1, *spec.shape[1:]]:
            raise ValueError(
                f"expected one ip_adapter_image, as a tensor of shape {[1, *spec.shape[1:]]}, got {list(image.shape)}"
            )
        return image.float()


def refreshed(plan: CachePlan, scales: Scales | None) -> CachePlan:
    """The plan with a FULL step wherever a ControlNet's scale changes: what is cached was made under another."""
    if scales is None or len(scales) != plan.num_steps:  # a plan of another length is refused later
        return plan
    changes = [i > 0 and scale != scales[i - 1] for i, scale in enumerate(scales)]
    passes = tuple(FULL if change else own for change, own in zip(changes, plan.passes, strict=True))
    return dataclasses.replace(plan, passes=passes)


def _scales(given: ControlArguments, full: Sequence[float], num_calls: int) -> Scales | None:
    """Each step's scale, or those of several ControlNets, where `control_guidance_start` or `_end` switch them off.

    Raises: `ValueError` for an interval that is none, and for `guess_mode`.
    """
    if given.guess_mode:
        raise ValueError("expected guess_mode=False, which engines are built for, got True; use the helper")
    starts = _each(len(full), "control_guidance_start", given.control_guidance_start, 0.0)
    ends = _each(len(full), "control_guidance_end", given.control_guidance_end, 1.0)
    for start, end in zip(starts, ends, strict=True):
        if not 0 <= start < end <= 1:
            raise ValueError(f"expected 0 <= control_guidance_start < control_guidance_end <= 1, got {start} and {end}")
    if set(starts) == {0} and set(ends) == {1}:
        return None
    steps = [
        [
            0.0 if i / num_calls < start or (i + 1) / num_calls > end else scale
            for scale, start, end in zip(full, starts, ends, strict=True)
        ]
        for i in range(num_calls)
    ]
    return [scale for (scale,) in steps] if len(full) == 1 else steps


def _each(count: int, name: str, value: Numbers | None, usual: float) -> list[float]:
    """A number for each of some networks. Raises: `ValueError` for as many as are not."""
    values = [usual if value is None else value] * count if not isinstance(value, Sequence) else list(value)
    if len(values) != count:
        raise ValueError(f"expected {name} as one number, or {count} of them, got {len(values)}")
    return values


def _halved(value: Tensor, halves: int) -> Tensor:
    """The same for each of the rows that the U-Net takes a picture in."""
    return value.repeat(halves, *[1] * (value.ndim - 1))
