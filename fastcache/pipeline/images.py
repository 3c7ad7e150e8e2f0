"""Images and masks -> the latents a run starts from, and latents -> images, by the two halves of a bundle's VAE.

Draws noise in diffusers' order, so that a generator gives the picture it gives there. Knows pictures and latents; knows
nothing about prompts or steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from fastcache.bundle.bundle import Bundle
from fastcache.bundle.recipe import Size
from fastcache.loop.noise import Generators, draw
from fastcache.loop.runtime import Runtime
from fastcache.loop.steps import Run
from fastcache.pipeline import checks
from fastcache.pipeline.arguments import Terms
from fastcache.pipeline.request import Images, OutputType, Request
from fastcache.pipeline.schedule import Schedule, Span


@dataclass(frozen=True)
class Known:
    """What a mask leaves as it is: after each step it is put back, under as much noise as is left then.

    Shapes: `latents` and `noise` (N, C, H, W), `mask` (N, 1, H, W), 1 where to draw; `noised` as `Schedule.noised`.
    Source: RePaint, arXiv 2201.09865, equation 8, without its resampling, as diffusers' inpaint pipeline has it.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor
    noised: Tensor

    def restore(self, step: int, latents: Tensor) -> None:
        """Put the known part back into the latents that a step left, in place."""
        image, noise = self.noised[step + 1].tolist()
        latents.copy_(torch.lerp(image * self.latents + noise * self.noise, latents, self.mask))


@dataclass(frozen=True)
class Start:
    """What a run starts from where that is not noise alone.

    Shapes: `latents` (N, C, H, W) as the first step takes them; `appended` (N, C', H, W) the input's further channels,
    or as many times N as the U-Net takes an image.
    """

    latents: Tensor
    appended: Tensor | None = None
    known: Known | None = None

    def fill(self, run: Run) -> None:
        """Write it where the first step finds it; further channels, and what a mask keeps, stay for the whole run."""
        lane, known = run.lane, self.known
        if known is not None:
            run.after = lambda step: known.restore(step.index, step.latents)
        run.latents.copy_(self.latents)
        if self.appended is not None:
            sample = lane.tensors["sample"]
            every = sample.view(lane.halves, lane.images, *sample.shape[1:])[:, :, lane.latent_shape[1] :]
            every.copy_(self.appended.reshape(-1, lane.images, *self.appended.shape[1:]))


