"""A request's `traceparent` -> a span of OpenTelemetry, where that is installed and the process has a tracer set up.

Without the package, or without the header, nothing happens. Knows HTTP headers; nothing about images.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:  # it is the operator's to install and to set up
    propagate = trace = None

Attributes = Mapping[str, str | int]


@contextmanager
def traced(name: str, headers: Mapping[str, str]) -> Generator[Callable[[Attributes], None]]:
    """A span below the caller's for as long as it is entered; yields what sets its attributes."""
    if trace is None or propagate is None or "traceparent" not in headers:
        yield lambda attributes: None
        return
    context: Any = propagate.extract(dict(headers))
    with trace.get_tracer("fastcache.serve").start_as_current_span(
        name, context=context, kind=trace.SpanKind.SERVER
    ) as span:
        yield lambda attributes: span.set_attributes(dict(attributes))
