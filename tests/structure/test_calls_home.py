"""Nothing calls home: commands run where every connection of every process of theirs is seen.

Python's own are written down by an audit hook, which a `sitecustomize` installs in each process that starts; those of
libraries in C++ by strace, where it is installed and allowed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow

RECORDER = """
import os, socket, sys

def record(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if arguments[0].family not in (socket.AF_INET, socket.AF_INET6) or arguments[1] is None:
            return  # pipes by another name, and what goes to whoever is connected already
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        return
    with open(os.environ["CONNECTIONS_SEEN"], "a") as file:
        file.write(f"{event} {arguments} in {sys.argv[:3]}\\n")

sys.addaudithook(record)
"""
# What turns some of it off, for the tests or by a user.
QUIET = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
STRACE = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-e", "signal=none"]
PROMPT = "a cat"


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    return (
        subprocess.run(
            ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect", "true"], capture_output=True
        ).returncode
        == 0
    )


@dataclass(frozen=True)
class Watch:
    """Runs Python in a home of its own, and tells what it and its children connected to."""

    folder: Path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        (self.folder / "sitecustomize.py").write_text(RECORDER)
        environment = {name: value for name, value in os.environ.items() if name not in QUIET}
        path = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {
            "PYTHONPATH": os.pathsep.join(path),
            "CONNECTIONS_SEEN": str(self.folder / "seen"),
            "HOME": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        trace = [*STRACE, "-A", "-o", str(self.folder / "traced")]
        command = [*(trace if can_trace() else ()), sys.executable, *arguments]
        return subprocess.Popen(
            command, env=environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str) -> None:
        output, errors = self.start(*arguments).communicate(timeout=540)
        assert "Traceback" not in errors, errors + output

    def seen(self) -> list[str]:
        """Lines about connections, by Python's hook and by strace."""
        python, traced = (self.folder / name for name in ("seen", "traced"))
        lines = python.read_text().splitlines() if python.exists() else []
        calls = traced.read_text().splitlines() if traced.exists() else []
        return lines + [call for call in calls if "sa_family=AF_INET" in call]


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


def command(*arguments: object) -> Sequence[str]:
    return ["-m", "fastcache", *map(str, arguments)]


def test_a_connection_is_seen_wherever_it_is_made(watch: Watch) -> None:
    """By Python's hook, in a child, and by strace where Python has no part in it."""
    knock = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.1', 9))"
    in_c = """
import ctypes, socket, struct
address = struct.pack("=HH4s8x", socket.AF_INET, socket.htons(9), socket.inet_aton("192.0.2.2"))
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ctypes.CDLL(None).connect(one.fileno(), address, len(address))
"""
    watch.run("-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {knock!r}], check=True)")
    assert any("socket.connect" in line and "192.0.2.1" in line for line in watch.seen())
    watch.run("-c", in_c)
    assert any("192.0.2.2" in line for line in watch.seen()) == can_trace()
    watch.run("-c", "import socket; socket.getaddrinfo('localhost', 80)")
    assert any("socket.getaddrinfo" in line for line in watch.seen())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_build_generate_bench_and_serve_connect_to_nobody(backend: str, watch: Watch, tiny_model: Path) -> None:
    bundle = watch.folder / "bundle"
    watch.run(*command("build-engines", "--model", tiny_model, "--backend", backend, "--output", bundle))
    assert watch.seen() == []
    watch.run(*command("generate", "--engines", bundle, "--prompt", PROMPT, "--steps", 2, "--output", "x.png"))
    assert (watch.folder / "x.png").is_file()
    assert watch.seen() == []
    arms = "eager,deepcache,engine,engine+cache"
    flags = ("--arms", arms, "--steps", 2, "--repeats", 1, "--warmup", 0, "--json", "bench.json")
    watch.run(*command("bench", "--engines", bundle, *flags))
    measured = json.loads((watch.folder / "bench.json").read_text())
    assert not [arm for arm in measured["arms"] if "skipped" in arm]
    for looks in (("doctor",), ("verify", bundle), ("inspect", bundle)):
        watch.run(*command(*looks))
    assert watch.seen() == []

    with watch.start(*command("serve", "--engines", bundle, "--port", 0)) as server:
        try:
            assert server.stderr is not None
            (url,) = next(found.groups() for line in server.stderr if (found := re.search(r"listening on (\S+)", line)))
            while httpx.get(f"{url}/readyz").status_code != 200:
                pass
            asked = {"prompt": PROMPT, "num_inference_steps": 2}
            answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=120)
            assert answer.status_code == 200, answer.text
        finally:
            os.kill(server_of(server), signal.SIGTERM)
            server.communicate(timeout=120)
    assert watch.seen() == []


def server_of(process: subprocess.Popen[str]) -> int:
    """The server itself, which strace, if there is one, has as its child."""
    import psutil

    children = psutil.Process(process.pid).children() if can_trace() else []
    return children[0].pid if children else process.pid
