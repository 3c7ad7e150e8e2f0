"""The thread that owns the engines: it asks the scheduler what to run, has an executor run it, and tells the jobs.

Everything else calls in from other threads, under one lock that is never held while an engine runs. Knows nothing
about HTTP.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from fastcache.cut.names import FULL
from fastcache.loop.plan import CachePlan
from fastcache.serve.engine.events import Done, Drawn, Event, Failure, Preview, Stepped
from fastcache.serve.engine.executor import DeviceBroken, Drawing, Executor, is_out_of_memory
from fastcache.serve.engine.scheduler import Batch, Image, Job, Scheduler
from fastcache.serve.engine.speeds import latency_s
from fastcache.serve.http.metrics import Metrics

_log = logging.getLogger("fastcache.serve")

# Failures of an engine in a row, on a device that still adds, after which a new process is the better bet.
_FAILURES_IN_A_ROW: Final = 3


@dataclass(eq=False)
class Order:
    """What a job brings along: what to draw, whom to tell, and how much. Called from the worker's thread."""

    drawing: Drawing
    notify: Callable[[Event], None]
    preview_steps: Collection[int] = ()
    each_step: bool = False
    route: str = "generations"
    plan_name: str = "uncached"
    quality: str | None = None
    created: float = field(default_factory=time.monotonic)
    started: float | None = None


class _TooLarge(Exception):
    """An engine call ran out of memory; nothing has moved."""

    def __init__(self, cause: Exception, executor: Executor) -> None:
        super().__init__(str(cause))
        self.cause, self.executor = cause, executor


