"""Which models a server offers, from its start on: loaded, put in each other's places, and dropped.

Lives in the event loop. Knows bundles, plans and who draws with them; nothing about requests.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

from fastcache.bundle.bundle import open_bundle
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.serve.engine.desk import Desk
from fastcache.serve.engine.executor import Executor
from fastcache.serve.engine.requests import Served
from fastcache.serve.engine.warm import warm_up
from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.limits import Limits
from fastcache.serve.models.listed import Listed, Offer, read_models, require_different
from fastcache.serve.models.quality import PlanFolder, plans_for, read_plans, require_used
from fastcache.serve.models.shelf import Entry, Loading, Shelf

_log = logging.getLogger("fastcache.serve")


class Catalogue:
    """The models on the shelf, after an offer that may be read again and changed.

    Of several as many are loaded as fit the memory limit, the others when they are asked for. `is_ready` says whether
    the server takes requests: while it ends nothing new is offered.
    """

    def __init__(
        self, offer: Offer, limits: Limits, desk: Desk, is_ready: Callable[[], bool], *, threads: int = 0
    ) -> None:
        self._offer, self._limits, self._desk, self._is_ready = offer, limits, desk, is_ready
        self._listed, self._threads = list(offer.models), threads
        self._numbers = itertools.count()
        self._changing = asyncio.Lock()  # which models there are
        self._others: asyncio.Task[None] | None = None  # loads what fits beside the first
        self.plans: list[PlanFolder] = []
        loading = Loading(
            self._load,
            self._install,
            desk.retire,
            desk.is_used,
            streams=limits.max_batch > 1 and threads != 1,
            trusted=offer.trusted,
            limit_bytes=offer.memory_limit_bytes,
        )
        self.shelf = Shelf(loading)

    async def start(self) -> None:
        """Load the first bundle. Raises: as `fastcache.load`; `ValueError` for plans that fit no model."""
        self.plans = [read_plans(folder) for folder in self._offer.plans]
        entries = self.shelf.read(self._listed)
        require_used(self.plans, [entry.manifest for entry in entries])
        for entry in entries:
            self.shelf.add(entry)
        await self.shelf.load(self.shelf.first)

    def load_others(self) -> None:
        """Load what fits beside the first, in the background."""
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
        if not self._is_ready():
            return
        if own is None:
            self.shelf.add(entry)
        elif own.served is None:  # loaded when it is asked for
            self.shelf.replace(own, entry)
        else:
            await self.shelf.swap(own, entry)

    async def put(self, name: str, engines: Path) -> Entry:
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

    async def drop(self, name: str) -> None:
        """Offer a model no more. Raises: `ApiError` for one that there is not, and for the last one."""
        async with self._changing:
            self.shelf.drop(name)
            self._listed = [one.listed for one in self.shelf.entries.values()]

    def _load(self, folder: Path, name: str) -> Served:
        pipe = FastCachePipeline(open_bundle(folder, self._offer.trusted), threads=self._threads)
        executor = Executor(pipe, self._limits.max_batch, threads=self._threads)
        warm_up(executor)
        return Served(next(self._numbers), executor, name, plans_for(self.plans, pipe.bundle.manifest))

    def _install(self, served: Served) -> None:
        self._desk.install(served.number, served.executor)
        manifest, slots = served.manifest, served.executor.count
        _log.info("serving %s, %s, bundle %s", served.model, ", ".join(served.sizes), manifest.bundle_sha256[:16])
        most = served.executor.lanes(manifest.sizes[0]).most_bytes / 2**20
        _log.info("%d images at once, which take at most %.0f MiB of the usual size", slots, most)
        if slots < self._limits.max_batch:
            _log.warning(
                "at most %d images at once, for the bundle was built for %s; build with --batch 1:%d:%d for %d",
                *(slots, manifest.profiles["batch"], min(4, self._limits.max_batch), *(self._limits.max_batch,) * 2),
            )
