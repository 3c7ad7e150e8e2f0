"""Samplers by name, as several threads of a server ask for them."""

from __future__ import annotations

import subprocess
import sys


def test_threads_that_ask_first_at_once_all_get_theirs() -> None:
    """diffusers imports its classes when they are asked for, which two threads must not do at the same time."""
    program = (
        "import sys, threading; sys.setswitchinterval(1e-5)\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from fastcache.sampler.scheduler import make_scheduler\n"
        "together = threading.Barrier(4)\n"
        "def made(name): together.wait(); make_scheduler(name, {'_class_name': 'DDIMScheduler'})\n"
        "with ThreadPoolExecutor(4) as pool: list(pool.map(made, ['euler', 'pndm', 'ddim', 'unipc']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