class Worker:
    """Owns the scheduler and the executors.

    `broken` is called, once, when only a new process can help, and `gone` of each bundle whose memory was given back.
    """

    def __init__(
        self,
        queue: int,
        metrics: Metrics,
        broken: Callable[[Exception], None],
        gone: Callable[[int], None] = lambda bundle: None,
    ) -> None:
        self._scheduler, self._metrics, self._broken = Scheduler[Order](queue), metrics, broken
        self._gone = gone
        self._executors: dict[int, Executor] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._litter: list[int] = []  # bundles whose executors were let go
        self._image_s = 1.0  # recent seconds from an image's start to its end, for Retry-After
        self._thread = threading.Thread(target=self._work, name="fastcache-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the engine call at hand; the jobs left are told that the server drains."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def install(self, bundle: int, executor: Executor) -> None:
        """Serve one more bundle from now on."""
        with self._changed:
            self._executors[bundle] = executor
            self._scheduler.open(bundle, executor.count, executor.express)

    def retire(self, bundle: int) -> None:
        """Let a bundle go, once what was accepted for it is finished."""
        with self._changed:
            self._scheduler.retire(bundle)
            self._forget_idle()

    def is_used(self, bundle: int) -> bool:
        """Whether a job needs a bundle, one in preparation included."""
        with self._changed:
            return self._scheduler.is_used(bundle)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def jobs_waiting(self) -> int:
        """Jobs of which no image has begun."""
        with self._changed:
            return len(self._scheduler.queued)

    @property
    def jobs_running(self) -> int:
        with self._changed:
            return len(self._scheduler.jobs) - len(self._scheduler.queued)

    @property
    def outstanding(self) -> int:
        return self._scheduler.outstanding

    @property
    def bundles(self) -> int:
        return len(self._executors)

    @property
    def slot_bytes(self) -> int:
        """What the images in flight take: inputs, features and histories of all slots, used or not."""
        return sum(executor.held_bytes for executor in list(self._executors.values()))

    @property
    def retry_after_s(self) -> int:
        """About when the next image will be done. Units: whole seconds, 1 to 60."""
        return max(1, min(60, round(self._image_s)))

    def latency_s(self, bundle: int, plan: CachePlan, guided: bool, count: int) -> float:
        """When so many images by a plan would be done that were queued now, beside all that is accepted."""
        with self._changed:
            left = dict[str, float]()
            for image in (*self._scheduler.running, *self._scheduler.waiting):
                job, executor = image.job, self._executors.get(image.job.bundle)
                if executor is not None:
                    one = executor.speeds.image_s(job.plan, job.guided, image.step)
                    left[job.client] = left.get(job.client, 0.0) + one
            waits = self._scheduler.would_wait(bundle, count)
            speeds = self._executors[bundle].speeds
        own = speeds.encode_s + count * speeds.image_s(plan, guided)
        return latency_s(own, left.values(), waits=waits)

    def position(self, job_id: str) -> int | None:
        """How many images wait before a job of which none has begun; None of any other job."""
        with self._changed:
            job = self._scheduler.jobs.get(job_id)
            if job is None or job.has_begun:
                return None
            return next(k for k, image in enumerate(self._scheduler.waiting) if image.job is job)

    def reserve(self, images: int, bundle: int) -> None:
        """Keep room, and the bundle, for a job in preparation. Raises: `QueueFull`."""
        with self._changed:
            self._scheduler.reserve(images, bundle)

    def release(self, images: int, bundle: int) -> None:
        with self._changed:
            self._scheduler.release(images, bundle)
            self._forget_idle()

    def submit(self, job: Job[Order]) -> None:
        """Queue a job, for which room was reserved."""
        with self._changed:
            self._scheduler.add(job)
            self._changed.notify()

    def cancel(self, job_id: str, failure: Failure = "cancelled") -> bool:
        """Take a job out, wherever it is; an engine call at hand ends without it. Returns whether there was one."""
        with self._changed:
            job = self._scheduler.jobs.get(job_id)
            if job is not None:
                self._end(job, failure)
                self._changed.notify()
            return job is not None

    def refuse_queued(self) -> None:
        """End the jobs that have not begun; those running go on."""
        with self._changed:
            for job in self._scheduler.queued:
                self._end(job, "draining")

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (turn := self._next_turn()) and not self._litter:
                        if self._stopping:
                            return
                        self._changed.wait(self._until_deadline())
                if self._litter:
                    self._clear_up()
                admitted, batch = turn or ([], None)
                for image in admitted:
                    self._begin(image)
                if batch is not None:
                    self._run(batch)
        except Exception as error:  # also a defect here, which would leave every client waiting
            if not isinstance(error, DeviceBroken):
                _log.exception("the worker failed")
            with self._changed:
                self._stopping = True
                self._end_all("broken")
            self._broken(error)

    def _next_turn(self) -> tuple[list[Image[Order]], Batch[Order] | None] | None:
        """What to do now; the batch only once nobody is to be admitted, so that newcomers may share it."""
        for job in self._scheduler.overdue(time.monotonic()):
            self._end(job, "late")
        if self._stopping:
            self._end_all("draining")
        admitted = self._scheduler.admit()
        batch = None if admitted else self._scheduler.next_batch()
        return (admitted, batch) if admitted or batch else None

    def _until_deadline(self) -> float | None:
        deadline = self._scheduler.next_deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _begin(self, image: Image[Order]) -> None:
        """Fill an admitted image's slot."""
        order, start = image.job.content, time.monotonic()
        with self._changed:
            slot, executor = image.slot, self._executors.get(image.job.bundle)
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
            with self._changed:
                halves = self._scheduler.split(batch)
            largest = len(halves[0].images)
            _log.warning("out of memory with %d images at once; at most %d from now on", len(batch.images), largest)
            for half in halves:
                self._run(half, again=True)

    def _step(self, batch: Batch[Order]) -> None:
        """One engine call, and what follows from it for each image. Raises: `_TooLarge`, nothing having moved."""
        with self._changed:
            images = [image for image in batch.images if image.slot is not None]
            steps = [(image.slot, image.step) for image in images if image.slot is not None]
            executor = self._executors.get(batch.kind.bundle)
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
        with self._changed:
            cost = executor.speeds.step_s(batch.kind.name, batch.kind.guided)
            self._scheduler.note_cost(batch.kind.bundle, batch.kind.name, cost)
            moved = self._scheduler.advance(images)
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
        with self._changed:
            left = [(image, image.slot) for image in finished if image.slot is not None]
        if not left:
            return
        start = time.monotonic()
        pictures = executor.pictures([slot for _, slot in left])
        end = time.monotonic()
        self._metrics.stages.labels("decode").observe(end - start)
        executor.speeds.note("decode", (end - start) / len(left))
        with self._changed:
            for (image, slot), picture in zip(left, pictures, strict=True):
                if image.slot is None:  # cancelled while it was decoded
                    continue
                executor.clear(slot)
                order = image.job.content
                order.notify(Drawn(image.index, picture))
                if order.started is not None:
                    self._metrics.stages.labels("draw").observe(end - order.started)
                    self._image_s += 0.2 * (end - order.started - self._image_s)
                if self._scheduler.finish(image):
                    self._metrics.stages.labels("total").observe(end - order.created)
                    self._metrics.latency.labels(order.route).observe(end - order.created)
                    self._end(image.job, None)

    def _blame(self, error: Exception, executor: Executor, images: Sequence[Image[Order]]) -> None:
        """Fail the jobs of images that failed. Raises: `DeviceBroken` if it is the device that fails."""
        failure: Failure = "out_of_memory" if is_out_of_memory(error) else "failed"
        _log.error("an engine failed: %s", type(error).__name__, exc_info=error)
        with self._changed:
            for image in images:
                self._end(image.job, failure)
        executor.check_device()
        if failure == "failed":
            self._failures += 1
        if self._failures >= _FAILURES_IN_A_ROW:
            raise DeviceBroken(f"expected the engines to run, got {self._failures} failures in a row; start again")

    def _end_all(self, failure: Failure) -> None:
        for job in list(self._scheduler.jobs.values()):
            self._end(job, failure)

    def _end(self, job: Job[Order], failure: Failure | None) -> None:
        """Under the lock: a job's end, told once."""
        order = job.content
        if failure is not None and job.id not in self._scheduler.jobs:
            return
        self._scheduler.drop(job)
        self._metrics.jobs.labels(failure or "drawn").inc()
        order.notify(Done(failure))
        self._forget_idle()

    def _forget_idle(self) -> None:
        for bundle in self._scheduler.close_idle():
            del self._executors[bundle]
            self._litter.append(bundle)
            self._changed.notify()

    def _clear_up(self) -> None:
        with self._changed:
            bundles, self._litter = self._litter, []
        _give_back()
        for bundle in bundles:
            self._gone(bundle)


def _give_back() -> None:
    """Collect what an executor left, which hangs in cycles, and have glibc return it.

    It would keep in its arenas what other threads allocated: 45 MB a swap of the bundled model.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
