"""The invariant of the queue's keys, as code: what must be true of them between any two scripts.

An operator may ask it of a live queue, and tests ask it after every step. It reads everything, so it takes long for a
long queue.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import redis

from tasks.queueing.keys import QueueKeys, priority_of

_ZSETS = ("leases", "delayed", "ready")
_HASHES = ("messages", "holders", "returns", "counts")


def check_integrity(client: redis.Redis, keys: QueueKeys) -> list[str]:
    """Return what is wrong with the queue, in words; an empty list if nothing is. Raises redis.RedisError.

    Each message is in exactly one place: its list, `delayed` or `leases`. A lease has a holder. `counts` are the sums of
    what waits and is delayed. `ready` has exactly the lists that are not empty, none later than its first element. There
    is at most one wake marker.
    """
    names = cast("list[bytes]", client.zrange(keys.named("ready"), 0, -1))
    existing = cast("Iterator[bytes]", client.scan_iter(f"{_escaped(keys.lists)}*"))
    lists = sorted({key.removeprefix(keys.lists.encode()) for key in existing} | set(names))
    with client.pipeline(transaction=True) as pipe:
        for name in _ZSETS:
            pipe.zrange(keys.named(name), 0, -1, withscores=True)
        for name in _HASHES:
            pipe.hgetall(keys.named(name))
        for list_name in lists:
            pipe.lrange(keys.lists + list_name.decode("utf-8", "surrogateescape"), 0, -1)
        pipe.llen(keys.wake)
        answers: list[Any] = pipe.execute()
    leases, delayed, ready = (dict(answer) for answer in answers[:3])
    messages, holders, returns, counts = answers[3:7]
    elements: dict[bytes, list[bytes]] = dict(zip(lists, answers[7:-1], strict=True))
    wrong = [*_lists(elements, ready), *_places(messages, elements, leases, delayed)]
    wrong += [f"{tag!r} has no message" for tag in {*leases, *delayed, *holders, *returns} - set(messages)]
    wrong += [f"the lease of {tag!r} has no holder" for tag in leases if tag not in holders]
    counted = {field.decode(): int(count) for field, count in counts.items()}
    if counted != (expected := _sums(messages, leases)):
        wrong.append(f"counted {counted}, there are {expected}")
    return wrong + [f"{answers[-1]} wake markers"] * (answers[-1] > 1)


def _lists(elements: dict[bytes, list[bytes]], ready: dict[bytes, float]) -> Iterator[str]:
    for name, content in elements.items():
        if not content and name in ready:
            yield f"list {name!r} is ready, and empty"
        elif content and name not in ready:
            yield f"list {name!r} is not ready"
        elif content and ready[name] > _turn(content[-1]):
            yield f"list {name!r} is ready later than its first message"


def _places(
    messages: dict[bytes, bytes],
    elements: dict[bytes, list[bytes]],
    leases: dict[bytes, float],
    delayed: dict[bytes, float],
) -> Iterator[str]:
    waiting = Counter((name, element) for name, content in elements.items() for element in content)
    for tag, record in messages.items():
        turn, name, _organization, _tokens = json.loads(record.partition(b"\n")[0])
        in_list = waiting[name.encode(), f"{turn} ".encode() + tag]
        places = (tag in leases) + (tag in delayed)
        # What was delayed or leased may have left an element behind, which is passed over; what waits has one.
        if places > 1 or (places == 0 and in_list != 1):
            yield f"message {tag!r} is in {places} places, and {in_list} times in its list"


def _sums(messages: dict[bytes, bytes], leases: dict[bytes, float]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for tag, record in messages.items():
        if tag not in leases:
            _turn_text, name, organization, tokens = json.loads(record.partition(b"\n")[0])
            sums[f"priority {priority_of(name)}"] += 1
            for field, amount in (("requests", 1), ("tokens", tokens)):
                sums[field] += amount
                sums[f"{field} {organization}"] += amount
    return {field: amount for field, amount in sums.items() if amount}


def _turn(element: bytes) -> float:
    """Return the turn of an element; of one that is none, later than all."""
    try:
        return float(element.partition(b" ")[0])
    except ValueError:
        return math.inf


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "*?[]\\^-" else letter for letter in text)
