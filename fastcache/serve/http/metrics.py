"""What a server counts and times, for Prometheus. Labels are few and fixed: never a prompt, an id or a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        # By the names that dashboards of vLLM's kind know.
        self.latency = self._seconds("e2e_request_latency", "From a job's arrival to its last image", ["route"])
        self.queue_time = self._seconds("request_queue_time", "From a job's arrival to its first image's start")
        self.first_preview = self._seconds("time_to_first_preview", "From a job's arrival to its first partial image")
        self.passes = Counter(
            "fastcache_pass_steps", "Images' steps, by the pass that ran", ["pass"], registry=self.registry
        )
        self.batch = Histogram(
            "fastcache_batch_size",
            "Images in a U-Net turn",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32),
            registry=self.registry,
        )
        self.plans = Counter("fastcache_plans", "Jobs accepted, by plan", ["plan"], registry=self.registry)
        self.rejected = Counter(
            "fastcache_request_rejected", "Requests refused, by reason", ["reason"], registry=self.registry
        )
        self.unet = {
            kind: UNetFigures(self.stages.labels(f"{kind}_step"), self.calls.labels(kind), self.steps.labels(kind))
            for kind in ("full", "shallow")
        }

    def _seconds(self, name: str, what: str, labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"fastcache_{name}_seconds", what, labels, buckets=_BUCKETS, registry=self.registry)

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)
