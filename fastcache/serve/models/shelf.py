"""The models of a server: which are loaded, which is let go to make room, and who waits for one to be loaded.

Lives in the event loop; loads happen one at a time, in a thread. A model that is let go finishes what was accepted for
it. Knows bundles by name and size in memory; nothing about requests or HTTP routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from fastcache.bundle.bundle import read_manifest
from fastcache.bundle.manifest import Manifest
from fastcache.errors import BundleError
from fastcache.serve.engine.requests import Served
from fastcache.serve.http.errors import ApiError
from fastcache.serve.models.listed import Listed, require_different
from fastcache.serve.models.memory import expected_bytes, seen

_log = logging.getLogger("fastcache.serve")

T = TypeVar("T")

_LOAD_S: Final = 5  # what a load is said to take before there was one


@dataclass(eq=False)
class Entry:
    """A model by its name: its bundle as it was last read, and if it is loaded what serves it."""

    name: str
    listed: Listed
    manifest: Manifest
    needs_bytes: int
    created: int = field(default_factory=lambda: int(time.time()))
    served: Served | None = None
    used: float = 0.0  # when it was last asked for, by time.monotonic
    waiting: int = 0  # requests that wait for it to be loaded
    loading: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class Loading:
    """How bundles are loaded: by `load` in a thread, and told to `install` and `retire` who draws with them."""

    load: Callable[[Path, str], Served]
    install: Callable[[Served], None]
    retire: Callable[[int], None]
    is_used: Callable[[int], bool]
    streams: bool = True
    trusted: Path | None = None
    limit_bytes: int | None = None


class Shelf:
    """Models in the order in which they were named; the first is drawn with where a request names none."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading
        self.entries: dict[str, Entry] = {}
        self._held: dict[int, int] = {}  # bytes of the bundles in memory, by number, those that are let go included
        self._one_at_a_time = asyncio.Lock()
        self._freed = asyncio.Event()
        self._thread: Future[tuple[Served, int]] | None = None
        self._load_s = float(_LOAD_S)

    @property
    def is_loading(self) -> bool:
        """Whether a thread is loading a bundle, be it that nobody waits for it any more."""
        return self._thread is not None and not self._thread.done()

    @property
    def first(self) -> Entry:
        return next(iter(self.entries.values()))

    @property
    def held_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def retry_after_s(self) -> int:
        """About how long a load takes. Units: whole seconds, 1 to 60."""
        return max(1, min(60, round(self._load_s)))

    def read(self, models: Sequence[Listed]) -> list[Entry]:
        """Entries of models, none loaded. Raises: `BundleError` for what is no bundle; `ValueError` for equal names."""
        entries = [self.entry(one) for one in models]
        require_different(entry.name for entry in entries)
        return entries

    def entry(self, one: Listed) -> Entry:
        """A model's entry, not loaded. Raises: `BundleError` for what is no bundle, or does not fit the limit alone."""
        manifest, limit = read_manifest(one.engines, self._loading.trusted), self._loading.limit_bytes
        needs = expected_bytes(manifest, streams=self._loading.streams)
        if limit is not None and needs > limit:
            raise BundleError(
                f"expected --memory-limit of {needs / 2**20:.0f} MiB or more for the weights in {one.engines}, "
                f"got {limit / 2**20:.0f} MiB; allow more"
            )
        return Entry(one.called(manifest), one, manifest, needs)

    def find(self, name: str | None) -> Entry:
        """Raises: `ApiError` for a model that is not offered."""
        entry = self.first if name is None else self.entries.get(name)
        if entry is None:
            known = ", ".join(list(self.entries)[:8])
            message = f"model: expected one of {known}, got another; /v1/models lists what is served"
            raise ApiError(404, message, code="model_not_found", param="model")
        return entry

    async def ready(self, name: str | None, most: int, until: float) -> tuple[Entry, Served]:
        """A model that is loaded; waited for until then, by `time.monotonic`, if `most` or fewer do.

        What comes back is valid until the caller next awaits. Raises: `ApiError`.
        """
        while True:
            entry = self.find(name)
            entry.used = time.monotonic()
            if entry.served is not None:
                return entry, entry.served
            if entry.waiting >= most:
                raise self._come_again(f"{entry.name} is being loaded, and others wait for it; ask again")
            entry.waiting += 1
            try:
                await asyncio.wait_for(asyncio.shield(self.load(entry)), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise self._come_again(f"{entry.name} is still being loaded; ask again") from None
            except (asyncio.CancelledError, ApiError):
                raise
            except Exception as error:
                _log.error("%s did not load: %s", entry.name, error)
                message = f"{entry.name} could not be loaded; the server's log says why"
                raise ApiError(503, message, code="model_unavailable", param="model", retry_after_s=60) from None
            finally:
                entry.waiting -= 1

    def _come_again(self, message: str) -> ApiError:
        return ApiError(503, message, code="model_loading", param="model", retry_after_s=self.retry_after_s)

    def load(self, entry: Entry) -> asyncio.Task[None]:
        """The load of a model, which goes on whoever waits for it; of one no longer offered nothing."""
        if entry.loading is None or entry.loading.done():
            entry.loading = asyncio.create_task(self._load(entry))
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # told to who waits
        return entry.loading

    async def _load(self, entry: Entry) -> None:
        async with self._one_at_a_time:
            if entry.served is not None or not self._is_offered(entry):
                return
            await self._make_room(entry.name, entry.needs_bytes)
            served = await self._from_disk(entry)
            entry.served, entry.manifest = served, served.manifest
            self._loading.install(served)
            if not self._is_offered(entry):  # dropped meanwhile
                self._let_go(entry)
            self._trim(entry)

    def _is_offered(self, entry: Entry) -> bool:
        return self.entries.get(entry.name) is entry

    async def _from_disk(self, entry: Entry) -> Served:
        """A bundle's engines, in memory and warm. No backend can be told to stop, so a thread that is left goes on."""
        start, device = time.monotonic(), entry.manifest.device_type
        folder, name = entry.listed.engines, entry.name
        self._thread = in_background(lambda: seen(lambda: self._loading.load(folder, name), device))
        served, grown = await asyncio.wrap_future(self._thread)
        self._thread = None  # it holds what was loaded, which is to be gone before another bundle is loaded
        self._load_s = time.monotonic() - start
        entry.needs_bytes = max(grown, expected_bytes(served.manifest, streams=self._loading.streams))
        self._held[served.number] = entry.needs_bytes
        _log.info("%s takes %.0f MiB, loaded in %.1f s", name, entry.needs_bytes / 2**20, self._load_s)
        return served

    async def _make_room(self, name: str, needs: int) -> None:
        """Let models go, the one not asked for the longest first, until another fits, or is alone."""
        limit = self._loading.limit_bytes
        while limit is not None and self.held_bytes + needs > limit:
            self._freed.clear()
            if others := self._loaded(name):
                oldest = self._oldest(others)
                if oldest.waiting:  # it has just been loaded: who waited for it is about to have it
                    await asyncio.sleep(0)
                    continue
                _log.info("%s makes room for %s", oldest.name, name)
                self._let_go(oldest)
            elif not self._held.keys() - {entry.served and entry.served.number for entry in self.entries.values()}:
                _log.warning("%s alone takes more than the memory limit", name)
                return
            # What is let go finishes its jobs first, and then gives its memory back.
            await self._freed.wait()

    def _trim(self, last: Entry) -> None:
        """Let go what does not fit after all beside the last one loaded, which took more than its files said."""
        limit = self._loading.limit_bytes
        while limit is not None and (loaded := self._loaded(last.name)):
            held = sum(self._held.get(entry.served.number, 0) for entry in (*loaded, last) if entry.served is not None)
            if held <= limit:
                return
            self._let_go(self._oldest(loaded))

    def _loaded(self, but: str) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.served is not None and entry.name != but]

    def _oldest(self, loaded: Sequence[Entry]) -> Entry:
        """Who is to make room: one that nobody draws with, and of these the one not asked for the longest."""
        return min(loaded, key=lambda entry: (entry.waiting > 0, self._is_busy(entry), entry.used))

    def _is_busy(self, entry: Entry) -> bool:
        return entry.served is not None and self._loading.is_used(entry.served.number)

    def _let_go(self, entry: Entry) -> None:
        if entry.served is not None:
            number, entry.served = entry.served.number, None
            self._loading.retire(number)

    def gone(self, number: int) -> None:
        """A bundle's memory was given back."""
        self._held.pop(number, None)
        self._freed.set()

    async def swap(self, entry: Entry, other: Entry) -> None:
        """Put another bundle into a model's place, or load the same folder again, without refusing a request.

        Beside the one that serves, where both fit the limit; else after it. Raises: as loading; what was served goes on
        being served.
        """
        async with self._one_at_a_time:
            limit, before = self._loading.limit_bytes, entry.served
            if limit is not None and self.held_bytes + other.needs_bytes > limit:
                await self._alone(entry, other)
            served = await self._from_disk(other)
            other.served, other.manifest, other.used = served, served.manifest, entry.used
            self._loading.install(served)
            if before is not None and entry.served is before:
                self._let_go(entry)
            self.replace(entry, other)

    def replace(self, entry: Entry, other: Entry) -> None:
        """Put a model into another's place in the order."""
        every = [
            other if own is entry else own for own in self.entries.values() if own.name != other.name or own is entry
        ]
        self.entries = {own.name: own for own in every}

    def restore(self, own: Entry | None, entry: Entry) -> None:
        """Undo the offer of a model that did not load: what it took the place of is offered again."""
        if own is None:
            del self.entries[entry.name]
        else:
            self.replace(entry, own)

    async def _alone(self, entry: Entry, other: Entry) -> None:
        """Make room by letting others go, and the one that is to be swapped last."""
        needs, limit = other.needs_bytes, self._loading.limit_bytes or 0
        own = 0 if entry.served is None else self._held.get(entry.served.number, 0)
        if own + needs > limit:
            self._let_go(entry)
        await self._make_room(entry.name, needs)

    def add(self, entry: Entry) -> None:
        self.entries[entry.name] = entry

    def drop(self, name: str) -> None:
        """Offer a model no more; what was accepted for it is finished. Raises: `ApiError`."""
        entry = self.find(name)
        if len(self.entries) == 1:
            raise ApiError(409, f"model: expected another model to stay, got the last one, {name}", code="last_model")
        del self.entries[name]
        self._let_go(entry)

    def close(self) -> None:
        """Wait for no load any more."""
        for entry in self.entries.values():
            if entry.loading is not None:
                entry.loading.cancel()

    async def load_what_fits(self) -> None:
        """Load the models that fit beside those that are loaded, in their order."""
        for entry in list(self.entries.values()):
            limit = self._loading.limit_bytes
            if entry.served is None and (limit is None or self.held_bytes + entry.needs_bytes <= limit):
                with contextlib.suppress(Exception):  # who asks for it is told
                    await asyncio.shield(self.load(entry))


def in_background(work: Callable[[], T]) -> Future[T]:
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
