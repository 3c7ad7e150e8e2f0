"""A CPU bundle's engines -> engines of which several calls run at once, a thread each, for images in company.

On a CPU a thread to an image takes less than all threads to a batch: nothing waits at the end of each layer, and every
call has the one shape that a backend compiled for. Per image of the bundled model's full step, on two busy cores, in
processor time: ONNX Runtime 33 ms against 53 in a batch of 8 and 65 alone, OpenVINO 32 against 39 and 40. On idle ones
8 clients get 1.2 times the pictures of one: an image alone keeps both cores busy for three quarters of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

import fastcache_engines
from fastcache.bundle.bundle import Bundle
from fastcache.bundle.manifest import Role
from fastcache_engines import Engine, LoadOptions


class Streams:
    """As many calls at once as there are threads. `engines` are those of the passes, by name."""

    def __init__(self, engines: Mapping[str, Engine], threads: int) -> None:
        self.engines = engines
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastcache-stream")

    def run(self, calls: Sequence[Callable[[], object]]) -> None:
        """Make all calls, and return when all have ended. Raises: what the first that failed raised."""
        running = [self._pool.submit(call) for call in calls]
        wait(running)
        for one in running:
            one.result()


def load_streams(bundle: Bundle, threads: int = 0) -> Streams | None:
    """Streams for a bundle, whose weights they hold once more; None where a batch is the better way, or the only one.

    Raises: as the engines' loading.
    """
    manifest, threads = bundle.manifest, threads or torch.get_num_threads()
    backend = fastcache_engines.backend(manifest.backend)
    if threads == 1 or manifest.device_type not in backend.CAPABILITIES.concurrent:
        return None

    def load(role: Role) -> Engine:
        entry = manifest.engines[role]
        options = LoadOptions(
            manifest.device_type,
            entry.dtype,
            threads,
            streams=threads,
            inputs=entry.inputs,
            outputs=entry.outputs,
            identity=manifest.identity_of(role),
        )
        with bundle.reading():
            return backend.load(bundle.engine_path(role), options)

    roles = dict.fromkeys(role for one in manifest.passes.values() for role in one.engines)
    return Streams({role: load(role) for role in roles}, threads)
