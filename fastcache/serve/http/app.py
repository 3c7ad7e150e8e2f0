"""A service -> an HTTP application: OpenAI's images API, probes, metrics and a page. Knows routes and nothing else.

`create_app` gives a FastAPI application that any ASGI server runs and more routes may be added to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.routing import Match

from fastcache.serve.http.answers import answer
from fastcache.serve.http.edits import body_schema, read_edit
from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.guard import OWNER, PROBES, Guard
from fastcache.serve.http.jobs import Jobs
from fastcache.serve.http.metrics import CONTENT_TYPE
from fastcache.serve.http.models import ADMIN_PATH, add_admin, add_models, refuse_admin
from fastcache.serve.http.page import PAGE_PATHS, add_page
from fastcache.serve.http.schema import (
    JOB_ID,
    Cancelled,
    ErrorBody,
    Health,
    HealthInDetail,
    ImageRequest,
    ImagesResponse,
    JobStatus,
)
from fastcache.serve.http.service import Service

_ERRORS: Final[Mapping[int, str]] = {
    400: "A field that is unknown, unsupported or does not fit",
    401: "No API key, or a wrong one",
    403: "A Host or Origin that is not this server's",
    404: "No such model, job or route",
    406: "An Accept header that nothing here fulfils",
    408: "The body did not arrive in time",
    409: "A name in use, or a model that cannot be loaded or dropped",
    413: "Too large a body",
    415: "A Content-Type other than application/json",
    422: "Not possible in the time asked for",
    429: "The queue is full; see Retry-After",
    431: "Too large headers",
    499: "The job was cancelled",
    500: "The server failed",
    503: "Loading, draining or broken; see Retry-After",
    504: "Not done in time",
}
_OPEN_PATHS: Final = PROBES | PAGE_PATHS  # need no key
UPLOAD_PATHS: Final = frozenset({"/v1/images/generations", "/v1/images/edits"})
_ALWAYS: Final = (400, 401, 403, 408, 413, 431, 500)
_PROBING: Final = (400, 403, 408, 413, 431, 500, 503)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in sorted(statuses)}


def create_app(
    service: Service,
    *,
    keys: Sequence[bytes] = (),
    admin_keys: Sequence[bytes] = (),
    hosts: Iterable[str] | None = None,
) -> FastAPI:
    """The application around a service, which it starts in the background and closes at its end.

    `keys` are digests of API keys, as `guard.read_keys` gives them, and `admin_keys` of those who may also change which
    models there are; `hosts` the names it may be asked by, None for any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        # Probes are answered while the engines load. What goes wrong is the service's `failure`.
        starting = asyncio.create_task(_quietly(service))
        yield
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await service.close()
        await jobs.close()

    jobs = Jobs(service, service.limits)
    app = FastAPI(
        title="fastcache",
        lifespan=lifespan,
        docs_url=None,  # its script would come from another site
        redoc_url=None,
        # FastAPI's own tracing would keep bodies, and so prompts.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.add_middleware(
        Guard,
        limits=service.limits,
        metrics=service.metrics,
        keys=keys,
        hosts=hosts,
        open_paths=_OPEN_PATHS,
        admin_keys=admin_keys,
        admin_path=ADMIN_PATH,
        upload_paths=UPLOAD_PATHS,
    )
    _add_errors(app, service.metrics.rejected)
    _add_images(app, service, jobs)
    add_models(app, service, _errors, _ALWAYS)
    if admin_keys:
        add_admin(app, service, _errors, _ALWAYS)
    else:
        refuse_admin(app)
    _add_probes(app, service)
    add_page(app)
    _describe(app, secured=bool(keys), administered=bool(admin_keys))
    return app


def _add_errors(app: FastAPI, rejected: Counter) -> None:
    """What is raised becomes an answer of OpenAI's shape, counted by its code."""

    async def api_error(_: Request, error: Any) -> Response:
        rejected.labels(error.code).inc()
        return error.response()

    async def invalid(request: Request, error: Any) -> Response:
        rejected.labels("invalid_value").inc()
        return _invalid(request, error)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, _http_error)


async def _quietly(service: Service) -> None:
    with contextlib.suppress(Exception):
        await service.start()


def _add_images(app: FastAPI, service: Service, jobs: Jobs) -> None:
    text: dict[str, Any] = {"type": "string"}
    event: dict[str, Any] = {
        "type": "object",
        "properties": {"event": text, "data": text},
        "required": ["event", "data"],
    }
    kinds: dict[str, Any] = {
        "image/png": {"schema": {"type": "string", "format": "binary"}},
        "text/event-stream": {"schema": event},
    }

    responses: dict[int | str, dict[str, Any]] = {
        200: {"content": kinds},
        202: {"model": JobStatus, "description": "A job in the background, of which GET tells"},
        **_errors(*_ALWAYS, 404, 406, 409, 415, 422, 429, 499, 503, 504),
    }

    @app.post("/v1/images/generations", response_model=ImagesResponse, responses=responses)
    async def generate(asked: ImageRequest, request: Request) -> Response:
        """Draw images from a text."""
        return await answer(service, jobs, asked, request)

    @app.post(
        "/v1/images/edits",
        response_model=ImagesResponse,
        responses=responses,
        openapi_extra={"requestBody": body_schema()},
    )
    async def edit(request: Request) -> Response:
        """Draw on a picture: image to image, or where a mask says. A form, as OpenAI's client sends it, or JSON."""
        return await answer(service, jobs, await read_edit(request), request)

    @app.get("/v1/jobs/{job_id}", responses=_errors(*_ALWAYS, 404))
    async def job(job_id: Annotated[str, Path(pattern=JOB_ID)], request: Request) -> JobStatus:
        """How a job in the background stands, and its result, for the key that asked for it."""
        return jobs.status(job_id, getattr(request.state, OWNER, None))

    @app.post("/v1/jobs/{job_id}/cancel", responses=_errors(*_ALWAYS, 404))
    async def cancel(job_id: Annotated[str, Path(pattern=JOB_ID)], request: Request) -> Cancelled:
        """End a job that was asked for with the same key, and only that one. Twice is as good as once."""
        return Cancelled(id=job_id, status=service.cancel(job_id, owner=getattr(request.state, OWNER, None)))


