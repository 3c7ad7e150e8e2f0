"""An accepted job -> its answer: JSON with every image, one raw PNG, or server-sent events as the steps arrive.

Knows HTTP's answers and the service; which route asks is `app.py`'s business.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from PIL import Image as Pillow
from starlette.types import Receive, Scope, Send

from fastcache.pipeline.provenance import record
from fastcache.serve.engine.events import Done, Drawn, Preview, Stepped
from fastcache.serve.http.errors import ApiError, failure
from fastcache.serve.http.guard import ARRIVED, OWNER
from fastcache.serve.http.jobs import Jobs
from fastcache.serve.http.pictures import encoded, server_sent
from fastcache.serve.http.schema import EditRequest, ImageData, ImageRequest, ImagesResponse
from fastcache.serve.http.service import Service, Ticket
from fastcache.serve.models.quality import plan_used

T = TypeVar("T")

_JSON_RANGES = ("", "*/*", "application/*", "application/json")


def wants_png(accept: str, asked: ImageRequest) -> bool:
    """Whether the answer is a raw PNG. Raises: `ApiError` for an Accept that nothing here fulfils."""
    ranges = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    png = bool(ranges & {"image/png", "image/*"}) and "application/json" not in ranges
    if asked.stream:
        if ranges.isdisjoint({*_JSON_RANGES, "text/event-stream", "text/*"}):
            raise _not_acceptable("text/event-stream")
        return False
    if not png and ranges.isdisjoint(_JSON_RANGES):
        raise _not_acceptable("application/json or image/png")
    if png and (asked.count > 1 or asked.file_format != "png"):
        message = "expected one image and output_format png with Accept: image/png; accept application/json for others"
        raise ApiError(400, message, code="invalid_value", param="n" if asked.count > 1 else "output_format")
    return png


def _not_acceptable(offered: str) -> ApiError:
    return ApiError(406, f"expected Accept to allow {offered}, got another", code="not_acceptable")


async def answer(service: Service, jobs: Jobs, asked: ImageRequest, request: Request) -> Response:
    """Draw what was asked for, or begin to. A client that leaves takes its job with it. Raises: `ApiError`."""
    png = wants_png(",".join(request.headers.getlist("accept")), asked)
    arrived, owner = getattr(request.state, ARRIVED, None), getattr(request.state, OWNER, None)
    async with AsyncExitStack() as stack:
        drawing = service.drawing(asked, arrived=arrived, owner=owner)
        ticket = await unless_gone(request.receive, stack.enter_async_context(drawing))
        if asked.is_job:
            return _begun(jobs, ticket, asked, stack.pop_all(), owner)
        if asked.stream:
            return _EventStream(_events(ticket, asked), ticket, stack.pop_all())
        pictures = await unless_gone(request.receive, _pictures(ticket))
        files = await asyncio.to_thread(_files, ticket, asked, pictures)
    if png:
        order = ticket.order
        headers = {"X-Job-Id": ticket.job.id, "X-Seed": str(order.drawing.seed), "X-Plan": order.plan_name}
        return Response(files[0], media_type="image/png", headers=headers)
    body = _body(ticket, asked, files).model_dump_json()
    return Response(body, media_type="application/json", headers={"X-Job-Id": ticket.job.id})


def _begun(jobs: Jobs, ticket: Ticket, asked: ImageRequest, stack: AsyncExitStack, owner: bytes | None) -> Response:
    """The answer to a request for a job in the background, which goes on."""

    async def answered(pictures: list[Pillow.Image]) -> ImagesResponse:
        return _body(ticket, asked, await asyncio.to_thread(_files, ticket, asked, pictures))

    async def shown(picture: Pillow.Image) -> str:
        (file,) = await asyncio.to_thread(_files, ticket, asked, [picture])
        return _base64(file)

    status = jobs.follow(ticket, stack, owner, answered, shown)
    where = {"Location": f"/v1/jobs/{ticket.job.id}", "X-Job-Id": ticket.job.id}
    return Response(status.model_dump_json(), 202, where, media_type="application/json")


async def _pictures(ticket: Ticket) -> list[Pillow.Image]:
    """Every image of a job, in order. Raises: `ApiError`."""
    drawn: dict[int, Pillow.Image] = {}
    async for event in ticket.events():
        if isinstance(event, Drawn):
            drawn[event.image] = event.picture
        elif isinstance(event, Done) and event.failure is not None:
            raise failure(event.failure)
    return [drawn[image] for image in sorted(drawn)]


class ClientLeft(ApiError):
    """A client that did not wait for its answer."""

    def __init__(self) -> None:
        message = "expected the connection open in both directions until the answer; do not close the sending side"
        super().__init__(499, message, code="client_left")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. Raises: `ClientLeft` where the client leaves, or sends no more, first; `work` is cancelled."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _files(ticket: Ticket, asked: ImageRequest, pictures: list[Pillow.Image]) -> list[bytes]:
    """The bytes of each picture; a PNG says how it was made. The prompt goes back to who sent it and nowhere else."""
    drawing, manifest = ticket.order.drawing, ticket.manifest
    made = record(manifest, drawing.request, drawing.terms, drawing.plan)
    kind, quality = asked.file_format, asked.output_compression
    return [
        encoded(picture, kind, quality, made | {"seed": drawing.seed + image}) for image, picture in enumerate(pictures)
    ]


def _body(ticket: Ticket, asked: ImageRequest, files: list[bytes]) -> ImagesResponse:
    seed = ticket.order.drawing.seed
    return ImagesResponse(
        id=ticket.job.id,
        created=int(time.time()),
        model=ticket.model,
        size=ticket.job.size,
        output_format=asked.file_format,
        quality=ticket.order.quality,
        plan=plan_used(ticket.order.plan_name, ticket.order.drawing.plan),
        data=[ImageData(b64_json=_base64(file), seed=seed + image) for image, file in enumerate(files)],
    )


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


class _EventStream(StreamingResponse):
    """A stream of events whose job ends with it, read to its end or not."""

    def __init__(self, events: AsyncIterator[bytes], ticket: Ticket, stack: AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Job-Id": ticket.job.id}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _events(ticket: Ticket, asked: ImageRequest) -> AsyncIterator[bytes]:
    """OpenAI's `image_generation.*` or `image_edit.*` events, and where asked for `fastcache.step` for each step."""
    common = {"id": ticket.job.id, "created_at": int(time.time()), "size": ticket.job.size}
    common |= {"output_format": asked.file_format, "seed": ticket.order.drawing.seed}
    plan = plan_used(ticket.order.plan_name, ticket.order.drawing.plan)
    common |= {"quality": ticket.order.quality, "plan": plan.model_dump()}
    what = "image_edit" if isinstance(asked, EditRequest) else "image_generation"
    async for event in ticket.events():
        match event:
            case Stepped():
                kind = "full" if event.full else "shallow"
                step = {"type": "fastcache.step", "step": event.step, "num_steps": event.of, "kind": kind}
                yield server_sent("fastcache.step", {**step, "id": ticket.job.id})
            case Preview() | Drawn():
                name = "partial_image" if isinstance(event, Preview) else "completed"
                (file,) = await asyncio.to_thread(_files, ticket, asked, [event.picture])
                data = {"type": f"{what}.{name}", "b64_json": _base64(file), **common}
                if isinstance(event, Preview):
                    data["partial_image_index"] = event.number
                yield server_sent(f"{what}.{name}", data)
            case Done():
                if event.failure is not None:
                    body = failure(event.failure).body
                    yield server_sent("error", {"type": "error", **body.model_dump()})
