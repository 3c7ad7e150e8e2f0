"""What a server allows, as one value. Knows numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server takes on and what a request may ask for.

    `max_batch` images are drawn at once, `queue` more may wait. `write_timeout_s` is how long a client may take nothing
    of its answer. Units: seconds, bytes, characters.
    Raises: `ValueError` for a number that leaves nothing to serve.
    """

    max_batch: int = 8
    queue: int = 32
    max_images: int = 10  # OpenAI's own limit on n
    max_steps: int = 150
    max_prompt_chars: int = 2000
    max_body_bytes: int = 128 * 1024
    max_upload_bytes: int = 32 * 2**20  # a body with pictures
    max_uploads_bytes: int = 256 * 2**20  # such bodies at the same time, together
    max_header_bytes: int = 16 * 1024
    timeout_s: float = 300.0
    load_wait_s: float = 60.0  # that a request waits for its model to be loaded
    body_timeout_s: float = 20.0
    write_timeout_s: float = 20.0
    keep_results_s: float = 600.0  # of a job in the background, once it ended
    max_results: int = 256
    max_results_bytes: int = 256 * 2**20
    max_connections: int = 1000

    def __post_init__(self) -> None:
        counts = ("max_batch", "max_images", "max_steps", "max_prompt_chars", "max_connections")
        for name in (
            *counts,
            "max_body_bytes",
            "max_upload_bytes",
            "max_uploads_bytes",
            "max_header_bytes",
            "max_results",
            "max_results_bytes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of 1 or more, got {getattr(self, name)}")
        if self.queue < 0:
            raise ValueError(f"expected a queue of 0 or more images, got {self.queue}")
        timeouts = self.timeout_s, self.load_wait_s, self.body_timeout_s, self.write_timeout_s, self.keep_results_s
        if not all(0 < timeout < math.inf for timeout in timeouts):
            raise ValueError(f"expected finite timeouts above 0 s, got {', '.join(map(str, timeouts))}")