class Pictures:
    """A bundle's VAE, its images in the forms that diffusers takes and gives."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self._bundle, self._runtime, self._info = bundle, runtime, bundle.manifest.model

    def start(
        self, request: Request, terms: Terms, schedule: Schedule, rows: int, generator: Generators
    ) -> Start | None:
        """Where image to image, or under a mask inpainting, begins; None where there is no image.

        Raises: `ValueError` for images and masks that cannot be read, or as many as do not fit `rows` pictures.
        """
        image, mask, size, span, guided = request.image, request.mask_image, terms.size, terms.span, terms.guided
        if image is None:
            return None
        pixels = self._prepared("image", image, size)
        if self._info.edits:
            return self._start_beside(pixels, schedule, rows, generator, guided)
        if mask is not None:
            return self._start_inside(pixels, self._mask(mask, size), schedule, span, rows, generator)
        if isinstance(generator, Sequence) and len(pixels) < rows:
            pixels = _spread("image", pixels, rows)  # each picture draws its own
        latents = _spread("image", self._latents(pixels, generator), rows)
        if span.denoising_start is not None:
            return Start(latents)  # it comes from another model, under the noise that is left
        kept, noise = schedule.noised[0].tolist()
        return Start(kept * latents + noise * self._drawn(latents.shape, generator))

    def _start_beside(
        self, pixels: Tensor, schedule: Schedule, rows: int, generator: Generators, guided: bool
    ) -> Start:
        """Noise, and beside it the image to edit; of three rows under guidance the first goes without."""
        shown = pixels.to(self._runtime.device, torch.float32)
        if pixels.shape[1] != self._info.latent_channels:
            shown = self._moments(pixels)[0]
        shown = _spread("image", shown, rows)
        noise = self._drawn(shown.shape, generator) * schedule.sampler.init_noise_sigma
        return Start(noise, torch.cat([torch.zeros_like(shown), shown, shown]) if guided else shown)

    def _start_inside(
        self, pixels: Tensor, mask: Tensor, schedule: Schedule, span: Span, rows: int, generator: Generators
    ) -> Start:
        info = self._info
        if pixels.shape[1] != 3:
            raise ValueError(f"expected an image beside a mask_image, got latents of shape {list(pixels.shape)}")
        blended, from_noise = info.in_channels == info.latent_channels, span.strength in (None, 1.0)
        own = list(generator)[: len(pixels)] if isinstance(generator, Sequence) else generator
        latents = None
        if blended or not from_noise:
            latents = _spread("image", self._latents(pixels, own), rows)
        height, width = (n // info.vae_scale_factor for n in pixels.shape[2:])
        noise = self._drawn(torch.Size((rows, info.latent_channels, height, width)), generator)
        if from_noise or latents is None:
            started = noise * schedule.sampler.init_noise_sigma
        else:
            kept, share = schedule.noised[0].tolist()
            started = kept * latents + share * noise
        masked = pixels * (mask < 0.5)
        small = functional.interpolate(mask, size=(height, width)).to(noise.device)
        small = _spread("mask_image", small, rows)
        if not blended:
            own = list(generator)[: len(masked)] if isinstance(generator, Sequence) else generator
            visible = _spread("image", self._latents(masked, own), rows)
            return Start(started, torch.cat([small, visible], dim=1))
        if latents is None:
            raise ValueError("expected an image to blend in, got none")
        if self._info.vae_draws:  # diffusers encodes the masked image here, too
            own = list(generator)[: len(masked)] if isinstance(generator, Sequence) else generator
            self._drawn(torch.Size((len(masked), *noise.shape[1:])), own)
        return Start(started, known=Known(latents, noise, small, schedule.noised))

    def _prepared(self, name: str, image: Images, size: Size) -> Tensor:
        """Images in [-1, 1], or latents as they are.

        Raises: `ValueError` for what is neither, or another size where it cannot be resized.
        """
        scale, channels = self._info.vae_scale_factor, self._info.latent_channels
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels:
            wanted = [size.height // scale, size.width // scale]
            if list(image.shape[2:]) != wanted:
                raise ValueError(f"expected {name} latents of size {wanted}, got {list(image.shape[2:])}")
            return checks.finite(name, image)
        from diffusers.image_processor import VaeImageProcessor

        return processed(name, VaeImageProcessor(vae_scale_factor=scale, do_convert_rgb=True), image, size)

    def _mask(self, mask: Images, size: Size) -> Tensor:
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(
            vae_scale_factor=self._info.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )
        return processed("mask_image", processor, mask, size)

    def _latents(self, pixels: Tensor, generator: Generators) -> Tensor:
        """A sample of what the encoder makes of images; latents as they are."""
        if pixels.shape[1] == self._info.latent_channels:
            return pixels.to(self._runtime.device, torch.float32)
        mean, deviation = self._moments(pixels)
        if not self._info.vae_draws:
            return mean
        return mean + deviation * self._drawn(mean.shape, generator)

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of images' latents."""
        most = self._bundle.manifest.profiles["batch"].max
        found = [self._runtime.once("vae_encoder", {"image": part}) for part in pixels.float().split(most)]
        mean, deviation = (torch.cat([some[name] for some in found]) for name in ("latent_mean", "latent_deviation"))
        return mean, deviation

    def _drawn(self, shape: torch.Size, generator: Generators) -> Tensor:
        noise = torch.empty(shape, dtype=torch.float32, device=self._runtime.device)
        draw(noise, generator)
        return noise

    def preview(self, latents: Tensor) -> Image.Image:
        """The first picture of latents on their way, by the decoder for that where the bundle has one."""
        manifest = self._bundle.manifest
        if "preview_decoder" in manifest.engines:
            pictures = self._runtime.once("preview_decoder", {"latents": latents[:1]})["image"]
        else:
            pictures = self._pictures(latents[: manifest.profiles["batch"].min])
        return _pil(pictures)[0]

    def decode(self, latents: Tensor, output_type: OutputType) -> Any:
        """Images of latents as the sampler leaves them, in the form asked for."""
        if output_type == "latent":
            return latents
        pictures = self._pictures(latents)
        if output_type == "pt":
            return pictures
        if output_type == "np":
            return _array(pictures)
        return _pil(pictures)

    def _pictures(self, latents: Tensor) -> Tensor:
        """The pictures of latents, whole or in tiles, as the bundle's decoder takes them."""

        def decoded(part: Tensor) -> Tensor:
            return self._runtime.once("vae_decoder", {"latents": part})["image"]

        tile, scale = self._bundle.manifest.vae_tile, self._info.vae_scale_factor
        return decoded(latents) if tile is None else in_tiles(decoded, latents, tile // scale, scale)


def _array(pictures: Tensor) -> npt.NDArray[np.float32]:
    return cast("npt.NDArray[np.float32]", pictures.permute(0, 2, 3, 1).cpu().numpy())


def _pil(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in (_array(pictures) * 255).round().astype(np.uint8)]


def in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, scale: int) -> Tensor:
    """Pictures decoded in square tiles, which overlap by a quarter or more and fade into each other there.

    Shapes: latents (N, C, h, w), of `tile` or more rows and columns; `decode` takes (N, C, tile, tile). Returns
    (N, 3, h * scale, w * scale). Source: as `AutoencoderKL.tiled_decode` of diffusers, but that every tile is whole.
    """
    height, width = latents.shape[2:]
    weight = torch.linspace(0, 1, tile * scale // 4 + 2)[1:-1]  # of the rows that fade, the outermost first
    profile = torch.ones(tile * scale)
    profile[: len(weight)], profile[-len(weight) :] = weight, weight.flip(0)
    picture, total = None, torch.zeros(height * scale, width * scale)
    for top, left in itertools.product(_tile_starts(height, tile), _tile_starts(width, tile)):
        part = decode(latents[:, :, top : top + tile, left : left + tile].contiguous())
        if picture is None:
            picture = part.new_zeros(*part.shape[:2], *total.shape)
            total = total.to(part)
        rows, columns = (slice(start * scale, (start + tile) * scale) for start in (top, left))
        weights = (profile[:, None] * profile).to(part)
        picture[:, :, rows, columns] += weights * part
        total[rows, columns] += weights
    if picture is None:
        raise ValueError(f"expected latents of {tile} rows and columns or more, got {height}x{width}")
    return picture / total


def _tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a length evenly, and overlap by a quarter of a tile or more."""
    count = max(1, math.ceil((length - tile) / (tile - tile // 4)) + 1)
    return [round(k * (length - tile) / max(count - 1, 1)) for k in range(count)]


def processed(name: str, processor: Any, image: Any, size: Size) -> Tensor:
    """Pictures as a processor of diffusers makes them, at a size.

    Raises: `ValueError` for what it cannot read, and for pixels that are no numbers.
    """
    try:
        pixels: Tensor = processor.preprocess(of_bytes(image), height=size.height, width=size.width)
    except Exception as error:  # diffusers', numpy's or torch's own, of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"expected {name} as PIL images, arrays or tensors in [0, 1], got {reason}; give another {name}"
        ) from error
    return checks.finite(name, pixels)


def of_bytes(image: Any) -> Any:
    """A picture of 16 bits a pixel as one of 8, which is what processors read; they would clip it to nearly white.

    Raises: `ValueError` for pixels of a range that nobody knows.
    """
    if isinstance(image, list):
        return [of_bytes(each) for each in cast("list[Any]", image)]
    if not isinstance(image, Image.Image) or not image.mode.startswith(("I", "F")):
        return image
    if not image.mode.startswith("I;16"):
        raise ValueError(f"a picture of mode {image.mode}, which says nothing of its range; convert it to L or RGB")
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))


def _spread(name: str, values: Tensor, rows: int) -> Tensor:
    """As many rows as there are pictures, the given ones one after the other."""
    if rows % len(values):
        raise ValueError(f"expected one {name}, or as many as divide {rows} pictures, got {len(values)}")
    return values.repeat(rows // len(values), *[1] * (values.ndim - 1))


def read_image(path: Path) -> Image.Image:
    """The picture in a file, in RGB, upright where its EXIF data say how it was held.

    Raises: `ValueError` for a file that is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(of_bytes(image)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"expected a picture in {path}: {' '.join(reason.split())}") from None
