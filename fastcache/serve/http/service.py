"""An offer of bundles, and limits -> jobs accepted, followed and cancelled, from asyncio; and their life.

The face of the serving side towards anything that takes requests: `app.py` over HTTP, or a replica of a cluster. Knows
nothing about HTTP itself.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fastcache.bundle.bundle import open_bundle
from fastcache.bundle.manifest import Manifest
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.serve.engine.events import Done, Event
from fastcache.serve.engine.executor import Executor
from fastcache.serve.engine.prepare import Arrival, prepare
from fastcache.serve.engine.requests import Served, check, told
from fastcache.serve.engine.scheduler import Job, QueueFull
from fastcache.serve.engine.worker import Order, Worker
from fastcache.serve.http.errors import ApiError, failure
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.metrics import Metrics
from fastcache.serve.http.schema import ImageRequest, State
from fastcache.serve.models.listed import Listed, Offer, read_models, require_different
from fastcache.serve.models.quality import PlanFolder, plans_for, read_plans, require_used
from fastcache.serve.models.shelf import Entry, Loading, Shelf

_log = logging.getLogger("fastcache.serve")

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
        self._offer = Offer((Listed(offer),)) if isinstance(offer, Path) else offer
        self._listed, self._threads = list(self._offer.models), threads
        self.plans: list[PlanFolder] = []
        self._numbers = itertools.count()
        self._changing = asyncio.Lock()  # which models there are
        self.loop: asyncio.AbstractEventLoop | None = None  # that serves, once `start` was called
        self._known: dict[str, _Known] = {}  # jobs by their names, those in preparation too
        self._past: deque[str] = deque()  # of these the ones that ended
        self._pool = ThreadPoolExecutor(_PREPARING, "fastcache-preparing")
        self.worker = Worker(self.limits.queue, self.metrics, self._broken_in_thread, self._gone_in_thread)
        streams = self.limits.max_batch > 1 and threads != 1
        loading = Loading(
            self._load,
            self._install,
            self.worker.retire,
            self.worker.is_used,
            streams=streams,
            trusted=self._offer.trusted,
            limit_bytes=self._offer.memory_limit_bytes,
        )
        self.shelf = Shelf(loading)
        self._others: asyncio.Task[None] | None = None  # loads what fits beside the first
        for name, what in (("waiting", "Images waiting for a slot"), ("running", "Images being drawn")):
            self.metrics.watch(f"fastcache_images_{name}", what, lambda name=name: getattr(self.worker, name))
        for name in ("running", "waiting"):
            what = f"Jobs {name}"
            self.metrics.watch(
                f"fastcache_num_requests_{name}", what, lambda name=name: getattr(self.worker, f"jobs_{name}")
            )
        self.metrics.watch("fastcache_slot_bytes", "Memory of images in flight", lambda: self.worker.slot_bytes)
        self.metrics.watch("fastcache_models_bytes", "Memory of loaded bundles", lambda: self.shelf.held_bytes)

    @property
    def is_loading(self) -> bool:
        """Whether a thread is loading a bundle, be it that nobody waits for it any more."""
        return self.shelf.is_loading

    @property
    def served(self) -> Served | None:
        """The first model's bundle, if it is loaded."""
        return self.shelf.first.served if self.shelf.entries else None

    async def start(self) -> None:
        """Load the first bundle and begin to serve. Raises: as `fastcache.load`; the state is then `broken`."""
        self.loop = asyncio.get_running_loop()
        try:
            self.plans = [read_plans(folder) for folder in self._offer.plans]
            entries = self.shelf.read(self._listed)
            require_used(self.plans, [entry.manifest for entry in entries])
            for entry in entries:
                self.shelf.add(entry)
            await self.shelf.load(self.shelf.first)
        except Exception as error:
            self._break(error)
            raise
        self.worker.start()
        if self.state == "loading":
            self.state = "ready"
            self._others = asyncio.create_task(self.shelf.load_what_fits())

    async def reload(self) -> None:
        """Read the file of models again, if there is one, and load every folder again, beside what is served.

        Then switch. Jobs accepted before are finished as they began. A model that does not load stays as it was.

        Raises: the first of what went wrong, as `start`.
        """
        async with self._changing:
            self.plans = [read_plans(folder) for folder in self._offer.plans]
            if self._offer.file is not None:
                self._listed = read_models(self._offer.file)
            failures, before = list[Exception](), list(self.shelf.entries.values())
            found, kept = list[Entry](), set[str]()
            for one in self._listed:
                try:
                    found.append(await asyncio.to_thread(self.shelf.entry, one))
                except Exception as error:
                    failures.append(error)
                    kept |= {old.name for old in before if old.listed == one}
            require_different(entry.name for entry in found)
            for entry in found:
                own = next((old for old in before if old.listed == entry.listed or old.name == entry.name), None)
                try:
                    await self._put(own, entry)
                    kept.add(entry.name)
                except Exception as error:
                    failures.append(error)
                    kept |= set() if own is None else {own.name}
            for name in self.shelf.entries.keys() - kept:
                self.shelf.drop(name)
            if failures:
                raise failures[0]

    async def _put(self, own: Entry | None, entry: Entry) -> None:
        """Offer a model, in another's place if there is one. Raises: as loading."""
        if self.state != "ready":
            return
        if own is None:
            self.shelf.add(entry)
        elif own.served is None:  # loaded when it is asked for
            self.shelf.replace(own, entry)
        else:
            await self.shelf.swap(own, entry)

    async def put_model(self, name: str, engines: Path) -> Entry:
        """Offer a bundle under a name, loaded, in place of another of that name, which stays if it does not load.

        Raises: `ApiError`.
        """
        async with self._changing:
            own, entry = self.shelf.entries.get(name), None
            try:
                entry = await asyncio.to_thread(self.shelf.entry, Listed(engines, name))
                await self._put(own, entry)
                if entry.served is None:
                    await asyncio.shield(self.shelf.load(entry))
            except Exception as error:
                if entry is not None and self.shelf.entries.get(name) is entry:
                    self.shelf.restore(own, entry)
                raise ApiError(409, f"engines: {error}", code="model_not_loaded", param="engines") from None
            self._listed = [one.listed for one in self.shelf.entries.values()]
            return entry

    async def drop_model(self, name: str) -> None:
        """Offer a model no more. Raises: `ApiError` for one that there is not, and for the last one."""
        async with self._changing:
            self.shelf.drop(name)
            self._listed = [one.listed for one in self.shelf.entries.values()]

    def _load(self, folder: Path, name: str) -> Served:
        pipe = FastCachePipeline(open_bundle(folder, self._offer.trusted), threads=self._threads)
        executor = Executor(pipe, self.limits.max_batch, threads=self._threads)
        executor.warm_up()
        return Served(next(self._numbers), executor, name, plans_for(self.plans, pipe.bundle.manifest))

    def _install(self, served: Served) -> None:
        self.worker.install(served.number, served.executor)
        manifest, slots = served.manifest, served.executor.count
        _log.info("serving %s, %s, bundle %s", served.model, ", ".join(served.sizes), manifest.bundle_sha256[:16])
        most = served.executor.lanes(manifest.sizes[0]).most_bytes / 2**20
        _log.info("%d images at once, which take at most %.0f MiB of the usual size", slots, most)
        if slots < self.limits.max_batch:
            _log.warning(
                "at most %d images at once, for the bundle was built for %s; build with --batch 1:%d:%d for %d",
                *(slots, manifest.profiles["batch"], min(4, self.limits.max_batch), *(self.limits.max_batch,) * 2),
            )

    def _gone_in_thread(self, number: int) -> None:
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self.shelf.gone, number)

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
        served, count = await self._serving(asked, arrived), asked.count
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
            self.worker.release(count, served.number)
            if known.ended is None:
                del self._known[name]
            raise
        self.metrics.plans.labels(job.content.plan_name).inc()
        _log.info("job %s: %d images, prompt of %s", name, count, told(asked.prompt))
        self.worker.submit(job)
        return Ticket(job, served.model, served.manifest, events)

    async def _prepare(self, asked: ImageRequest, arrival: Arrival, served: Served) -> Job[Order]:
        """The job, from one of few threads; dropped where it has not begun when its client leaves or its time is up."""
        work = self._pool.submit(prepare, asked, arrival, served, self.limits, self.worker.latency_s)
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
        known = self._known.get(job_id)
        if known is None or known.owner != owner:
            message = "there is no job of this name, or it ended long ago"
            raise ApiError(404, message, code="job_not_found", param="job_id")
        if not self.worker.cancel(job_id) and known.ended is None:
            self._remember(job_id, "cancelled")  # it is in preparation
        return known.ended or "cancelled"

    def _post(self, job: Job[Order], events: asyncio.Queue[Event], event: Event, context: Context) -> None:
        """An event, from the worker's thread or another, to whoever follows the job, in its request's context."""

        def put() -> None:
            events.put_nowait(event)
            if isinstance(event, Done):  # here, where no lock is held that a log could hold up
                _log.info("job %s: %s", job.id, event.failure or "drawn")

        if isinstance(event, Done):
            self._remember(job.id, event.failure or "drawn")
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed, so nobody follows
                self.loop.call_soon_threadsafe(put, context=context)

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
        self.shelf.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.worker.stop)

    def _broken_in_thread(self, error: Exception) -> None:
        if self.loop is not None:
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._break, error)

    def _break(self, error: Exception) -> None:
        self.state, self.failure = "broken", error
        self.ended.set()
