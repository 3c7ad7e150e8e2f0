"""One capture of a CUDA graph at a time in a process, whoever makes it: an engine for itself, or its user for a loop.

Captures share torch's one pool of streams, and what a second thread allocates or waits for would fall into the first's.
"""

from __future__ import annotations

import threading

capture_lock = threading.RLock()  # again in one thread: a user's capture may bind an engine that captures
