"""What a GPU may still work with is kept until it is done, and nobody waits for it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from fastcache_engines.tensorrt import run
from fastcache_engines.tensorrt.in_flight import InFlight


class Thing:
    """What a GPU works with."""


class Work:
    """Work on a stream, of which events tell whether it is done."""

    def __init__(self) -> None:
        self.done, self.marks = False, 0

    def mark(self) -> Work:
        self.marks += 1
        return self

    def query(self) -> bool:
        return self.done


def test_a_thing_is_kept_until_its_work_is_done() -> None:
    kept, work, thing = InFlight(), Work(), Thing()
    watched = weakref.ref(thing)
    kept.keep(thing, work.mark)
    del thing
    for _ in range(2):
        kept.let_go()
        gc.collect()
        assert watched() is not None
    work.done = True
    kept.let_go()
    assert (watched(), len(kept), work.marks) == (None, 0, 1)


def test_each_goes_by_its_own_work_and_the_next_lets_the_last_go() -> None:
    kept, first, second = InFlight(), Work(), Work()
    things = [Thing(), Thing()]
    watched = [weakref.ref(thing) for thing in things]
    kept.keep(things.pop(0), first.mark)
    first.done = True
    kept.keep(things.pop(), second.mark)
    assert [thing() is None for thing in watched] == [True, False]


def test_where_no_event_can_be_made_it_is_asked_for_later() -> None:
    """A stream under capture holds no events of its own work."""
    kept, work, capturing = InFlight(), Work(), [True, False]
    work.done = True
    kept.keep(Thing(), lambda: None if capturing.pop(0) else work.mark())
    assert len(kept) == 1
    kept.let_go()
    assert len(kept) == 0


def test_a_collection_in_the_midst_of_another_loses_nothing() -> None:
    kept, work = InFlight(), Work()

    class Nested:
        def __init__(self) -> None:
            weakref.finalize(self, kept.keep, Thing(), work.mark)

    done = Work()
    done.done = True
    kept.keep(Nested(), done.mark)
    assert len(kept) == 1
    work.done = True
    kept.let_go()
    assert len(kept) == 0


def test_a_binding_that_goes_hands_its_context_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """An execution context must not end while its work is on the GPU (`InFlight` as on one, the rest stands in)."""
    kept, stream, work = InFlight(), Thing(), Work()
    monkeypatch.setattr(run, "_contexts", kept)
    monkeypatch.setattr(run._LastStream, "mark", lambda last: work.mark())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class Context(Thing):
        def update_device_memory_size_for_shapes(self) -> int:
            return 8

        def set_device_memory(self, *place: int) -> None:
            assert place[1] == 8

    context: Any = Context()
    engine: Any = Thing()
    engine.inputs = engine.outputs = ()
    engine.name = engine.title = ""
    watched = weakref.ref(context)
    binding = run.TensorRTBinding(engine, context, {}, run.Workspace("cpu"))
    del context, binding
    gc.collect()
    assert watched() is not None
    work.done = True
    kept.let_go()
    gc.collect()
    assert watched() is None
