"""The properties of a `gpu` message, which tell on its way through Celery how it was taken from Redis.

It is known by its delivery tag, which gets a prefix on its way to Celery. Its record, how often it came back, and why this
worker has it are beside that.
"""

from __future__ import annotations

from typing import Any

from kombu.utils.json import loads

from tasks.queueing.qos import OURS


def message_of(tag: bytes, record: bytes, returns: int, decision: bytes) -> dict[str, Any]:
    """Return a message as Celery has it. What is no message may raise anything here."""
    message: dict[str, Any] = loads(record.partition(b"\n")[2])
    properties = message["properties"]
    properties["delivery_tag"] = OURS + tag.decode()
    properties["record"], properties["returns"], properties["decision"] = record, returns, decision
    return message


def lease_tag(tag: str) -> str:
    """Return the tag under which a `gpu` message is leased."""
    return tag.removeprefix(OURS)


def record_of(message: Any) -> bytes:
    """Return a `gpu` message as Redis has it, which `Leases.hold` wants."""
    record: bytes = message.properties["record"]
    return record


def decision_of(message: Any) -> bytes:
    """Return why a `gpu` message was given to this worker, as JSON; empty if that is not known."""
    decision: bytes = message.properties["decision"]
    return decision


def returns_of(message: Any) -> int:
    """Return how often a `gpu` message was given back, or lost by its worker, before this delivery."""
    returns: int = message.properties["returns"]
    return returns
