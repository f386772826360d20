"""`/openapi.json`: the document of this API, for whoever asks."""

from __future__ import annotations

import functools

from flask import Blueprint, Response, json

from gateway_app.openapi.document import document


def blueprint() -> Blueprint:
    """Return the route."""
    openapi = Blueprint("openapi", __name__)

    @functools.cache
    def written() -> bytes:
        return json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode()

    @openapi.get("/openapi.json")
    def show() -> Response:
        return Response(written(), content_type="application/json")

    return openapi
