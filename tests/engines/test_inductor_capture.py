"""In which order a capture does what, and who may do it when: what can be told of it without a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcache_engines import BuildOptions, inductor
from fastcache_engines.capturing import capture_lock
from fastcache_engines.inductor import capture, weights
from fastcache_engines.machine import Gpu


class Stream:
    """A stream that writes down what it is told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self._told, self.cuda_stream = name, told, id(self)

    def wait_stream(self, other: Stream) -> None:
        self._told.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self._told.append(f"host waits for {self.name}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that a capture asks of CUDA, in its order."""
    told: list[str] = []
    own, current = Stream("own", told), Stream("current", told)

    @contextlib.contextmanager
    def graph(graph: Any, **options: Any) -> Generator[None]:
        told.append(f"capture begins in {options['stream'].name}, {options['capture_error_mode']}")
        yield
        told.append("capture ends")

    monkeypatch.setattr(capture, "capture_stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return told


def test_the_trials_tensors_are_written_before_its_stream_is_told_to_wait(told: list[str]) -> None:
    def trial() -> Any:
        told.append("zeros")
        return lambda: told.append("warm-up")

    assert capture.capture(lambda: told.append("call"), trial, torch.device("cuda", 0), None) == "graph"
    assert told == [
        "zeros",
        "own waits for current",
        *["warm-up"] * 3,
        "host waits for own",
        "capture begins in own, thread_local",
        "call",
        "capture ends",
        "current waits for own",
    ]


def test_fp32_is_not_tf32_while_it_runs_and_is_captured(told: list[str]) -> None:
    switches: list[Any] = []

    def call() -> None:
        switches.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

    capture.capture(call, lambda: call, torch.device("cuda", 0), None)
    assert switches == [(False, False)] * 4


def test_one_capture_at_a_time_in_a_process(told: list[str]) -> None:
    inside, go_on, second = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(60)

    def run(call: Any) -> threading.Thread:
        thread = threading.Thread(
            target=capture.capture, args=(call, lambda: lambda: None, torch.device("cuda", 0), None)
        )
        thread.start()
        return thread

    threads = [run(hold)]
    assert inside.wait(60)
    threads.append(run(second.set))
    assert not second.wait(0.2)  # it cannot come in, however long one waits
    assert not capture_lock.acquire(blocking=False)  # nor can a caller's own capture
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert second.is_set()


def test_weights_are_given_back_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage is collected anywhere, also within a capture, in which to wait is an error."""

    class Block:
        is_cuda, device, freed = True, "cuda:0", False

        def __init__(self) -> None:
            self.streams: list[Any] = []

        def record_stream(self, stream: Any) -> None:
            self.streams.append(stream)

        def untyped_storage(self) -> Any:
            return self

        def resize_(self, size: int) -> None:
            self.freed = size == 0

    def wait(device: Any = None) -> None:
        raise AssertionError("nothing may wait here")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    block: Any = Block()
    weights._free(block)
    assert block.freed
    assert block.streams == ["current", "default"]


def test_a_machine_without_a_cuda_toolkit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setattr(inductor, "gpu", lambda device: Gpu("NVIDIA H200", "9.0"))
    for home in (None, str(tmp_path)):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
        found = inductor.support("cuda")
        assert (found.can_build, found.can_run) == (False, True)
        assert "CUDA toolkit" in found.reason
        assert "CUDA_HOME" in found.reason
        with pytest.raises(inductor.BackendUnavailable, match="CUDA toolkit"):
            inductor.build({}, tmp_path, BuildOptions(device="cuda"))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").touch()
    assert inductor.support("cuda") == inductor.Support(torch.__version__, True, True, "ready, on NVIDIA H200")
