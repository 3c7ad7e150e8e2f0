"""An offer of bundles, and limits -> jobs accepted, followed and cancelled, from asyncio; and the server's life.

The face of the serving side towards anything that takes requests: `app.py` over HTTP, or a replica of a cluster. Knows
nothing about HTTP itself.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from fastcache.bundle.manifest import Manifest
from fastcache.serve.engine.desk import Desk
from fastcache.serve.engine.events import Done, Event
from fastcache.serve.engine.order import Order
from fastcache.serve.engine.prepare import Arrival, prepare
from fastcache.serve.engine.requests import Served, check, told
from fastcache.serve.engine.scheduler import Job, QueueFull
from fastcache.serve.engine.worker import Worker
from fastcache.serve.http.errors import ApiError, failure
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.metrics import Metrics
from fastcache.serve.http.names import Names
from fastcache.serve.http.schema import ImageRequest, State
from fastcache.serve.models.catalogue import Catalogue
from fastcache.serve.models.listed import Listed, Offer

_log = logging.getLogger("fastcache.serve")

T = TypeVar("T")

_PREPARING: Final = 2  # at once: samplers' tables hold Python's lock, so that more would only slow the loop down


@dataclass(eq=False)
class Ticket:
    """An accepted job, and its events until `Done`."""

    job: Job[Order]
    model: str
    manifest: Manifest
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue, repr=False)

    @property
    def order(self) -> Order:
        return self.job.content

    async def events(self) -> AsyncIterator[Event]:
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, Done):
                return


class Service:
    """Serves the bundle in a folder, or an offer of several.

    `state` is `ready` once the first is loaded; `failure` is why it broke. Of several bundles as many are loaded as fit
    the memory limit, the others when they are asked for.
    """

    def __init__(self, offer: Path | Offer, limits: Limits | None = None, *, threads: int = 0) -> None:
        self.limits, self.metrics = limits or Limits(), Metrics()
        self.state: State = "loading"
        self.failure: Exception | None = None
        self.ended = asyncio.Event()  # nothing more will come: broken
        self.loop: asyncio.AbstractEventLoop | None = None  # that serves, once `start` was called
        self.names = Names()
        self._pool = ThreadPoolExecutor(_PREPARING, "fastcache-preparing")
        self.desk = Desk(self.limits.queue, self.metrics)
        self._worker = Worker(
            self.desk,
            self.metrics,
            lambda error: self._in_loop(self._break, error),
            lambda bundle: self._in_loop(self.shelf.gone, bundle),
        )
        self.catalogue = Catalogue(
            Offer((Listed(offer),)) if isinstance(offer, Path) else offer,
            self.limits,
            self.desk,
            lambda: self.state == "ready",
            threads=threads,
        )
        self.shelf = self.catalogue.shelf
        self._watch()

    def _watch(self) -> None:
        """Gauges of what there is now."""
        desk, watch = self.desk, self.metrics.watch
        watch("fastcache_images_waiting", "Images waiting for a slot", lambda: desk.waiting)
        watch("fastcache_images_running", "Images being drawn", lambda: desk.running)
        watch("fastcache_num_requests_running", "Jobs running", lambda: desk.jobs_running)
        watch("fastcache_num_requests_waiting", "Jobs waiting", lambda: desk.jobs_waiting)
        watch("fastcache_slot_bytes", "Memory of images in flight", lambda: desk.slot_bytes)
        watch("fastcache_models_bytes", "Memory of loaded bundles", lambda: self.shelf.held_bytes)

    @property
    def served(self) -> Served | None:
        """The first model's bundle, if it is loaded."""
        return self.shelf.first.served if self.shelf.entries else None

    async def start(self) -> None:
        """Load the first bundle and begin to serve. Raises: as `fastcache.load`; the state is then `broken`."""
        self.loop = asyncio.get_running_loop()
        try:
            await self.catalogue.start()
        except Exception as error:
            self._break(error)
            raise
        self._worker.start()
        if self.state == "loading":
            self.state = "ready"
            self.catalogue.load_others()

    @asynccontextmanager
    async def drawing(
        self, asked: ImageRequest, *, arrived: float | None = None, owner: bytes | None = None
    ) -> AsyncGenerator[Ticket]:
        """Accept a job; whoever leaves before its end cancels it.

        Its time counts from when the request `arrived`, by `time.monotonic`; only its `owner` can cancel it by name.

        Raises: `ApiError` for a request that does not fit, a full queue, or a server that does not take any.
        """
        ticket = await self._accept(asked, time.monotonic() if arrived is None else arrived, owner)
        try:
            yield ticket
        finally:
            self.desk.cancel(ticket.job.id)

    async def _accept(self, asked: ImageRequest, arrived: float, owner: bytes | None) -> Ticket:
        served, count = await self._serving(asked, arrived), asked.count
        check(asked, served, self.limits)
        name = asked.job_id or f"img-{secrets.token_hex(12)}"
        known = self.names.take(name, owner)
        try:
            self.desk.reserve(count, served.number)
        except QueueFull as error:
            self.names.free(name)
            wait = self.desk.retry_after_s
            raise ApiError(429, f"the queue is full: {error}", code="queue_full", retry_after_s=wait) from None
        events: asyncio.Queue[Event] = asyncio.Queue()
        try:
            context = copy_context()
            who = "" if owner is None else owner.hex()
            arrival = Arrival(
                name, arrived, self._deadline(asked, arrived), who, lambda one: self._post(job, events, one, context)
            )
            job = await self._prepare(asked, arrival, served)
            self.require_ready()
            if known.ended is not None:
                raise failure("cancelled")
        except BaseException:
            self.desk.release(count, served.number)
            if known.ended is None:
                self.names.free(name)
            raise
        self.metrics.plans.labels(job.content.plan_name).inc()
        _log.info("job %s: %d images, prompt of %s", name, count, told(asked.prompt))
        self.desk.submit(job)
        return Ticket(job, served.model, served.manifest, events)

    async def _prepare(self, asked: ImageRequest, arrival: Arrival, served: Served) -> Job[Order]:
        """The job, from one of few threads; dropped where it has not begun when its client leaves or its time is up."""
        work = self._pool.submit(prepare, asked, arrival, served, self.limits, self.desk.latency_s)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), max(0.0, arrival.deadline - time.monotonic()))
        except TimeoutError:
            raise failure("late") from None

    def _deadline(self, asked: ImageRequest, arrived: float) -> float:
        return arrived + min(asked.timeout or self.limits.timeout_s, self.limits.timeout_s)

    async def _serving(self, asked: ImageRequest, arrived: float) -> Served:
        """The model's bundle, loaded; valid until the caller next awaits. Raises: `ApiError`."""
        self.require_ready()
        until = min(self._deadline(asked, arrived), arrived + self.limits.load_wait_s)
        _, served = await self.shelf.ready(asked.model, self.limits.queue, until)
        self.require_ready()
        return served

    def require_ready(self) -> None:
        """Raises: `ApiError` for a server that loads, drains or broke."""
        if self.state != "ready":
            raise ApiError(503, f"the server is {self.state}; ask again", code=f"server_{self.state}", retry_after_s=5)

    def cancel(self, job_id: str, *, owner: bytes | None = None) -> str:
        """End a job, and only that one. Returns `cancelled`, or how it had ended: twice is as good as once.

        Raises: `ApiError` for a job that there is not, or not any more, or that another key asked for.
        """
        known = self.names.find(job_id, owner)
        if not self.desk.cancel(job_id) and known.ended is None:
            self.names.end(job_id, "cancelled")  # it is in preparation
        return known.ended or "cancelled"

    def _post(self, job: Job[Order], events: asyncio.Queue[Event], event: Event, context: Context) -> None:
        """An event, from the worker's thread or another, to whoever follows the job, in its request's context."""

        def put(event: Event) -> None:
            events.put_nowait(event)
            if isinstance(event, Done):  # here, where no lock is held that a log could hold up
                _log.info("job %s: %s", job.id, event.failure or "drawn")

        if isinstance(event, Done):
            self.names.end(job.id, event.failure or "drawn")
        self._in_loop(put, event, context)

    def drain(self) -> None:
        """Take no more jobs and refuse those that wait; those that run are finished."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
            self.desk.refuse_queued()

    async def close(self) -> None:
        """End the worker; call it once the requests are answered."""
        self.drain()
        self.shelf.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._worker.stop)

    def _in_loop(self, call: Callable[[T], None], value: T, context: Context | None = None) -> None:
        """Call this where the event loop runs, from another thread, if it still does."""
        if self.loop is not None:
            with suppress(RuntimeError):  # it is closed
                self.loop.call_soon_threadsafe(call, value, context=context)

    def _break(self, error: Exception) -> None:
        self.state, self.failure = "broken", error
        self.ended.set()