def _add_probes(app: FastAPI, service: Service) -> None:
    busy: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": _ERRORS[503]}}

    def health(response: Response, *, well: bool) -> Health:
        if not well:
            response.status_code = 503
            response.headers["Retry-After"] = "5"
        return Health(status=service.state)

    @app.get("/livez", responses={**_errors(*_PROBING), **busy})
    async def livez(response: Response) -> Health:
        """Whether the process is of any use; if not, start another."""
        return health(response, well=service.state != "broken")

    @app.get("/readyz", responses={**_errors(*_PROBING), **busy})
    async def readyz(response: Response) -> Health:
        """Whether requests are taken now."""
        return health(response, well=service.state == "ready")

    @app.get("/health", responses=_errors(*_ALWAYS))
    async def in_detail() -> HealthInDetail:
        """What the server is doing."""
        served, desk = service.served, service.desk
        return HealthInDetail(
            status=service.state,
            model=next(iter(service.shelf.entries), None),
            loaded=[entry.name for entry in service.shelf.entries.values() if entry.served is not None],
            running=desk.running,
            waiting=desk.waiting,
            bundles=desk.bundles,
            max_batch=None if served is None else served.executor.count,
            queue=service.limits.queue,
        )

    text: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}

    @app.get("/metrics", response_class=Response, responses={200: {"content": text}, **_errors(*_ALWAYS)})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    for path, route in {"/livez": livez, "/readyz": readyz, "/health": in_detail, "/metrics": metrics}.items():
        app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)


def _describe(app: FastAPI, *, secured: bool, administered: bool) -> None:
    """Make the OpenAPI document say what is true here: validation errors are 400, and which routes need a key."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = made()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if "HTTPValidationError" in json.dumps(operation["responses"].get("422")):
                    del operation["responses"]["422"]
                needs_key = administered if path.startswith(ADMIN_PATH) else secured and path not in _OPEN_PATHS
                if needs_key:
                    operation["security"] = [{"key": []}]
                elif "401" in operation["responses"] and not secured:
                    del operation["responses"]["401"]
        schemas: dict[str, Any] = document["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        if secured or administered:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi


def _invalid(request: Request, error: Any) -> Response:
    """What is wrong with a body or a path, an unknown field before others, without repeating what was sent."""
    first: dict[str, Any] = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    if first["loc"] == ("body",) and first["type"] != "value_error":  # else fields that do not go together
        return _no_object(request, empty=first["type"] == "missing").response()
    where = next((str(part) for part in first["loc"][1:] if isinstance(part, str)), None)
    said = {"extra_forbidden": "unknown or unsupported; leave it out", "json_invalid": "expected JSON"}
    message = str(said.get(first["type"], first["msg"])).removeprefix("Value error, ")
    text = message if where is None else f"{where}: {message}"
    return ApiError(400, text, code="invalid_value", param=where).response()


def _no_object(request: Request, *, empty: bool) -> ApiError:
    """A body that is no JSON object, as curl sends without being told the type of what it sends."""
    kind = request.headers.get("content-type", "none").partition(";")[0].strip()[:64]
    if not empty and kind.lower() != "application/json" and not kind.lower().endswith("+json"):
        message = f"expected Content-Type: application/json, got {kind}; curl needs -H 'Content-Type: application/json'"
        return ApiError(415, message, code="unsupported_media_type")
    got = "an empty body" if empty else "another value"
    return ApiError(400, f'expected a JSON object as {{"prompt": "a red circle"}}, got {got}', code="invalid_value")


async def _http_error(request: Request, error: Any) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    detail = str(error.detail)
    if error.status_code == 400:  # FastAPI's own, for bytes that are no text; what is no JSON is a validation's
        detail = "expected a body of JSON in UTF-8, got other bytes; encode it as UTF-8"
    answer = ApiError(error.status_code, detail, code=code).response()
    answer.headers.update(error.headers or {})
    if error.status_code == 405:  # of all routes of a path: Starlette names the methods of the first alone
        answer.headers["Allow"] = ", ".join(sorted(_methods(request)))
    return answer


def _methods(request: Request) -> set[str]:
    """What may be done with what a request names."""
    found = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in found for method in getattr(route, "methods", None) or ()}
