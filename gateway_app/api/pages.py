"""Pages of lists: of the native API, and in OpenAI's form. What is found holds one more than is shown, if there is more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flask import Response, jsonify

T = TypeVar("T")


def listing(found: Sequence[T], limit: int, show: Callable[[T], dict[str, Any]]) -> Response:
    """Return the first `limit` of `found` as `show` writes them, and whether there are more."""
    return jsonify(data=[show(item) for item in found[:limit]], has_more=len(found) > limit)


def page(found: Sequence[dict[str, Any]], limit: int) -> Response:
    """Return the first `limit` of `found` in OpenAI's form."""
    data = list(found[:limit])
    return jsonify(
        object="list",
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=len(found) > limit,
    )
