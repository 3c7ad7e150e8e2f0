"""The thread that owns the engines: it asks the desk what to run, has an executor run it, and tells the jobs.

Knows nothing about HTTP, nor who runs next.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from fastcache.cut.names import FULL
from fastcache.serve.engine.desk import Desk
from fastcache.serve.engine.device import DeviceBroken, check_device, is_out_of_memory
from fastcache.serve.engine.events import Drawn, Failure, Preview, Stepped
from fastcache.serve.engine.executor import Executor
from fastcache.serve.engine.order import Order
from fastcache.serve.engine.scheduler import Batch, Image
from fastcache.serve.http.metrics import Metrics

_log = logging.getLogger("fastcache.serve")

# Failures of an engine in a row, on a device that still adds, after which a new process is the better bet.
_FAILURES_IN_A_ROW: Final = 3


class _TooLarge(Exception):
    """An engine call ran out of memory; nothing has moved."""

    def __init__(self, cause: Exception, executor: Executor) -> None:
        super().__init__(str(cause))
        self.cause, self.executor = cause, executor


class Worker:
    """Draws what the desk says.

    `broken` is called, once, when only a new process can help, and `gone` of each bundle whose memory was given back.
    """

    def __init__(
        self, desk: Desk, metrics: Metrics, broken: Callable[[Exception], None], gone: Callable[[int], None]
    ) -> None:
        self._desk, self._metrics, self._broken, self._gone = desk, metrics, broken, gone
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="fastcache-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the engine call at hand."""
        self._desk.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        try:
            while (turn := self._desk.next_turn()) is not None:
                if turn.gone:
                    _give_back()
                for bundle in turn.gone:
                    self._gone(bundle)
                for image in turn.admitted:
                    self._begin(image)
                if turn.batch is not None:
                    self._run(turn.batch)
        except Exception as error:  # also a defect here, which would leave every client waiting
            if not isinstance(error, DeviceBroken):
                _log.exception("the worker failed")
            self._desk.stop()
            self._desk.end_all("broken")
            self._broken(error)

    def _begin(self, image: Image[Order]) -> None:
        """Fill an admitted image's slot."""
        order, start = image.job.content, time.monotonic()
        with self._desk.changed:
            slot, executor = image.slot, self._desk.executors.get(image.job.bundle)
        if slot is None or executor is None:  # cancelled meanwhile
            return
        if order.started is None:
            order.started = start
            self._metrics.stages.labels("queue").observe(start - order.created)
            self._metrics.queue_time.observe(start - order.created)
        try:
            executor.fill(slot, order.drawing, image.index)
        except Exception as error:
            self._blame(error, executor, [image])
        took = time.monotonic() - start
        executor.speeds.note("encode", took)
        self._metrics.stages.labels("encode").observe(took)

    def _run(self, batch: Batch[Order], *, again: bool = False) -> None:
        """A batch's engine call; after running out of memory once more, in two halves."""
        try:
            self._step(batch)
        except _TooLarge as error:
            if again or len(batch.images) == 1:
                self._blame(error.cause, error.executor, batch.images)
                return
            with self._desk.changed:
                halves = self._desk.scheduler.split(batch)
            largest = len(halves[0].images)
            _log.warning("out of memory with %d images at once; at most %d from now on", len(batch.images), largest)
            for half in halves:
                self._run(half, again=True)

    def _step(self, batch: Batch[Order]) -> None:
        """One engine call, and what follows from it for each image. Raises: `_TooLarge`, nothing having moved."""
        with self._desk.changed:
            images = [image for image in batch.images if image.slot is not None]
            steps = [(image.slot, image.step) for image in images if image.slot is not None]
            executor = self._desk.executors.get(batch.kind.bundle)
        if not steps or executor is None:
            return
        full, start = batch.kind.name == FULL, time.monotonic()
        try:
            executor.run(steps, name=batch.kind.name, guided=batch.kind.guided)
        except Exception as error:
            if is_out_of_memory(error):
                raise _TooLarge(error, executor) from error
            self._blame(error, executor, images)
            return
        self._failures = 0
        figures, took = self._metrics.unet["full" if full else "shallow"], time.monotonic() - start
        executor.speeds.note_step(batch.kind.name, batch.kind.guided, took / len(steps))
        figures.seconds.observe(took)
        figures.calls.inc()
        figures.steps.inc(len(steps))
        self._metrics.passes.labels(batch.kind.name).inc(len(steps))
        self._metrics.batch.observe(len(steps))
        with self._desk.changed:
            cost = executor.speeds.step_s(batch.kind.name, batch.kind.guided)
            self._desk.scheduler.note_cost(batch.kind.bundle, batch.kind.name, cost)
            moved = self._desk.scheduler.advance(images)
        if len(moved) < len(images):
            self._metrics.abandoned.inc(len(images) - len(moved))
        try:
            self._tell(moved, full, executor)
            if finished := [image for image in moved if image.is_finished]:
                self._draw(finished, executor)
        except Exception as error:
            self._blame(error, executor, moved)

    def _tell(self, moved: list[Image[Order]], full: bool, executor: Executor) -> None:
        for image in moved:
            order, slot, step = image.job.content, image.slot, image.step - 1
            if order.each_step:
                order.notify(Stepped(image.index, step, image.job.plan.num_steps, full))
            if step in order.preview_steps and slot is not None:
                picture = executor.preview(slot, step)
                if step == min(order.preview_steps) and image.index == 0:
                    self._metrics.first_preview.observe(time.monotonic() - order.created)
                order.notify(Preview(image.index, sorted(order.preview_steps).index(step), picture))

    def _draw(self, finished: list[Image[Order]], executor: Executor) -> None:
        with self._desk.changed:
            left = [(image, image.slot) for image in finished if image.slot is not None]
        if not left:
            return
        start = time.monotonic()
        pictures = executor.pictures([slot for _, slot in left])
        end = time.monotonic()
        self._metrics.stages.labels("decode").observe(end - start)
        executor.speeds.note("decode", (end - start) / len(left))
        with self._desk.changed:
            for (image, slot), picture in zip(left, pictures, strict=True):
                if image.slot is None:  # cancelled while it was decoded
                    continue
                executor.clear(slot)
                order = image.job.content
                order.notify(Drawn(image.index, picture))
                if order.started is not None:
                    self._metrics.stages.labels("draw").observe(end - order.started)
                    self._desk.note_image(end - order.started)
                if self._desk.scheduler.finish(image):
                    self._metrics.stages.labels("total").observe(end - order.created)
                    self._metrics.latency.labels(order.route).observe(end - order.created)
                    self._desk.end(image.job, None)

    def _blame(self, error: Exception, executor: Executor, images: Sequence[Image[Order]]) -> None:
        """Fail the jobs of images that failed. Raises: `DeviceBroken` if it is the device that fails."""
        failure: Failure = "out_of_memory" if is_out_of_memory(error) else "failed"
        _log.error("an engine failed: %s", type(error).__name__, exc_info=error)
        with self._desk.changed:
            for image in images:
                self._desk.end(image.job, failure)
        check_device(executor.device)
        if failure == "failed":
            self._failures += 1
        if self._failures >= _FAILURES_IN_A_ROW:
            raise DeviceBroken(f"expected the engines to run, got {self._failures} failures in a row; start again")


def _give_back() -> None:
    """Collect what an executor left, which hangs in cycles, and have glibc return it.

    It would keep in its arenas what other threads allocated: 45 MB a swap of the bundled model.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
