"""Bundles -> the application of `app.py` on Ray Serve: replicas that draw, and a front that shares requests out.

Each replica of `Generator` is a whole server of its own, scheduler and engines included, so what reaches it shares
engine calls as on one machine. `Front` checks keys and sizes, sends a request to a replica, and answers for one that
died or for a full house. Knows Ray Serve and ASGI; nothing about images.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError, TaskCancelledError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fastcache.serve.cluster.answers import merged
from fastcache.serve.http.answers import ClientLeft, unless_gone
from fastcache.serve.http.app import UPLOAD_PATHS, create_app
from fastcache.serve.http.errors import ApiError, failure
from fastcache.serve.http.guard import OWNER, Guard, Message, is_loopback, read_keys
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.metrics import Metrics
from fastcache.serve.http.pictures import server_sent
from fastcache.serve.http.service import Service
from fastcache.serve.models.listed import Offer, listed
from fastcache.serve.models.memory import bytes_of
from fastcache.serve.models.quality import read_offered, read_plans

_log = logging.getLogger("fastcache.serve")

GENERATOR: Final = "Generator"
_HERE: Final = ("localhost", "127.0.0.1", "[::1]")
_CONTROL_TIMEOUT_S: Final = 30.0  # after as long without an answer Ray takes a replica for dead
# Time for the replica's own answer to a deadline (504) to arrive before the front gives one.
_GRACE_S: Final = 2.0
_LOST: Final = (RayActorError, ActorUnavailableError, ReplicaUnavailableError, DeploymentUnavailableError)


def _several(value: object) -> object:
    return value if isinstance(value, list | tuple) else (str(value),)


Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]


class Settings(BaseModel):
    """What `application` takes, from Python, `serve run`, or a config file's `args`.

    `engines` is a bundle's folder or `NAME=DIR`, or several of them; `plans`, `memory_limit` and `trusted_key` are as
    for `fastcache serve`. All lie at the same path on every machine. `cpus` and `gpus` are each replica's; without
    `gpus`, one if a bundle needs it. `retries` is how often a request whose replica died is drawn again by another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    engines: Texts = Field(min_length=1)
    plans: Texts = ()
    memory_limit: str | None = None  # of each replica
    trusted_key: Path | None = None
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    upscale_delay_s: float = Field(30, ge=0)
    downscale_delay_s: float = Field(600, ge=0)
    front_replicas: int = Field(1, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float | None = Field(None, ge=0)
    max_batch: int = Field(8, ge=1)
    queue: int = Field(32, ge=1)
    max_steps: int = Field(150, ge=1, le=1000)
    timeout_s: float = Field(300, ge=1)
    retries: int = Field(1, ge=0, le=3)
    api_key_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()

    @property
    def limits(self) -> Limits:
        return Limits(max_batch=self.max_batch, queue=self.queue, max_steps=self.max_steps, timeout_s=self.timeout_s)

    @property
    def offer(self) -> Offer:
        """Raises: `ValueError`."""
        models = (listed(one) for one in self.engines)
        return Offer(
            tuple(replace(one, engines=one.engines.resolve()) for one in models),
            memory_limit_bytes=None if self.memory_limit is None else bytes_of(self.memory_limit),
            plans=tuple(Path(folder).resolve() for folder in self.plans),
            trusted=None if self.trusted_key is None else self.trusted_key.resolve(),
        )


def application(args: Mapping[str, Any]) -> Application:
    """The application for `serve.run`, or `serve run fastcache.serve.ray:application engines=DIR`. `args`: `Settings`.

    Raises: `ValueError` for arguments that do not fit; `BundleError` for a folder that is no bundle.
    """
    settings = Settings.model_validate(args)
    if settings.max_replicas < settings.min_replicas:
        raise ValueError(f"expected max_replicas of {settings.min_replicas} or more, got {settings.max_replicas}")
    limits, offer = settings.limits, settings.offer
    keys = read_keys(settings.api_key_file) if settings.api_key_file is not None else ()
    hosts = (*_HERE, *settings.allowed_hosts) if not keys or settings.allowed_hosts else None
    gpus = settings.gpus
    manifests = read_offered(offer.models, [read_plans(folder) for folder in offer.plans], offer.trusted)
    if gpus is None:
        gpus = float(any(manifest.device_type == "cuda" for manifest in manifests.values()))
    deployed: Any = serve.deployment(
        Generator,
        name=GENERATOR,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": gpus},
        # Another batch may wait in a replica, ready for the slots that come free; the rest waits in front of all.
        max_ongoing_requests=2 * settings.max_batch,
        max_queued_requests=settings.queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.max_batch,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
        ),
        # A dead replica is found by its health check, 10 s apart if Ray were left to choose.
        health_check_period_s=1,
        graceful_shutdown_timeout_s=settings.timeout_s + 10,
        max_surge_percent=100,  # a new bundle's replicas start before the old ones end
    )
    generator = deployed.bind(offer, limits)

    def front() -> ASGIApp:
        handle = serve.get_deployment_handle(GENERATOR, serve.get_replica_context().app_name)
        inner = Front(handle, limits, retries=settings.retries)
        guarded = Guard(inner, limits=limits, metrics=Metrics(), keys=keys, hosts=hosts, upload_paths=UPLOAD_PATHS)
        return guarded if keys else OnlyFromHere(guarded)

    # Waiting costs the front nothing: it is the generators that limit how many are drawn and how many wait.
    ingress: Any = serve.deployment(
        serve.ingress(front)(),
        name="Front",
        num_replicas=settings.front_replicas,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=2 * settings.max_replicas * settings.max_batch + 4 * settings.queue + 100,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=settings.timeout_s + 10,
    )
    return ingress.bind(generator)


