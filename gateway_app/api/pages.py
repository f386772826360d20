"""Lists in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Response, jsonify


def page(found: Sequence[dict[str, Any]], limit: int) -> Response:
    """Return the first `limit` of `found`, which holds one more if there are more."""
    data = list(found[:limit])
    return jsonify(
        object="list",
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=len(found) > limit,
    )
