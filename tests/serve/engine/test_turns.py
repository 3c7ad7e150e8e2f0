"""On a GPU the thread that draws and the one that loads take turns; shown on the CPU, with engines that look around."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcache
from fastcache import Bundle
from fastcache.serve.engine.executor import Executor
from fastcache.serve.engine.warm import warm_up
from fastcache_engines import Engine
from fastcache_engines.capturing import capture_lock, without_captures

pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")


class Watch:
    """Which thread binds, whether another could capture while an engine runs, and while a step is waited for."""

    def __init__(self) -> None:
        self.binders: list[int] = []
        self.running: list[bool] = []
        self.waiting: list[bool] = []

    def another_could_capture(self) -> bool:
        found: list[bool] = []

        def capture() -> None:
            found.append(capture_lock.acquire(blocking=False))
            if found[0]:
                capture_lock.release()

        thread = threading.Thread(target=capture)
        thread.start()
        thread.join()
        return found[0]


class WatchedEngine:
    def __init__(self, engine: Engine, watch: Watch) -> None:
        self.inputs, self.outputs, self._engine, self._watch = engine.inputs, engine.outputs, engine, watch

    def bind(self, tensors: Mapping[str, Tensor]) -> WatchedBinding:
        self._watch.binders.append(threading.get_ident())
        return WatchedBinding(self._engine.bind(tensors), self._watch)


class WatchedBinding:
    def __init__(self, binding: Any, watch: Watch) -> None:
        self._binding, self._watch = binding, watch

    def capturable(self) -> bool:
        return False

    def run(self) -> None:
        self._watch.running.append(self._watch.another_could_capture())
        self._binding.run()


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def executor(tiny_bundle: Bundle, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """One that takes its tensors, which are a CPU's, for a GPU's."""

    class Point:
        """An event, or a stream: what can be waited for."""

        def record(self) -> None: ...

        def synchronize(self) -> None:
            watch.waiting.append(watch.another_could_capture())

    def wait_for_all(device: Any = None) -> None:
        raise AssertionError("a wait for the whole device ends another thread's capture")

    monkeypatch.setattr(torch.cuda, "Event", Point)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Point())
    monkeypatch.setattr(torch.cuda, "synchronize", wait_for_all)
    pipe = fastcache.load(tiny_bundle.path, threads=1, wrap=lambda engine: WatchedEngine(engine, watch))
    executor = Executor(pipe, 2, threads=1)
    executor.lanes(tiny_bundle.manifest.sizes[0])
    executor.device = "cuda"
    return executor


def test_a_warm_up_captures_in_one_thread_and_draws_while_nobody_captures(executor: Executor, watch: Watch) -> None:
    warm_up(executor)
    assert set(watch.binders) == {threading.get_ident()}
    assert len(watch.running) > 8  # a text, every pass, a picture
    assert not any(watch.running)
    assert watch.waiting
    assert all(watch.waiting)  # so that a thread that loads comes to its turn


def test_a_load_waits_for_the_engine_call_at_hand(executor: Executor, watch: Watch) -> None:
    """As a reload beside a worker: what it captures comes between two calls."""
    executor.clear = lambda lane: None  # the image of the warm-up stays
    warm_up(executor)
    watch.running.clear()
    inside, go_on, captured = threading.Event(), threading.Event(), threading.Event()

    def hold() -> bool:
        inside.set()
        assert go_on.wait(60)
        return captured.is_set()

    def load() -> None:
        with capture_lock:
            captured.set()

    watch.another_could_capture = hold
    threads = [threading.Thread(target=executor.pictures, args=([0],)), threading.Thread(target=load)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert watch.running == [False]
    assert captured.is_set()


def test_a_cpu_has_no_turns() -> None:
    assert isinstance(without_captures("cpu"), nullcontext)
    assert without_captures("cuda:1") is capture_lock