class Generator:
    """A replica that draws: the application of one machine, called with requests as values instead of over a socket."""

    async def __init__(self, offer: Offer, limits: Limits) -> None:
        self._service = Service(offer, limits)
        self._app = create_app(self._service)
        await self._service.start()

    async def stream(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
        """The ASGI messages of the answer, as they come. Whoever stops reading cancels the job."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not waiting:
                await asyncio.Event().wait()  # a client that leaves cancels this task
            return waiting.pop()

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def ask(self, scope: dict[str, Any], body: bytes) -> tuple[str, list[Message]]:
        """This replica's name, and the ASGI messages of an answer that is short."""
        messages = [message async for message in self.stream(scope, body)]
        return serve.get_replica_context().replica_tag, messages

    def check_health(self) -> None:
        """Raises: `RuntimeError` where only another process can help, which Ray Serve then starts."""
        if self._service.state == "broken":
            raise RuntimeError(f"expected a device that works, got {type(self._service.failure).__name__}")

    async def __del__(self) -> None:
        await self._service.close()


class Front:
    """The routes: drawing goes to one replica, everything else to all of them."""

    def __init__(self, handle: DeploymentHandle[Any], limits: Limits, *, retries: int = 1) -> None:
        self._handle, self._limits, self._retries = handle, limits, retries

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope.get("method"), _path(scope):
            case None, _:
                await _lifespan(receive, send)
            case "POST", path if path in UPLOAD_PATHS:
                await self._draw(scope, receive, send)
            case _, "/livez":  # this process is of use as long as it answers; replicas are Ray Serve's business
                await Response('{"status":"ready"}', media_type="application/json")(scope, receive, send)
            case _:
                await self._control(scope, receive, send)

    async def _draw(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")  # all of it: the guard has read it
        with contextlib.suppress(ClientLeft):
            await unless_gone(receive, self._answer(_portable(scope), body, send))

    async def _answer(self, scope: dict[str, Any], body: bytes, send: Send) -> None:
        """Raises: `ApiError`, unless the answer has begun: then the error is its last event."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(_timeout_s(body, self._limits) + _GRACE_S):
                for attempt in range(self._retries + 1):
                    try:
                        return await self._forward(scope, body, sending)
                    except _LOST as error:
                        _log.warning("a replica was lost with a request: %s", type(error).__name__)
                        if begun or attempt == self._retries:
                            raise
        except BackPressureError as error:
            wait = round(error.retry_after_s or 1)
            raise ApiError(429, "the queue is full; ask again", code="queue_full", retry_after_s=wait) from None
        except (TimeoutError, *_LOST) as error:
            answer = failure("late") if isinstance(error, TimeoutError) else _lost()
            if not begun:
                raise answer from None
            event = server_sent("error", {"type": "error", **answer.body.model_dump()})
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _forward(self, scope: dict[str, Any], body: bytes, send: Send) -> None:
        """One replica's answer, message by message. Whoever cancels this ends the job there."""
        response: Any = self._handle.options(stream=True).stream.remote(scope, body)
        try:
            async for message in response:
                await send(message)
        except TaskCancelledError:
            raise asyncio.CancelledError from None
        finally:
            response.cancel()

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, asked = (await receive()).get("body", b""), _portable(scope)
        try:
            found = await self._handle.broadcast("ask", asked, body).results_async(
                timeout_s=_CONTROL_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, *_LOST):
            raise _silent() from None
        answers = [answer for answer in found if not isinstance(answer, BaseException)]
        if not answers:
            raise _silent()
        for message in merged(asked["path"], answers):
            await send(message)


class OnlyFromHere:
    """Serves this machine alone: without keys nobody else may ask, whatever address Ray's proxy listens at."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if scope["type"] == "http" and not (client and is_loopback(client[0])):
            error = ApiError(403, "expected a request from this machine, or a server with keys", code="no_api_key")
            return await error.response()(scope, receive, send)
        return await self._app(scope, receive, send)


async def _lifespan(receive: Receive, send: Send) -> None:
    for stage in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{stage}.complete"})


def _path(scope: Scope) -> str:
    """The route's path, where the application is mounted elsewhere than at / too."""
    return scope.get("path", "").removeprefix(scope.get("root_path", ""))


def _portable(scope: Scope) -> dict[str, Any]:
    """What of a scope another process can use. Keys stay here; whose they are goes along, as a digest."""
    names = ("type", "asgi", "http_version", "method", "scheme", "query_string", "client", "server")
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"] if name.lower() != b"authorization"]
    kept = {name: scope[name] for name in names if name in scope}
    state = {OWNER: scope.get("state", {}).get(OWNER)}
    return {**kept, "headers": headers, "path": _path(scope), "root_path": "", "state": state}


def _timeout_s(body: bytes, limits: Limits) -> float:
    """How long the request may take; a body that is wrong is the replica's to refuse."""
    with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
        asked = json.loads(body).get("timeout")
        return min(max(float(asked), 1.0), limits.timeout_s)
    return limits.timeout_s


def _lost() -> ApiError:
    message = "the replica that drew this was lost; another takes its place, ask again"
    return ApiError(503, message, code="replica_lost", retry_after_s=5)


def _silent() -> ApiError:
    return ApiError(503, "no replica answered; ask again", code="no_answer", retry_after_s=5)
