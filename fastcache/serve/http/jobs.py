"""Jobs that nobody waits for: followed to their end, and their results kept for a while, so many and so large at most.

Knows jobs' events and answers; which route asks is `app.py`'s business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from PIL import Image as Pillow

from fastcache.serve.engine.events import Done, Drawn, Failure, Preview, Stepped
from fastcache.serve.http.errors import ApiError, failure
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.schema import ErrorDetail, ImagesResponse, JobState, JobStatus
from fastcache.serve.http.service import Service, Ticket

Answered = Callable[[list[Pillow.Image]], Awaitable[ImagesResponse]]
Shown = Callable[[Pillow.Image], Awaitable[str]]


@dataclass(eq=False)
class _Job:
    """A job as it stands. `steps` are those of all its images; `size_bytes` what its result and preview take."""

    id: str
    owner: bytes | None
    of: int
    created: int = field(default_factory=lambda: int(time.time()))
    status: JobState = "running"  # or still queued: the worker knows
    steps: int = 0
    preview: str | None = None
    result: ImagesResponse | None = None
    error: ErrorDetail | None = None
    ended: float | None = None  # by time.monotonic

    @property
    def size_bytes(self) -> int:
        images = [] if self.result is None else self.result.data
        return len(self.preview or "") + sum(len(image.b64_json) for image in images)


class Jobs:
    """The jobs in the background, from when they were accepted until their results are forgotten."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self._service, self._limits = service, limits
        self._jobs: dict[str, _Job] = {}  # in the order in which they were accepted
        self._following = set[asyncio.Task[None]]()

    @property
    def kept_bytes(self) -> int:
        return sum(job.size_bytes for job in self._jobs.values())

    def follow(
        self, ticket: Ticket, stack: AsyncExitStack, owner: bytes | None, answered: Answered, shown: Shown
    ) -> JobStatus:
        """Follow an accepted job to its end; `stack` is what ends with it."""
        total = ticket.job.count * ticket.job.plan.num_steps
        job = self._jobs[ticket.job.id] = _Job(ticket.job.id, owner, total)
        task = asyncio.create_task(self._follow(job, ticket, stack, answered, shown))
        self._following.add(task)
        task.add_done_callback(self._following.discard)
        return self._status(job)

    async def _follow(self, job: _Job, ticket: Ticket, stack: AsyncExitStack, answered: Answered, shown: Shown) -> None:
        drawn: dict[int, Pillow.Image] = {}
        async with stack:
            try:
                async for event in ticket.events():
                    match event:
                        case Stepped():
                            job.steps += 1
                        case Preview():
                            job.preview = await shown(event.picture)
                        case Drawn():
                            drawn[event.image] = event.picture
                        case Done(failure=None):
                            job.result = await answered([drawn[image] for image in sorted(drawn)])
                            self._end(job, None)
                        case Done():
                            self._end(job, event.failure)
            except Exception:
                self._end(job, "failed")
                raise

    def _end(self, job: _Job, why: Failure | None) -> None:
        job.ended, job.preview = time.monotonic(), None
        if why is None:
            job.status = "done"
        else:
            job.status = "cancelled" if why == "cancelled" else "failed"
            job.error = failure(why).body.error
        self._forget()

    def status(self, job_id: str, owner: bytes | None) -> JobStatus:
        """Raises: `ApiError` for a job that there is not, or not any more, or that another key asked for."""
        self._forget()
        job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            message = "job_id: expected a job in the background whose result is kept, got none of this name"
            raise ApiError(404, message, code="job_not_found", param="job_id")
        return self._status(job)

    def _status(self, job: _Job) -> JobStatus:
        position = self._service.desk.position(job.id) if job.ended is None else None
        return JobStatus(
            id=job.id,
            created=job.created,
            status=job.status if position is None else "queued",
            position=position,
            step=job.steps,
            num_steps=job.of,
            preview_b64_json=job.preview,
            result=job.result,
            error=job.error,
            kept_s=None if job.ended is None else max(0, int(self._left_s(job))),
        )

    def _left_s(self, job: _Job) -> float:
        """For how long a result is kept."""
        return self._limits.keep_results_s - (time.monotonic() - (job.ended or 0.0))

    def _forget(self) -> None:
        """Let go of results whose time is over, and of the oldest where there are too many."""
        ended = [job for job in self._jobs.values() if job.ended is not None]
        held = self.kept_bytes
        for place, job in enumerate(ended):
            limits = self._limits
            too_many = len(ended) - place > limits.max_results or held > limits.max_results_bytes
            if too_many or self._left_s(job) <= 0:
                held -= job.size_bytes
                del self._jobs[job.id]

    async def close(self) -> None:
        """Wait for the jobs' last events, which an ended worker has sent."""
        await asyncio.gather(*self._following, return_exceptions=True)
