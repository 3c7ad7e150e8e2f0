"""What an operator sees: figures by the names that dashboards know, names of requests, lines of JSON, spans."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from build_store import ROOT
from fastcache.serve.http.log import REQUEST_ID, JsonLines, Lines
from serve.serving import Running

DASHBOARD = ROOT / "examples" / "grafana-dashboard.json"


def test_the_dashboard_asks_for_figures_that_there_are(tiny: Running) -> None:
    body = {"num_inference_steps": 4, "cache_interval": 2, "stream": True, "partial_images": 1}
    assert tiny.draw(**body).status_code == 200
    assert tiny.draw(size="1x1").status_code == 400
    metrics = tiny.client.get("/metrics").text
    asked = set(re.findall(r"\b(?:fastcache|process)_\w+", DASHBOARD.read_text()))
    assert len(asked) > 10
    for name in asked:
        assert f"\n{name}" in metrics, name
    for line in ('pass="full"', 'plan="interval"', 'reason="invalid_value"', 'route="generations"'):
        assert line in metrics


def test_every_panel_says_what_it_shows() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in board["panels"])


@pytest.mark.parametrize(
    ("given", "kept"), [("a-1:b.c_D", True), ("a b", False), ("a" * 200, False), ("", False), ('"}', False)]
)
def test_a_request_keeps_its_name(given: str, kept: bool, tiny: Running) -> None:
    got = tiny.client.get("/v1/models", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert (got == given) is kept
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", got)
    assert tiny.client.get("/nothing").headers["x-request-id"].startswith("req-")


def test_lines_say_which_request_they_are_of(tiny: Running, caplog: pytest.LogCaptureFixture) -> None:
    line = logging.LogRecord("fastcache.serve", logging.INFO, "", 0, 'job %s: "drawn"', ("a",), None)
    token = REQUEST_ID.set("mine")
    try:
        found: dict[str, Any] = json.loads(JsonLines().format(line))
        assert (found["level"], found["message"], found["request_id"]) == ("info", 'job a: "drawn"', "mine")
        assert Lines().format(line).endswith('INFO mine job a: "drawn"')
    finally:
        REQUEST_ID.reset(token)
    assert "request_id" not in json.loads(JsonLines().format(line))
    seen = list[str]()

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(JsonLines().format(record))

    log, handler = logging.getLogger("fastcache.serve"), Kept()
    log.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "fastcache.serve"):
            tiny.draw({"X-Request-Id": "asked-for"})
    finally:
        log.removeHandler(handler)
    accepted = [json.loads(one) for one in seen if "prompt of" in one]
    assert [one["request_id"] for one in accepted] == ["asked-for"]


@pytest.fixture
def spans() -> Any:
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # a process has one, so this file sets it once
    return exporter


def test_a_span_lies_below_the_callers(spans: Any, tiny: Running) -> None:
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    assert tiny.draw({"traceparent": f"00-{trace_id}-{parent}-01"}).status_code == 200
    assert tiny.draw().status_code == 200
    tiny.until(lambda: len(spans.get_finished_spans()) > 0)
    (span,) = spans.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == trace_id
    assert f"{span.parent.span_id:016x}" == parent
    assert span.attributes["http.route"] == "/v1/images/generations"
    assert span.attributes["http.response.status_code"] == 200
    assert tiny.draw({"traceparent": "nonsense"}).status_code == 200
