"""An application -> a process that serves it: a socket, uvicorn, and what signals mean.

SIGTERM and SIGINT drain and end with 0; SIGHUP loads every bundle again and switches to it. Knows nothing about routes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from fastcache.errors import BackendUnavailable
from fastcache.serve.engine.device import DeviceBroken
from fastcache.serve.http.app import create_app
from fastcache.serve.http.guard import is_loopback, read_keys
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.protocol import Crowd, Protocol, places
from fastcache.serve.http.service import Service
from fastcache.serve.models.listed import Offer

_log = logging.getLogger("fastcache.serve")

_UNREAD_AT_THE_END_S: Final = 5.0  # what a client that reads nothing may hold up the end by
_RELOADS: Final = 2  # one that runs, and one for what changed since it began


def serve(
    offer: Offer,
    *,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    admin_key_file: Path | None = None,
    allowed_hosts: Sequence[str] = (),
    threads: int = 0,
    listening: Callable[[str], None] = lambda url: None,
) -> bool:
    """Serve bundles until a signal ends it. `listening` is told the address once there is one.

    Returns whether nothing is left running: False where a signal came while engines were loading.

    Raises: `ValueError` for an address beyond this machine without keys; `OSError` for one that is taken; what loading
    the bundle raises; `BackendUnavailable` where the device broke, for a supervisor to start again.
    """
    if api_key_file is None and not is_loopback(host):
        raise ValueError(f"expected --api-key-file to serve on host {host}, got none; or serve on 127.0.0.1")
    keys = read_keys(api_key_file) if api_key_file is not None else ()
    admin_keys = read_keys(admin_key_file, "--admin-key-file") if admin_key_file is not None else ()
    names = [host, *allowed_hosts, *(("localhost", "127.0.0.1", "[::1]") if is_loopback(host) else ())]
    hosts = names if is_loopback(host) or allowed_hosts else None
    service = Service(offer, limits, threads=threads)
    app = create_app(service, keys=keys, admin_keys=admin_keys, hosts=hosts)
    with listen(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        listening(f"http://{address}:{listener.getsockname()[1]}")
        asyncio.run(_serve(Server(app, service), service, listener))
    if isinstance(service.failure, DeviceBroken):
        raise BackendUnavailable(str(service.failure)) from service.failure
    if service.failure is not None:
        raise service.failure
    return not service.shelf.is_loading


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: `OSError` for an address that is taken or not this machine's."""
    # Named as TCP, or asyncio leaves Nagle's algorithm on for its connections: 40 ms more for every answer.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere it means another thing
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # asyncio sets its own (`places`)
    except OSError:
        listener.close()
        raise
    return listener


async def _serve(server: Server, service: Service, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    reloads = set[asyncio.Task[None]]()

    def reload() -> None:
        if len(reloads) >= _RELOADS:
            return
        task = loop.create_task(_reload(service))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, reload)
    await server.serve(sockets=[listener])
    for task in reloads:
        task.cancel()


async def _reload(service: Service) -> None:
    _log.info("loading every bundle again")
    try:
        await service.catalogue.reload()
    except Exception as error:
        _log.error("what was served before goes on being served: %s", error)


class Server(uvicorn.Server):
    """uvicorn's, which on a signal drains the service first, and then ends as if nothing had happened."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        limits = service.limits
        most, waiting = places(limits.max_connections)
        self._service, self._crowd = service, Crowd(most, limits.write_timeout_s, limits.timeout_s)
        protocol: Any = functools.partial(Protocol, crowd=self._crowd)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=waiting,
                h11_max_incomplete_event_size=limits.max_header_bytes,
                timeout_graceful_shutdown=int(limits.timeout_s) + 10,  # longer than any request may take
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.end()

    def end(self) -> None:
        """Drain, and end once every request is answered. From any thread, or a signal's handler."""
        loop = self._service.loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._service.drain)
        self._crowd.write_timeout_s = min(self._crowd.write_timeout_s, _UNREAD_AT_THE_END_S)
        self.should_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watching = [asyncio.create_task(self._end_when_broken()), asyncio.create_task(self._crowd.cut_unread())]
        try:
            await super().serve(sockets)
        finally:
            for task in watching:
                task.cancel()

    async def _end_when_broken(self) -> None:
        await self._service.ended.wait()
        self.should_exit = True
