"""What a server counts and times, for Prometheus. Labels are few and fixed: never a prompt, an id or a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class UNetFigures(NamedTuple):
    """One engine's: the seconds of its turns, how many, and the images' steps in them."""

    seconds: Histogram
    calls: Counter
    steps: Counter


class Metrics:
    """One server's figures, in a registry of their own, so that several apps can live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "fastcache_requests", "HTTP responses, by route and status", ["route", "status"], registry=self.registry
        )
        self.steps = Counter("unet_steps", "U-Net steps of images, by engine", ["kind"], registry=self.registry)
        self.abandoned = Counter(
            "unet_steps_abandoned", "Steps at hand when their job ended, one an image at most", registry=self.registry
        )
        self.calls = Counter(
            "unet_calls", "U-Net turns, each of one image or several at once", ["kind"], registry=self.registry
        )
        self.jobs = Counter("fastcache_jobs", "Jobs that ended, by how", ["outcome"], registry=self.registry)
        self.stages = Histogram(
            "fastcache_stage_seconds", "Seconds in a stage", ["stage"], buckets=_BUCKETS, registry=self.registry
        )
        self.unet = {
            kind: UNetFigures(self.stages.labels(f"{kind}_step"), self.calls.labels(kind), self.steps.labels(kind))
            for kind in ("full", "shallow")
        }

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)
