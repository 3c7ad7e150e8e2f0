"""A bundle's folder and limits -> jobs accepted, followed and cancelled, from asyncio; and its life: load, swap, drain.

The face of the serving side towards anything that takes requests: `app.py` over HTTP, or a replica of a cluster. Knows
nothing about HTTP itself.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from fastcache.bundle.bundle import open_bundle
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.serve.engine.events import Done, Event
from fastcache.serve.engine.executor import Executor
from fastcache.serve.engine.requests import Served, check, prepare, told
from fastcache.serve.engine.scheduler import Job, QueueFull
from fastcache.serve.engine.worker import Order, Worker
from fastcache.serve.http.errors import ApiError, failure
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.metrics import Metrics
from fastcache.serve.http.schema import ImageRequest, State

_log = logging.getLogger("fastcache.serve")

T = TypeVar("T")

_REMEMBERED: Final = 4096  # jobs whose end a late cancel can still ask for
_PREPARING: Final = 2  # at once: samplers' tables hold Python's lock, so that more would only slow the loop down


@dataclass(eq=False)
class _Known:
    """A job by its name: whose key asked for it, and how it ended."""

    owner: bytes | None
    ended: str | None = None


@dataclass(eq=False)
class Ticket:
    """An accepted job, and its events until `Done`."""

    job: Job[Order]
    served: Served
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
    """Serves the bundle in `folder`. `state` is `ready` once it is loaded; `failure` is why it broke.

    With `trusted`, a public key's file, only bundles that it has signed are loaded, now and later.
    """

    def __init__(
        self, folder: Path, limits: Limits | None = None, *, threads: int = 0, trusted: Path | None = None
    ) -> None:
        self.folder, self._trusted, self.limits, self.metrics = folder, trusted, limits or Limits(), Metrics()
        self.state: State = "loading"
        self.served: Served | None = None
        self.failure: Exception | None = None
        self.ended = asyncio.Event()  # nothing more will come: broken
        self._threads = threads
        self._numbers = itertools.count()
        self._loading = asyncio.Lock()
        self._loaded: Future[Served] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None  # that serves, once `start` was called
        self._known: dict[str, _Known] = {}  # jobs by their names, those in preparation too
        self._past: deque[str] = deque()  # of these the ones that ended
        self._pool = ThreadPoolExecutor(_PREPARING, "fastcache-preparing")
        self.worker = Worker(self.limits.queue, self.metrics, self._broken_in_thread)
        for name, what in (("waiting", "Images waiting for a slot"), ("running", "Images being drawn")):
            self.metrics.watch(f"fastcache_images_{name}", what, lambda name=name: getattr(self.worker, name))
        self.metrics.watch("fastcache_slot_bytes", "Memory of images in flight", lambda: self.worker.slot_bytes)

    @property
    def is_loading(self) -> bool:
        """Whether a thread is loading a bundle, be it that nobody waits for it any more."""
        return self._loaded is not None and not self._loaded.done()

    async def start(self) -> None:
        """Load the bundle and begin to serve. Raises: as `fastcache.load`; the state is then `broken`."""
        self.loop = asyncio.get_running_loop()
        try:
            served = await self._load()
        except Exception as error:
            self._break(error)
            raise
        self.worker.start()
        self._install(served)
        if self.state == "loading":
            self.state = "ready"

    async def reload(self) -> None:
        """Load the folder again, beside what is served, and switch. Jobs accepted before are finished as they began.

        Raises: as `start`; what was served goes on being served.
        """
        async with self._loading:
            served = await self._load()
            if self.state == "ready":
                self._install(served)

    async def _load(self) -> Served:
        def load() -> Served:
            pipe = FastCachePipeline(open_bundle(self.folder, self._trusted), threads=self._threads)
            executor = Executor(pipe, self.limits.max_batch, threads=self._threads)
            executor.warm_up()
            return Served(next(self._numbers), executor)

        # No backend can be told to stop loading, so that a server which ends leaves it alone.
        self._loaded = _in_background(load)
        return await asyncio.wrap_future(self._loaded)

    def _install(self, served: Served) -> None:
        self.worker.install(served.number, served.executor)
        self.served = served
        manifest, slots = served.manifest, served.executor.count
        _log.info("serving %s, %s, bundle %s", served.model, ", ".join(served.sizes), manifest.bundle_sha256[:16])
        most = served.executor.lanes(manifest.sizes[0]).most_bytes / 2**20
        _log.info("%d images at once, which take at most %.0f MiB of the usual size", slots, most)
        if slots < self.limits.max_batch:
            _log.warning(
                "at most %d images at once, for the bundle was built for %s; build with --batch 1:%d:%d for %d",
                *(slots, manifest.profiles["batch"], min(4, self.limits.max_batch), *(self.limits.max_batch,) * 2),
            )

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
            self.worker.cancel(ticket.job.id)

    async def _accept(self, asked: ImageRequest, arrived: float, owner: bytes | None) -> Ticket:
        served, count = self._ready(), asked.count
        check(asked, served, self.limits)
        name = asked.job_id or f"img-{secrets.token_hex(12)}"
        if name in self._known:
            raise ApiError(409, "job_id: expected a new name, got one in use", code="job_exists", param="job_id")
        try:
            self.worker.reserve(count, served.number)
        except QueueFull as error:
            wait = self.worker.retry_after_s
            raise ApiError(429, f"the queue is full: {error}", code="queue_full", retry_after_s=wait) from None
        known = self._known[name] = _Known(owner)
        events: asyncio.Queue[Event] = asyncio.Queue()
        try:
            job = await self._prepare(asked, name, served, arrived, lambda event: self._post(job, events, event))
            self._ready()
            if known.ended is not None:
                raise failure("cancelled")
        except BaseException:
            self.worker.release(count, served.number)
            if known.ended is None:
                del self._known[name]
            raise
        _log.info("job %s: %d images, prompt of %s", name, count, told(asked.prompt))
        self.worker.submit(job)
        return Ticket(job, served, events)

    async def _prepare(
        self, asked: ImageRequest, name: str, served: Served, arrived: float, notify: Callable[[Event], None]
    ) -> Job[Order]:
        """The job, from one of few threads; dropped where it has not begun when its client leaves or its time is up."""
        deadline = arrived + min(asked.timeout or self.limits.timeout_s, self.limits.timeout_s)
        preparing = asyncio.wrap_future(self._pool.submit(prepare, asked, name, served, self.limits, notify, deadline))
        try:
            return await asyncio.wait_for(preparing, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise failure("late") from None

    def _ready(self) -> Served:
        if self.state == "ready" and self.served is not None:
            return self.served
        raise ApiError(503, f"the server is {self.state}; ask again", code=f"server_{self.state}", retry_after_s=5)

    def cancel(self, job_id: str, *, owner: bytes | None = None) -> str:
        """End a job, and only that one. Returns `cancelled`, or how it had ended: twice is as good as once.

        Raises: `ApiError` for a job that there is not, or not any more, or that another key asked for.
        """
        known = self._known.get(job_id)
        if known is None or known.owner != owner:
            message = "there is no job of this name, or it ended long ago"
            raise ApiError(404, message, code="job_not_found", param="job_id")
        if not self.worker.cancel(job_id) and known.ended is None:
            self._remember(job_id, "cancelled")  # it is in preparation
        return known.ended or "cancelled"

    def _post(self, job: Job[Order], events: asyncio.Queue[Event], event: Event) -> None:
        """An event, from the worker's thread or another, to whoever follows the job."""

        def put() -> None:
            events.put_nowait(event)
            if isinstance(event, Done):  # here, where no lock is held that a log could hold up
                _log.info("job %s: %s", job.id, event.failure or "drawn")

        if isinstance(event, Done):
            self._remember(job.id, event.failure or "drawn")
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed, so nobody follows
                self.loop.call_soon_threadsafe(put)

    def _remember(self, job_id: str, status: str) -> None:
        self._known[job_id].ended = status
        self._past.append(job_id)
        if len(self._past) > _REMEMBERED:
            del self._known[self._past.popleft()]

    def drain(self) -> None:
        """Take no more jobs and refuse those that wait; those that run are finished."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
            self.worker.refuse_queued()

    async def close(self) -> None:
        """End the worker; call it once the requests are answered."""
        self.drain()
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.worker.stop)

    def _broken_in_thread(self, error: Exception) -> None:
        if self.loop is not None:
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._break, error)

    def _break(self, error: Exception) -> None:
        self.state, self.failure = "broken", error
        self.ended.set()


def _in_background(work: Callable[[], T]) -> Future[T]:
    """What `work` gives, from a thread that the process does not wait for at its end."""
    outcome = Future[T]()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="fastcache-loading", daemon=True).start()
    return outcome
