"""Who may open a WebSocket, and what of their request reaches the handshake.

A browser cannot set headers on a WebSocket, so the API key may also come as a subprotocol, and never in the URL, which
ends up in logs. But any page may try: a browser says whose page it is, and only pages of this very host, and those the
operator lists, get through.

simple-websocket reads the request again from its headers, and fails on odd ones; it agrees to any compression that is
offered, and so to unpack bombs. So it is shown only the headers that a handshake is made of, once they are known to be
right.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Collection
from typing import Any

from flask import Response, request

from gateway_app.api import problems
from tasks.errors import InvalidRequest, MethodNotAllowed, OriginNotAllowed, UpgradeRequired

SUBPROTOCOL = "metaqore.v1"
KEY_SUBPROTOCOL = "metaqore.key."
_VERSION = "13"
_NONCE_BYTES = 16


class Unstarted(threading.Thread):
    """simple-websocket's thread, which is never started: give it as `thread_class`."""

    def start(self) -> None:
        """Leave the connection alone."""


def check_origin(allowed: Collection[str]) -> None:
    """Raise OriginNotAllowed for a page that is neither of this host nor `allowed`. Without Origin it is no page."""
    origin = request.headers.get("Origin")
    if origin is not None and origin not in allowed and origin != f"{request.scheme}://{request.host}":
        raise OriginNotAllowed


def authorization() -> str | None:
    """Return the Authorization header, or what it would be, of a client that sent its key as a subprotocol."""
    given = request.headers.get("Authorization")
    for offered in _subprotocols():
        if given is None and offered.startswith(KEY_SUBPROTOCOL):
            given = f"Bearer {offered.removeprefix(KEY_SUBPROTOCOL)}"
    return given


def check_upgrade() -> Response | None:
    """Return the answer to a request that is no handshake of this version, else None. Raises on a malformed one."""
    rule = request.url_rule
    if rule is None or not rule.websocket or request.headers.get("Sec-WebSocket-Version") != _VERSION:
        response = problems.respond(UpgradeRequired())
        response.headers.update({"Upgrade": "websocket", "Sec-WebSocket-Version": _VERSION})
        return response
    if request.method != "GET":
        raise MethodNotAllowed
    try:
        nonce = base64.b64decode(request.headers.get("Sec-WebSocket-Key", ""), validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if len(nonce) != _NONCE_BYTES:
        raise InvalidRequest("Sec-WebSocket-Key must be 16 bytes in base64")
    return None


def tidy(environ: dict[str, Any]) -> None:
    """Leave of the request's headers those of a plain handshake. Call it when nobody needs the others any more."""
    plain = {
        "HTTP_HOST": "gateway",
        "HTTP_CONNECTION": "Upgrade",
        "HTTP_UPGRADE": "websocket",
        "HTTP_SEC_WEBSOCKET_VERSION": _VERSION,
        "HTTP_SEC_WEBSOCKET_KEY": environ["HTTP_SEC_WEBSOCKET_KEY"].strip(),
    }
    if SUBPROTOCOL in _subprotocols():
        plain["HTTP_SEC_WEBSOCKET_PROTOCOL"] = SUBPROTOCOL
    for name in [name for name in environ if name.startswith("HTTP_")]:
        del environ[name]
    environ.update(plain)


def _subprotocols() -> list[str]:
    return [offered.strip() for offered in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
