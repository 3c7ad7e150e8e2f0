"""Requests that no server should draw anything for: bodies by field and by byte, and whole requests as bytes."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import Any

GOOD: dict[str, Any] = {"prompt": "a", "num_inference_steps": 2, "seed": 0}
PLAN = {
    "schema": "fastcache.plan/1",
    "model": None,
    "sampler": None,
    "made_by": "given",
    "num_steps": 2,
    "branches": [None, 0],
}
FIELDS = [
    "prompt",
    "model",
    "n",
    "size",
    "response_format",
    "output_format",
    "output_compression",
    "stream",
    "partial_images",
    "stream_steps",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "sampler",
    "cache_interval",
    "plan",
    "timeout",
    "job_id",
]
STRINGS = ["\ud800", "../../etc/passwd", "a" * 3000, "'; DROP TABLE jobs; --", "${jndi:ldap://x}", "nan", "1", "true"]
VALUES: list[Any] = [[], [1], {}, {"a": 1}, True, -1, 0.5, 1e308, 10**30, *STRINGS]
# What a field takes after all.
FINE = {
    "prompt": STRINGS[1:2] + STRINGS[3:],
    "negative_prompt": STRINGS[1:2] + STRINGS[3:],
    "guidance_scale": [0.5],
    "job_id": ["nan", "1", "true"],
    "stream": [True],
    "stream_steps": [],
}


def malformed_bodies(good: dict[str, Any] = GOOD) -> list[bytes]:
    """JSON bodies that must be refused, most of them a good one with something wrong."""
    bodies = [
        json.dumps({**good, name: value}).encode()
        for name in FIELDS
        for value in VALUES
        if not any(value is fine or (type(value) is type(fine) and value == fine) for fine in FINE.get(name, ()))
    ]
    bodies += [json.dumps({**good, f"unknown_{k}": None}).encode() for k in range(20)]
    bodies += [
        json.dumps({**good, "plan": {**PLAN, key: value}}).encode() for key in PLAN for value in ([], {}, -1, 0.5)
    ]
    bodies += [json.dumps({**good, "plan": {k: v for k, v in PLAN.items() if k != key}}).encode() for key in PLAN]
    whole = json.dumps({**good, "negative_prompt": "b", "plan": PLAN}).encode()
    bodies += [whole[:length] for length in range(len(whole))]
    bodies += [whole + end for end in (b"}", b",", b"{}", b"\x00", b"//")]
    bodies += [json.dumps(value).encode() for value in (None, 1, "a", [], [GOOD], True)]
    bodies += [
        b"\xff\xfe",
        b"\x80" * 50,
        b"\xef\xbb\xbf{",
        b"[" * 20_000,
        b'{"a":' * 5_000,
        b'{"n":' + b"9" * 5_000 + b"}",
    ]
    bodies += [b'{"prompt":"a","guidance_scale":%s}' % value for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999")]
    bodies += [b"<?xml version='1.0'?><a/>", b"prompt=a&n=1", b"a" * 200_000, b'{"prompt":"' + b"a" * 200_000 + b'"}']
    return bodies


def malformed_edits() -> list[tuple[str, bytes]]:
    """Bodies of edits that must be refused, by their Content-Type: JSON, and forms."""
    picture = png(8, 8)
    good = {**GOOD, "image": base64.b64encode(picture).decode()}
    bodies = malformed_bodies(good)
    large = picture[:16] + struct.pack(">II", 50_000, 50_000) + picture[24:]
    shown = [b"", b"none", picture[:40], large, b"GIF89a" + picture, picture[:-30]]
    bad: list[Any] = [base64.b64encode(one).decode() for one in shown]
    bad += ["http://a/b.png", "%", "data:image/png,x", None, 1, [], [good["image"]] * 17, {}, [None]]
    bodies += [json.dumps({**good, "image": value}).encode() for value in bad]
    bodies += [json.dumps({**good, "mask": value}).encode() for value in (*bad[1:9], [], 1)]
    wrong = {
        "strength": [0, 2, -1, "a", []],
        "input_fidelity": ["x", 1],
        "mask": [base64.b64encode(png(9, 8)).decode()],
    }
    bodies += [json.dumps({**good, name: value}).encode() for name, values in wrong.items() for value in values]
    return [("application/json", body) for body in bodies] + _malformed_forms(picture, shown)


def _malformed_forms(picture: bytes, shown: list[bytes]) -> list[tuple[str, bytes]]:
    kind = "multipart/form-data; boundary=b"
    text, image = ("prompt", b"a"), ("image", picture)
    whole = form(text, image)
    forms = [whole[:length] for length in range(0, len(whole) - 6, 2)]
    forms += [form(text), form(image), form(), form(text, text, image), form(text, image, ("mask", b"x"))]
    forms += [form(text, ("image", one)) for one in shown]
    forms += [form(text, image, ("unknown", b"1")), form(text, *[image] * 40), form(image, *[text] * 70)]
    numbers = ("n", "num_inference_steps", "guidance_scale", "seed", "strength", "cache_interval", "plan", "timeout")
    values = (b"a", b"[]", b"1e999", b"NaN", b"-1", b"\x00", b"\xff", b"[" * 5000)
    forms += [form(text, image, (name, value)) for name in (*numbers, "size", "sampler") for value in values]
    forms += [whole.replace(b"\r\n\r\n", ending, 1) for ending in (b"", b"\r\n", b"\n\n", b"\r\n\x00\r\n")]
    forms += [whole.replace(b"form-data; name=", head, 1) for head in (b"", b"form-data;")]
    found = [(kind, one) for one in forms]
    others = ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=c", "text/plain")
    return found + [(other, whole) for other in others]


def form(*parts: tuple[str, bytes]) -> bytes:
    """A form with boundary `b`; what is called image or mask is a file."""
    body = b""
    for name, value in parts:
        what = '; filename="a.png"' if name in ("image", "mask") else ""
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"{what}\r\n\r\n'.encode() + value + b"\r\n"
    return body + b"--b--\r\n"


def png(width: int, height: int) -> bytes:
    """A gray PNG, without a library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\x00" + b"\x80" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def malformed_requests(port: int) -> list[bytes]:
    """Whole requests that are no proper HTTP, or not for this server."""
    host, path = f"Host: 127.0.0.1:{port}".encode(), b"POST /v1/images/generations HTTP/1.1\r\n"
    body = json.dumps(GOOD).encode()
    kind = b"Content-Type: application/json\r\n"
    return [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /nothing HTTP/9.9\r\n" + host + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + host + b"\r\nHost: other\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: evil.example\r\nHost: evil.example\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\n" + host + b"\r\n\r\n",
        b"GET /%00%ff%2e%2e/ HTTP/1.1\r\n" + host + b"\r\n\r\n",
        b"GET /" + b"a" * 30_000 + b" HTTP/1.1\r\n" + host + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + host + b"\r\nX: " + b"a" * 30_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + host + b"\r\n" + b"X: a\r\n" * 5_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + host + b"\r\nX\x00Y: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + host + b"\r\nOrigin: null\r\n\r\n",
        b"TRACE /health HTTP/1.1\r\n" + host + b"\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\n" + host + b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        path + host + b"\r\n" + kind + b"Content-Length: -1\r\n\r\n" + body,
        path + host + b"\r\n" + kind + b"Content-Length: abc\r\n\r\n" + body,
        path + host + b"\r\n" + kind + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + body,
        path + host + b"\r\n" + kind + b"Content-Length: 99999999999999999999\r\n\r\n" + body,
        path + host + b"\r\n" + kind + b"Content-Length: 10000\r\n\r\n" + body,
        path + host + b"\r\n" + kind + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
        path + host + b"\r\n" + kind + b"Transfer-Encoding: gzip\r\n\r\n" + body,
        path
        + host
        + b"\r\n"
        + kind
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + b"10000\r\n"
        + b"a" * 0x10000
        + b"\r\n" * 2,
        path + host + b"\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        path + host + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
    ]
