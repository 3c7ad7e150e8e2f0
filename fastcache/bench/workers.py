"""Worker processes for a benchmark's arms, as many alive at once as the machine's memory holds.

The torch arms of one dtype share a process, and so do the arms of one bundle: each has its own memory and threads.
Where the next one does not fit, the one used longest ago is ended and loaded again when its turn comes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from fastcache.bench.arms import Arm
from fastcache.bench.loops import Task, TimedRun, serve
from fastcache.bench.machine import available_bytes

# What a process takes before it has been seen to run, over its weights: they are there once as read and once as used,
# and activations come on top. SD1.5 at 512x512 was seen to take 1.4 times its 3.4 GB, so this errs on the safe side.
_BYTES_PER_WEIGHT_BYTE = 2.5


class ArmFailed(RuntimeError):
    """An arm cannot run here; the message is the reason."""


class Workers:
    """Runs arms, each in the process that `key_of` names; processes start when an arm first needs them.

    `reloads` counts the processes that were started again.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        key_of: Callable[[Arm], str],
        available: Callable[[], int | None] = available_bytes,
    ) -> None:
        self._tasks, self._key_of, self._available = tasks, key_of, available
        self._alive: dict[str, _Worker] = {}  # the one used longest ago comes first
        self._took: dict[str, int] = {}  # the most that each process has held so far
        self.reloads = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._alive):
            self._alive.pop(key).end()

    def run(self, arm: Arm, *, timed: bool) -> TimedRun:
        """One run of an arm. Before a timed run, an arm that is new to a process started again runs once untimed.

        Raises: `ArmFailed`.
        """
        key = self._key_of(arm)
        worker = self._alive.pop(key, None) or self._start(key)
        self._alive[key] = worker
        try:
            if timed and worker.restarted and arm not in worker.warm:
                worker.ask(arm)
            times = worker.ask(arm)
        except ArmFailed:
            if worker.ended:
                self._alive.pop(key).end()
            raise
        worker.warm.add(arm)
        self._took[key] = max(times.process_bytes or 0, self._took.get(key, 0))
        return times

    def _start(self, key: str) -> _Worker:
        task = self._tasks[key]
        needed = self._took.get(key, _BYTES_PER_WEIGHT_BYTE * task.weights_bytes)
        while self._alive and (free := self._available()) is not None and free < needed:
            self._alive.pop(next(iter(self._alive))).end()
        restarted = key in self._took
        self.reloads += restarted
        return _Worker(task, restarted)


@dataclass
class _Worker:
    """A live process, and the arms that have run in it."""

    task: Task
    restarted: bool
    warm: set[Arm] = field(default_factory=set)
    ended: bool = False

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, there = context.Pipe()
        self._process: Any = context.Process(target=serve, args=(there, self.task), daemon=True)
        self._process.start()
        there.close()

    def ask(self, arm: Arm) -> TimedRun:
        try:
            self._pipe.send(arm)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.ended = True
            raise ArmFailed("its process ended, most likely for want of memory") from None
        if isinstance(answer, str):
            raise ArmFailed(answer)
        return answer

    def end(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()
