"""The answers of several replicas to one question -> the one that a client gets. Knows ASGI messages, no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from fastcache.serve.http.guard import Message
from fastcache.serve.http.metrics import CONTENT_TYPE
from fastcache.serve.http.schema import HealthInDetail

Answer = tuple[str, list[Message]]  # a replica's name, and what it says


def merged(path: str, answers: Sequence[Answer]) -> list[Message]:
    """One answer for all: figures and health together, of anything else that of a replica which could do it."""
    well = [(name, _body(said)) for name, said in answers if _status(said) == 200]
    if well and path == "/metrics":
        return _said(CONTENT_TYPE, merged_metrics((name, text.decode()) for name, text in well))
    if well and path == "/health":
        total = merged_health([HealthInDetail.model_validate_json(body) for _, body in well])
        return _said("application/json", total.model_dump_json().encode())
    # A job that one replica knows is a 404 to the others; one that still loads says 503.
    return min((said for _, said in answers), key=_status)


def merged_health(found: Sequence[HealthInDetail]) -> HealthInDetail:
    """The health of all: ready if one is; what runs, waits and fits, added up."""
    first = min(found, key=lambda one: one.status != "ready")
    total = {name: sum(getattr(one, name) or 0 for one in found) for name in ("running", "waiting", "bundles", "queue")}
    loaded = sorted({name for one in found for name in one.loaded})
    return first.model_copy(update={**total, "loaded": loaded, "max_batch": sum(one.max_batch or 0 for one in found)})


def merged_metrics(texts: Iterable[tuple[str, str]]) -> bytes:
    """The figures of all, by (replica, text), each with a label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in texts:
        for found in text_string_to_metric_families(text):
            if found.name.endswith("_created"):  # not figures: when the others began to count
                continue
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                family.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _status(said: list[Message]) -> int:
    return int(said[0]["status"])


def _body(said: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in said[1:])


def _said(kind: str, body: bytes) -> list[Message]:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    return [
        {"type": "http.response.start", "status": 200, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]
