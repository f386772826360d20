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
_HASHES = ("messages", "holders", "returns", "counts", "lists", "sums")
#: As in common.lua.
_SUM_BASE_MS = 1_700_000_000_000


def check_integrity(client: redis.Redis, keys: QueueKeys) -> list[str]:
    """Return what is wrong with the queue, in words; an empty list if nothing is. Raises redis.RedisError.

    Each message is in exactly one place: its list, `delayed` or `leases`. A lease has a holder. `counts` are the sums of
    what waits and is delayed. `ready` has exactly the lists that are not empty, none later than its first element, and so
    have the organizations' parts of it together, except for lists that a release put there which knows of none. `sums`
    are those of what waits in the lists, and the `hot` lists of a worker are the ready ones whose profiles it holds. There
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
    first = len(_ZSETS) + len(_HASHES)
    leases, delayed, ready = (dict(answer) for answer in answers[: len(_ZSETS)])
    messages, holders, returns, counts, facts, sums = answers[len(_ZSETS) : first]
    elements: dict[bytes, list[bytes]] = dict(zip(lists, answers[first:-1], strict=True))
    wrong = [*_lists(elements, ready), *_places(messages, elements, leases, delayed)]
    wrong += _organizations(client, keys, ready, facts)
    wrong += _hot_lists(client, keys, ready, facts)
    wrong += _waiting_times(messages, {*leases, *delayed}, facts, sums)
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


def _organizations(
    client: redis.Redis, keys: QueueKeys, ready: dict[bytes, float], facts: dict[bytes, bytes]
) -> Iterator[str]:
    found: dict[bytes, float] = {}
    for key in cast("Iterator[bytes]", client.scan_iter(f"{_escaped(keys.named('ready:'))}*")):
        organization = key.removeprefix(keys.named("ready:").encode())
        for name, turn in cast("list[tuple[bytes, float]]", client.zrange(key, 0, -1, withscores=True)):
            if facts.get(name, b"").split(b"\t", 3)[3:] != [organization]:
                yield f"list {name!r} is ready in organization {organization!r}, and not known as its"
            found[name] = turn
        if client.zscore(keys.named("served"), organization) is None:
            yield f"organization {organization!r} has lists ready, and is never served"
    if found != (expected := {name: turn for name, turn in ready.items() if name in facts}):
        yield f"ready in organizations are {found}, and in all {expected}"


def _hot_lists(
    client: redis.Redis, keys: QueueKeys, ready: dict[bytes, float], facts: dict[bytes, bytes]
) -> Iterator[str]:
    expected: dict[bytes, dict[bytes, float]] = {}
    for key in cast("Iterator[bytes]", client.scan_iter(f"{_escaped(keys.named('copies:'))}*")):
        profile = key.removeprefix(keys.named("copies:").encode())
        copies = cast("dict[bytes, bytes]", client.hgetall(key))
        holders = [worker for worker, how in copies.items() if how.startswith(b"held")]
        names = [name for name in (profile, profile + b":high", profile + b":low") if name in ready and name in facts]
        for worker in holders:
            for name in names:
                own = keys.named("hot:").encode() + worker + b"/" + facts[name].split(b"\t", 3)[3]
                expected.setdefault(own, {})[name] = ready[name]
    found = cast("Iterator[bytes]", client.scan_iter(f"{_escaped(keys.named('hot:'))}*"))
    hot = {key: dict(cast("Any", client.zrange(key, 0, -1, withscores=True))) for key in found}
    if hot != expected:
        yield f"ready for those who hold the profile are {hot}, and should be {expected}"


def _waiting_times(
    messages: dict[bytes, bytes], elsewhere: set[bytes], facts: dict[bytes, bytes], sums: dict[bytes, bytes]
) -> Iterator[str]:
    expected: Counter[bytes] = Counter()
    for tag, record in messages.items():
        turn, name, *others = json.loads(record.partition(b"\n")[0])
        if tag not in elsewhere and name.encode() in facts:
            # A release that knew of no sums wrote none of what they are made of.
            head_start_s = next(iter(others[4:]), 0)
            expected[name.encode()] += math.floor((float(turn) + head_start_s) * 1000) - _SUM_BASE_MS
            expected[name.encode() + b" count"] += 1
    counted = {name: int(value) for name, value in sums.items()}
    if counted != expected:
        yield f"the times of what waits are summed up to {counted}, and are {dict(expected)}"


def _places(
    messages: dict[bytes, bytes],
    elements: dict[bytes, list[bytes]],
    leases: dict[bytes, float],
    delayed: dict[bytes, float],
) -> Iterator[str]:
    waiting = Counter((name, element) for name, content in elements.items() for element in content)
    for tag, record in messages.items():
        turn, name, *_ = json.loads(record.partition(b"\n")[0])
        in_list = waiting[name.encode(), f"{turn} ".encode() + tag]
        places = (tag in leases) + (tag in delayed)
        # What was delayed or leased may have left an element behind, which is passed over; what waits has one.
        if places > 1 or (places == 0 and in_list != 1):
            yield f"message {tag!r} is in {places} places, and {in_list} times in its list"


def _sums(messages: dict[bytes, bytes], leases: dict[bytes, float]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for tag, record in messages.items():
        if tag not in leases:
            _turn_text, name, organization, tokens, *_ = json.loads(record.partition(b"\n")[0])
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
