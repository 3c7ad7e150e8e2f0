"""The body of an edit, a form or JSON -> an `EditRequest`. Knows how clients send files; nothing about pictures.

OpenAI's client sends a form: files as `image` or `image[]`, `mask`, and every other field as text.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal, get_args, get_origin

import python_multipart  # pyright: ignore[reportUnusedImport] (here, so that its absence is told at start)  # noqa: F401
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.schema import EditRequest

FORM: Final = "multipart/form-data"
_JSON: Final = "application/json"
_LISTS: Final = ("image", "control_image")
_PICTURES: Final = ("image", "mask", "control_image", "adapter_image", "ip_adapter_image")
_MOST_FIELDS: Final = 64
_MOST_FILES: Final = 34


def _is_text(annotation: Any) -> bool:
    """Whether a field's value is text as it stands: a string, or one of some words."""
    if get_origin(annotation) is Literal:
        return all(isinstance(one, str) for one in get_args(annotation))
    return annotation is str or any(_is_text(one) for one in get_args(annotation))


_TEXTS: Final = frozenset(name for name, field in EditRequest.model_fields.items() if _is_text(field.annotation))


async def read_edit(request: Request) -> EditRequest:
    """Raises: `ApiError` for another kind of body; `RequestValidationError` for what does not fit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        fields = await _form(request)
    elif kind == _JSON or kind.endswith("+json"):
        fields = await _json(request)
    else:
        message = f"expected Content-Type: {FORM} or {_JSON}, got {kind[:64] or 'none'}"
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        return EditRequest.model_validate(fields)
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False, include_input=False)]
        raise RequestValidationError(found) from None


async def _json(request: Request) -> dict[str, Any]:
    try:
        fields = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "expected JSON in UTF-8, got another body", code="invalid_value") from None
    if not isinstance(fields, dict):
        message = 'expected a JSON object as {"prompt": "a red circle", "image": "..."}, got another value'
        raise ApiError(400, message, code="invalid_value")
    return fields


async def _form(request: Request) -> dict[str, Any]:
    """A form's fields, files as bytes, numbers and truth values out of their text."""
    fields: dict[str, Any] = {}
    try:
        async with request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS) as form:
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                read = await _value(name, value)
                if name not in fields:
                    fields[name] = [read] if name in _LISTS else read
                elif name in _LISTS:
                    fields[name].append(read)
                else:
                    raise ApiError(400, f"{name[:64]}: expected it once, got it again", code="invalid_value")
    except HTTPException as error:  # Starlette's own, of a form that is none or has too many parts
        raise ApiError(400, f"expected a form of few parts, got: {error.detail}", code="invalid_value") from None
    except (ValueError, KeyError):  # python-multipart's own, of headers that are none
        raise ApiError(400, "expected a whole form, got one that cannot be read", code="invalid_value") from None
    return fields


async def _value(name: str, value: UploadFile | str) -> Any:
    if isinstance(value, UploadFile):
        if name not in _PICTURES:
            message = f"{name[:64]}: expected files in {', '.join(_PICTURES)} only, got one"
            raise ApiError(400, message, code="invalid_value")
        return await value.read()
    if name in _TEXTS and not (name == "background" and value in ("true", "false")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # what it should be, its field says


def body_schema() -> dict[str, Any]:
    """The body for the OpenAPI document: JSON, and the same as a form."""
    schema = EditRequest.model_json_schema()
    form = {**schema, "properties": {**schema["properties"]}}
    file: dict[str, Any] = {"type": "string", "format": "binary"}
    for name in _PICTURES:
        told = {"description": schema["properties"][name].get("description", "")}
        several = {"anyOf": [file, {"type": "array", "items": file, "minItems": 1}]}
        form["properties"][name] = (several if name in _LISTS else file) | told
    return {"required": True, "content": {_JSON: {"schema": schema}, FORM: {"schema": form}}}
