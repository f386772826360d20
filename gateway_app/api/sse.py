"""Server-sent events: how frames, chunks and events go over HTTP."""

from __future__ import annotations

from collections.abc import Iterable

from flask import Response

from tasks.stream import Frame, compact_json

#: A comment: a client that is still there does not see it, and one that is gone is noticed by sending it.
HEARTBEAT = b": still working\n\n"


def respond(events: Iterable[bytes]) -> Response:
    """Answer with a stream that no proxy holds back."""
    return Response(
        events,
        content_type="text/event-stream; charset=utf-8",
        headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"},
    )


def of_frame(frame: Frame | None) -> bytes:
    """Return a frame as an event whose id is its cursor."""
    if frame is None:
        return HEARTBEAT
    return event(frame.data, name=frame.event, event_id=str(frame.cursor))


def event(data: object, name: str | None = None, event_id: str | None = None) -> bytes:
    """Return one event with JSON data."""
    lines = [f"id: {event_id}"] if event_id else []
    lines += [f"event: {name}"] if name else []
    lines.append("data: " + compact_json(data))
    return ("\n".join(lines) + "\n\n").encode()
