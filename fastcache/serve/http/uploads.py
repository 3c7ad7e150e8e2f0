"""A picture as a client sends it -> one that a pipeline can be shown: upright, in 8-bit RGB, its transparency apart.

What a file says of its size is looked at before anything of it is decoded. Knows files and pixels; nothing of models.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from dataclasses import dataclass
from typing import Final

from PIL import Image as Pillow
from PIL import ImageChops, ImageOps

from fastcache.pipeline.images import of_bytes
from fastcache.serve.http.errors import ApiError

_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_MOST_PIXELS: Final = 4096 * 4096  # 48 MB in RGB
_DATA_URL: Final = re.compile(r"data:[\w/+.-]*(;[\w=.-]+)*;base64,", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Uploaded:
    """A picture in RGB, and where it is transparent, white on black; None for one that is opaque."""

    picture: Pillow.Image
    transparent: Pillow.Image | None


def read_upload(param: str, sent: str | bytes) -> Uploaded:
    """A PNG, JPEG or WebP, as bytes or in base64. Raises: `ApiError` that names the parameter."""
    content = sent if isinstance(sent, bytes) else _decoded(param, sent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about sizes: ours are smaller
            with Pillow.open(io.BytesIO(content), formats=_FORMATS) as image:
                _check_extent(param, image)
                image.load()
                return _upright(image)
    except ApiError:
        raise
    except Pillow.UnidentifiedImageError:
        raise _bad(param, "expected a PNG, JPEG or WebP, got another file") from None
    except Exception as error:  # a damaged file fails in any of Pillow's ways
        message = f"expected a whole PNG, JPEG or WebP, got one that cannot be read ({type(error).__name__})"
        raise _bad(param, message) from None


def _decoded(param: str, text: str) -> bytes:
    found = _DATA_URL.match(text[:256])
    if found is None and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text[:64]):
        raise _bad(param, "expected the picture itself in base64, got an address; this server fetches nothing")
    try:
        return base64.b64decode(text[found.end() if found else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise _bad(param, "expected a picture in base64, got other text") from None


def _check_extent(param: str, image: Pillow.Image) -> None:
    if image.width * image.height > _MOST_PIXELS:
        raise _bad(param, f"expected at most {_MOST_PIXELS} pixels, got {image.width}x{image.height}; make it smaller")
    if getattr(image, "n_frames", 1) > 1:
        raise _bad(param, "expected one picture, got several frames; send one of them")


def _upright(image: Pillow.Image) -> Uploaded:
    turned = of_bytes(ImageOps.exif_transpose(image))
    if turned.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in turned.info:
        with_alpha = turned.convert("RGBA")
        transparent = ImageChops.invert(with_alpha.getchannel("A"))
        return Uploaded(with_alpha.convert("RGB"), transparent if transparent.getbbox() else None)
    return Uploaded(turned.convert("RGB"), None)


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", code="invalid_image", param=param)
