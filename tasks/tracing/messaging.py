"""The queue as traces tell it, in the words of OpenTelemetry's conventions for messaging."""

from __future__ import annotations

from typing import Any

from tasks.queueing.keys import FAMILY

_QUEUE = {"messaging.system": "redis", "messaging.destination.name": FAMILY}
PUBLISH, PROCESS = f"publish {FAMILY}", f"process {FAMILY}"


def publishing(tag: str) -> dict[str, Any]:
    """Return the attributes of putting a message, by its name, into the queue."""
    return {
        **_QUEUE,
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.message.id": tag,
    }


def processing(tag: str) -> dict[str, Any]:
    """Return the attributes of doing what a message asks for."""
    return {
        **_QUEUE,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.id": tag,
    }
