"""Pictures -> the bytes of an answer. Knows file formats and JSON; nothing about queues or engines."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image as Pillow
from pydantic import BaseModel

from fastcache.pipeline.provenance import png_bytes
from fastcache.serve.http.schema import OutputFormat


def encoded(
    picture: Pillow.Image, output_format: OutputFormat, quality: int | None, made: Mapping[str, object]
) -> bytes:
    """The picture as a file's bytes; a PNG says in text chunks how it was made."""
    if output_format == "png":
        return png_bytes(picture, made)
    buffer = io.BytesIO()
    picture.save(buffer, output_format, quality=100 if quality is None else quality)
    return buffer.getvalue()


def server_sent(event: str, data: BaseModel | Mapping[str, Any]) -> bytes:
    """One server-sent event. Source: the HTML standard, section 9.2.6."""
    body = data.model_dump_json() if isinstance(data, BaseModel) else json.dumps(data)
    return f"event: {event}\ndata: {body}\n\n".encode()
