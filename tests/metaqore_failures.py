"""The ways in which a MetaQore may fail to answer, each as a real server would."""

from __future__ import annotations

import json
import socket
import struct
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import Any

#: Ways to fail, each with what the gateway should make of it.
FAILURES = {
    "hang": "timeout",
    "drip": "timeout",
    "drip_headers": "timeout",
    "reset": "unreachable",
    "close": "unreachable",
    "500": "server_error",
    "503": "server_error",
    "429": "server_error",
    "401": "unauthorized",
    "403": "unauthorized",
    "garbage": "bad_answer",
    "no_http": "bad_answer",
    "cut": "bad_answer",
    "empty": "bad_answer",
    "null": "bad_answer",
    "wrong_shape": "bad_answer",
    "wrong_id": "bad_answer",
    "wrong_status": "bad_answer",
    "deep": "bad_answer",
    "huge": "bad_answer",
    "gzip": "bad_answer",
    "redirect": "bad_answer",
    "html_404": "bad_answer",
    "400": "bad_answer",
}
DRIP_S = 0.05
STATUSES = {
    "500": "Oops",
    "503": "Away",
    "429": "Too many requests",
    "400": "What?",
    "401": "Invalid token",
    "403": "Not for you",
}


def misbehave(handler: BaseHTTPRequestHandler, how: str, content: dict[str, Any], closing: Event) -> None:
    """Answer with `content` in one of the ways of FAILURES. Until `closing` is set, a way may take for ever."""
    body = json.dumps(content).encode()
    if how in STATUSES:
        send(handler, int(how), json.dumps({"detail": STATUSES[how]}).encode())
    elif how == "gzip":
        send(handler, 200, body, Content_Encoding="gzip")
    elif how == "redirect":
        send(handler, 307, b"", Location=f"/elsewhere{handler.path}")
    elif how == "html_404":
        send(handler, 404, b"<h1>nothing here</h1>")
    elif how in _ENDS:
        handler.close_connection = True
        _ENDS[how](handler, body, closing)
    else:
        send(handler, 200, _wrong(how, content))


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    """Send a whole answer."""
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def _wrong(how: str, content: dict[str, Any]) -> bytes:
    """Return a body that is not what was asked for."""
    body = json.dumps(content).encode()
    return {
        "garbage": b"\xff\x00{]",
        "empty": b"",
        "null": b"null",
        "wrong_shape": json.dumps({**content, "data": [content.get("data")]}).encode(),
        "wrong_id": body.replace(b"proj_0", b"proj_f").replace(b'"strict"', b'"lenient"'),
        "wrong_status": body.replace(b'"success"', b'"error"'),
        "deep": b"[" * 200_000,
        "huge": json.dumps({**content, "padding": "x" * 5_000_000}).encode(),
    }[how]


def _hang(_handler: BaseHTTPRequestHandler, _body: bytes, closing: Event) -> None:
    closing.wait()


def _close(_handler: BaseHTTPRequestHandler, _body: bytes, _closing: Event) -> None:
    """Say nothing at all."""


def _reset(handler: BaseHTTPRequestHandler, _body: bytes, _closing: Event) -> None:
    handler.wfile.write(b"HTTP/1.1 200")
    # A socket that is closed with nothing left to wait for resets its connection.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _no_http(handler: BaseHTTPRequestHandler, _body: bytes, _closing: Event) -> None:
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n" * 4)


def _cut(handler: BaseHTTPRequestHandler, body: bytes, _closing: Event) -> None:
    send(handler, 200, body[:-1], Content_Length=str(len(body)))


def _drip(handler: BaseHTTPRequestHandler, body: bytes, closing: Event) -> None:
    handler.wfile.write(_head(body))
    _slowly(handler, body, closing)


def _drip_headers(handler: BaseHTTPRequestHandler, body: bytes, closing: Event) -> None:
    _slowly(handler, _head(body) + body, closing)


def _head(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)


def _slowly(handler: BaseHTTPRequestHandler, content: bytes, closing: Event) -> None:
    for number in range(len(content)):
        handler.wfile.write(content[number : number + 1])
        if closing.wait(DRIP_S):
            return


#: Ways after which the connection is over.
_ENDS = {
    "hang": _hang,
    "close": _close,
    "reset": _reset,
    "no_http": _no_http,
    "cut": _cut,
    "drip": _drip,
    "drip_headers": _drip_headers,
}
