"""What other threads ask of the worker: take jobs in, say how they stand, end them; and what it is to do next.

Everything happens under one lock that is never held while an engine runs. Knows executors by what they hold and how
fast they are; runs none, and knows nothing about HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastcache.loop.plan import CachePlan
from fastcache.serve.engine.events import Done, Failure
from fastcache.serve.engine.executor import Executor
from fastcache.serve.engine.order import Order
from fastcache.serve.engine.scheduler import Batch, Image, Job, Scheduler
from fastcache.serve.engine.speeds import latency_s
from fastcache.serve.http.metrics import Metrics


@dataclass(frozen=True)
class Turn:
    """What to do now: bundles that are let go, images to begin, and once nobody is to begin a batch to run."""

    gone: Sequence[int]
    admitted: Sequence[Image[Order]]
    batch: Batch[Order] | None


class Desk:
    """The jobs of a server, and the executors that draw them."""

    def __init__(self, queue: int, metrics: Metrics) -> None:
        self.scheduler, self._metrics = Scheduler[Order](queue), metrics
        self.executors: dict[int, Executor] = {}
        self.changed = threading.Condition()
        self._stopping = False
        self._gone: list[int] = []  # bundles whose executors were let go
        self._image_s = 1.0  # recent seconds from an image's start to its end, for Retry-After

    def stop(self) -> None:
        """Let the worker's thread end; the jobs left are told that the server drains."""
        with self.changed:
            self._stopping = True
            self.changed.notify()

    def install(self, bundle: int, executor: Executor) -> None:
        """Serve one more bundle from now on."""
        with self.changed:
            self.executors[bundle] = executor
            self.scheduler.open(bundle, executor.count, executor.express)

    def retire(self, bundle: int) -> None:
        """Let a bundle go, once what was accepted for it is finished."""
        with self.changed:
            self.scheduler.retire(bundle)
            self._forget_idle()

    def is_used(self, bundle: int) -> bool:
        """Whether a job needs a bundle, one in preparation included."""
        with self.changed:
            return self.scheduler.is_used(bundle)

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def jobs_waiting(self) -> int:
        """Jobs of which no image has begun."""
        with self.changed:
            return len(self.scheduler.queued)

    @property
    def jobs_running(self) -> int:
        with self.changed:
            return len(self.scheduler.jobs) - len(self.scheduler.queued)

    @property
    def outstanding(self) -> int:
        return self.scheduler.outstanding

    @property
    def bundles(self) -> int:
        return len(self.executors)

    @property
    def slot_bytes(self) -> int:
        """What the images in flight take: inputs, features and histories of all slots, used or not."""
        return sum(executor.held_bytes for executor in list(self.executors.values()))

    @property
    def retry_after_s(self) -> int:
        """About when the next image will be done. Units: whole seconds, 1 to 60."""
        return max(1, min(60, round(self._image_s)))

    def note_image(self, seconds: float) -> None:
        """How long an image took, from its start."""
        self._image_s += 0.2 * (seconds - self._image_s)

    def latency_s(self, bundle: int, plan: CachePlan, guided: bool, count: int) -> float:
        """When so many images by a plan would be done that were queued now, beside all that is accepted."""
        with self.changed:
            left = dict[str, float]()
            for image in (*self.scheduler.running, *self.scheduler.waiting):
                job, executor = image.job, self.executors.get(image.job.bundle)
                if executor is not None:
                    one = executor.speeds.image_s(job.plan, job.guided, image.step)
                    left[job.client] = left.get(job.client, 0.0) + one
            waits = self.scheduler.would_wait(bundle, count)
            speeds = self.executors[bundle].speeds
        own = speeds.encode_s + count * speeds.image_s(plan, guided)
        return latency_s(own, left.values(), waits=waits)

    def position(self, job_id: str) -> int | None:
        """How many images wait before a job of which none has begun; None of any other job."""
        with self.changed:
            job = self.scheduler.jobs.get(job_id)
            if job is None or job.has_begun:
                return None
            return next(k for k, image in enumerate(self.scheduler.waiting) if image.job is job)

    def reserve(self, images: int, bundle: int) -> None:
        """Keep room, and the bundle, for a job in preparation. Raises: `QueueFull`."""
        with self.changed:
            self.scheduler.reserve(images, bundle)

    def release(self, images: int, bundle: int) -> None:
        with self.changed:
            self.scheduler.release(images, bundle)
            self._forget_idle()

    def submit(self, job: Job[Order]) -> None:
        """Queue a job, for which room was reserved."""
        with self.changed:
            self.scheduler.add(job)
            self.changed.notify()

    def cancel(self, job_id: str, failure: Failure = "cancelled") -> bool:
        """Take a job out, wherever it is; an engine call at hand ends without it. Returns whether there was one."""
        with self.changed:
            job = self.scheduler.jobs.get(job_id)
            if job is not None:
                self.end(job, failure)
                self.changed.notify()
            return job is not None

    def refuse_queued(self) -> None:
        """End the jobs that have not begun; those running go on."""
        with self.changed:
            for job in self.scheduler.queued:
                self.end(job, "draining")

    def next_turn(self) -> Turn | None:
        """What to do now, waited for; None once the thread is to end."""
        with self.changed:
            while True:
                admitted, batch = self._chosen()
                if admitted or batch or self._gone:
                    gone, self._gone = self._gone, []
                    return Turn(gone, admitted, batch)
                if self._stopping:
                    return None
                self.changed.wait(self._until_deadline())

    def _chosen(self) -> tuple[Sequence[Image[Order]], Batch[Order] | None]:
        """The batch only once nobody is to be admitted, so that newcomers may share it."""
        for job in self.scheduler.overdue(time.monotonic()):
            self.end(job, "late")
        if self._stopping:
            self.end_all("draining")
        admitted = self.scheduler.admit()
        return admitted, None if admitted else self.scheduler.next_batch()

    def _until_deadline(self) -> float | None:
        deadline = self.scheduler.next_deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def end_all(self, failure: Failure) -> None:
        with self.changed:
            for job in list(self.scheduler.jobs.values()):
                self.end(job, failure)

    def end(self, job: Job[Order], failure: Failure | None) -> None:
        """A job's end, told once."""
        with self.changed:
            if failure is not None and job.id not in self.scheduler.jobs:
                return
            self.scheduler.drop(job)
            self._metrics.jobs.labels(failure or "drawn").inc()
            job.content.notify(Done(failure))
            self._forget_idle()

    def _forget_idle(self) -> None:
        for bundle in self.scheduler.close_idle():
            del self.executors[bundle]
            self._gone.append(bundle)
            self.changed.notify()
