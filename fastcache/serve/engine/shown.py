"""The pictures of a request's body -> the pipeline's arguments that hold them, at the size that is drawn.

A job in the queue holds pictures no larger than what it draws. Knows the API's fields and a bundle's networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from PIL import Image as Pillow

from fastcache.bundle.manifest import Manifest
from fastcache.bundle.recipe import Size
from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.schema import EditRequest, ImageRequest
from fastcache.serve.http.uploads import Uploaded, read_upload

_IP_EDGE: Final = 1024  # CLIP sees 224 or 336 pixels of it
_STEERED_BY: Final = (
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
    *("adapter_conditioning_scale", "ip_adapter_scale"),
)


def shown(asked: ImageRequest, manifest: Manifest) -> dict[str, Any]:
    """The pipeline's arguments for a body's pictures and scales, the pictures as large as they came.

    Raises: `ApiError` for what is no picture, too many, or a mask of another size than its picture.
    """
    arguments: dict[str, Any] = {name: getattr(asked, name) for name in _STEERED_BY}
    if asked.control_image is not None:
        found = [read_upload("control_image", one).picture for one in _listed(asked.control_image)]
        arguments["control_image"] = found if len(found) > 1 else found[0]
    for name in ("adapter_image", "ip_adapter_image"):
        if (sent := getattr(asked, name)) is not None:
            arguments[name] = read_upload(name, sent).picture
    if isinstance(asked, EditRequest):
        arguments |= _begun_with(asked, manifest)
    return {name: value for name, value in arguments.items() if value is not None}


def _begun_with(asked: EditRequest, manifest: Manifest) -> dict[str, Any]:
    pictures = [read_upload("image", one) for one in _listed(asked.image)]
    found: dict[str, Any] = {"image": pictures[0].picture, "strength": asked.begins_at}
    if len(pictures) > 1:
        takes_one = any(entry.kind == "ip_adapter" for entry in manifest.model.controls)
        if not takes_one or asked.ip_adapter_image is not None or len(pictures) > 2:
            most = "2: one to begin with, one for the IP-Adapter" if takes_one else "1, for a bundle without IP-Adapter"
            raise ApiError(
                400, f"image: expected at most {most}, got {len(pictures)}", code="invalid_value", param="image"
            )
        found["ip_adapter_image"] = pictures[1].picture
    mask = _mask(asked, pictures[0])
    return found if mask is None else found | {"mask_image": mask}


def _mask(asked: EditRequest, image: Uploaded) -> Pillow.Image | None:
    """Where to draw, white on black: where the mask is transparent, or white; without a mask where the image is."""
    if asked.mask is None:
        return image.transparent
    mask = read_upload("mask", asked.mask)
    if mask.picture.size != image.picture.size:
        (width, height), (wide, high) = image.picture.size, mask.picture.size
        message = f"mask: expected it as large as the image, {width}x{height}, got {wide}x{high}; make them equal"
        raise ApiError(400, message, code="invalid_image", param="mask")
    return mask.picture.convert("L") if mask.transparent is None else mask.transparent


def fitted(arguments: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """The same, pictures at the size that is drawn, by the filter that the pipeline would use."""

    def fit(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [fit(name, one) for one in value]
        if not isinstance(value, Pillow.Image):
            return value
        if name == "ip_adapter_image":
            value.thumbnail((_IP_EDGE, _IP_EDGE), Pillow.Resampling.LANCZOS)
            return value
        return value.resize((size.width, size.height), Pillow.Resampling.LANCZOS)

    return {name: fit(name, value) for name, value in arguments.items()}


def _listed(sent: Any) -> list[str | bytes]:
    return list(sent) if isinstance(sent, list) else [sent]
