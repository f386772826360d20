"""Whatever lies in the queue, a worker lives on, answers the others, and never logs what was in it.

One real worker process is sent everything by which Celery or kombu would drop, reject or print a message.
"""

from __future__ import annotations

import base64
import json
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from gateway_app.kv_cache.purging import purge
from tasks import lifecycle
from tasks.kv_folders import Erased
from tasks.queueing.keys import TASK_NAME
from tasks.queueing.scripts import Scripts
from tests.fleet import own_services
from tests.services import wait_until
from tests.worker_gpu.site import Site, site

CANARY = "xyzzy-canary-4711"
#: Two at once, each for a minute, unless it asks for less.
OPTIONS = {"tokens_per_s_per_sequence": 40, "answer_tokens": 2400}
PROPERTIES = {
    "correlation_id": CANARY,
    "delivery_mode": 2,
    "delivery_info": {"exchange": "gpu", "routing_key": "gpu.ab"},
    "priority": 0,
    "delivery_tag": "tag",
}
#: Of KV blocks on disk: two engines' folders, two organizations', and a block.
ENGINES, MINE, OTHERS, KEY = ("0" * 16, "1" * 16), "2" * 32, "3" * 32, "ab" * 36
HEADERS = {"lang": "py", "task": TASK_NAME, "id": CANARY, "argsrepr": CANARY, "kwargsrepr": CANARY}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Site]:
    """Return a site with one worker that runs two requests at once."""
    folder = tmp_path_factory.mktemp("site")
    with own_services(folder, tiny_model), site(folder) as made:
        kv = str(folder / "kv")
        made.start("one", options=OPTIONS, ENGINE__MAX_NUM_SEQS="2", CACHING__TIERS__DISK_DIRECTORY=kv)
        made.wait_until_ready("one")
        yield made


def message(body: Any = None, *, headers: Any = HEADERS, properties: Any = PROPERTIES, **changes: Any) -> bytes:
    """Return a message as Celery writes it, but for what a test changes."""
    text = body if isinstance(body, str) else json.dumps([[{"v": 1, "text": CANARY}], {}, {}] if body is None else body)
    whole = {
        "body": text,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    return json.dumps(whole | changes).encode()


def in_base64(data: bytes) -> dict[str, Any]:
    """Return what a body in kombu's usual encoding changes of a message."""
    return {
        "body": base64.b64encode(data).decode(),
        "properties": {**PROPERTIES, "body_encoding": "base64"},
        "content-encoding": "binary",
    }


HOSTILE: dict[str, bytes] = {
    "not JSON": f"{{{CANARY}".encode(),
    "a text": json.dumps(CANARY).encode(),
    "a list": json.dumps([CANARY]).encode(),
    "nothing": b"",
    "no properties": json.dumps({"body": CANARY}).encode(),
    "properties of another kind": message(properties=[CANARY]),
    "delivery info of another kind": message(properties={**PROPERTIES, "delivery_info": CANARY}),
    "no headers": message(headers={}),
    "headers of none": message(headers=None),
    "headers of another kind": message(headers=[CANARY]),
    "a task that is a list": message(headers={**HEADERS, "task": [CANARY]}),
    "a task that is an object": message(headers={**HEADERS, "task": {CANARY: CANARY}}),
    "an unknown task": message(headers={**HEADERS, "task": f"tasks.{CANARY}"}),
    "Celery's own task": message(headers={**HEADERS, "task": "celery.backend_cleanup"}),
    "the older protocol": message({"task": TASK_NAME, "id": CANARY, "args": [CANARY], "kwargs": {}}, headers={}),
    "a body that is no JSON": message(f"[[{CANARY}"),
    "a body that is a text": message(json.dumps(CANARY)),
    "a body that is empty": message(""),
    "arguments of another kind": message([CANARY, {}, {}]),
    "too many arguments": message([[{"v": 1}, CANARY], {}, {}]),
    "no arguments": message([[], {CANARY: CANARY}, {}]),
    "an envelope that is a text": message([[CANARY], {}, {}]),
    "an envelope that is nothing": message([[None], {}, {}]),
    "an envelope of another version": message([[{"v": 99, "id": CANARY}], {}, {}]),
    "an unsigned envelope": message(),
    "pickle": message(**in_base64(pickle.dumps({"x": CANARY})), **{"content-type": "application/x-python-serialize"}),
    "plain text": message(CANARY, **{"content-type": "text/plain"}),
    "an unknown content type": message(CANARY, **{"content-type": f"application/{CANARY}"}),
    "an unknown encoding": message(CANARY, **{"content-encoding": CANARY}),
    "no base64": message(f"!{CANARY}", properties={**PROPERTIES, "body_encoding": "base64"}),
    "an unknown body encoding": message(properties={**PROPERTIES, "body_encoding": CANARY}),
    "a compression that is none": message(headers={**HEADERS, "compression": "gzip"}),
    "an unknown compression": message(headers={**HEADERS, "compression": CANARY}),
    "deep": message("[" * 100_000 + f'"{CANARY}"'),
    "huge": message([[{"v": 1, "text": CANARY * 200_000}], {}, {}]),
    "binary": b"\x00\xff\xfe" + CANARY.encode() + b"\x80\x00",
    "half a pair": b'{"body": "\\ud800' + CANARY.encode() + b'"}',
}
#: What another worker might be able to verify goes back twice, for seconds, before it is set aside.
UNVERIFIED = {"delivery info of another kind", "an envelope of another version", "an unsigned envelope", "huge"}


def put(made: Site, tag: str, raw: bytes) -> None:
    """Put a message into the queue."""
    Scripts(made.redis, made.keys).run("put", "ab", tag, "default", 5, 0, raw)


def is_gone(made: Site, tag: str) -> bool:
    """Tell whether the queue has nothing of a message any more."""
    return not made.redis.hexists(made.keys.named("messages"), tag)


def altered(made: Site, request_id: str, **changes: Any) -> str:
    """Change a waiting message's headers, or with `envelope` what is signed; return its tag."""
    tag, name = f"{request_id}:1", made.keys.named("messages")
    header, _, raw = cast("bytes", made.redis.hget(name, tag)).partition(b"\n")
    whole = json.loads(raw)
    if "envelope" in changes:
        ((envelope,), *rest) = json.loads(whole["body"])
        whole["body"] = json.dumps([[{**envelope, **changes["envelope"]}], *rest])
    whole["headers"].update(changes.get("headers", {}))
    made.redis.hset(name, tag, header + b"\n" + json.dumps(whole).encode())
    return tag


def test_everything_that_is_no_message(made: Site) -> None:
    """Each is set aside; requests among them are answered as if nothing were there."""
    (worker,) = made.started
    assert worker.process is not None
    ids: list[str] = []
    for number, raw in enumerate(HOSTILE.values()):
        put(made, f"hostile-{number}:1", raw)
        if number % 8 == 0:
            ids.append(made.submit(f"Neighbour {number}", max_tokens=3))
    made.check_ends(ids)
    sure = [f"hostile-{number}:1" for number, what in enumerate(HOSTILE) if what not in UNVERIFIED]
    wait_until(lambda: all(is_gone(made, tag) for tag in sure), 30, "them to be set aside")
    wait_until(lambda: not made.redis.zcard(made.keys.named("leases")), 30, "every lease to end")
    assert worker.process.poll() is None
    assert CANARY not in made.log
    assert "Traceback" not in made.log
    assert "Unrecoverable" not in made.log


def test_a_real_request_whose_message_was_damaged(made: Site) -> None:
    """It is not run as it is, and it is not lost: its row stays open for the housekeeper, who publishes it again. Headers
    that only Celery believes in change nothing: neither a past `expires`, nor a future `eta`, nor nonsense.
    """
    (worker,) = made.started
    assert worker.process is not None
    worker.send(signal.SIGSTOP)
    try:
        damaged = [made.submit(f"{CANARY} {number}", max_tokens=3) for number in range(3)]
        sound = [made.submit(f"{CANARY} sound {number}", max_tokens=3) for number in range(6)]
        altered(made, damaged[0], envelope={"organization": "another"})
        altered(made, damaged[1], envelope={"epoch": 7})
        altered(made, damaged[2], headers={"task": CANARY})
        altered(made, sound[0], headers={"expires": "2001-01-01T00:00:00+00:00"})
        altered(made, sound[1], headers={"eta": "2101-01-01T00:00:00+00:00", "retries": 9})
        altered(made, sound[2], headers={"eta": CANARY, "expires": CANARY, "timelimit": CANARY})
        altered(made, sound[3], headers={"id": CANARY, "argsrepr": CANARY, "shadow": CANARY, "stamps": [CANARY]})
        altered(made, sound[4], headers={"callbacks": CANARY, "group": {CANARY: 1}, "replaced_task_nesting": CANARY})
    finally:
        worker.send(signal.SIGCONT)
    made.check_ends(sound)
    wait_until(lambda: is_gone(made, f"{damaged[2]}:1"), 30, "the unknown task to be set aside")
    time.sleep(0.3)
    assert [row.state for row in made.rows(*damaged)] == ["queued"] * 3
    assert [made.kinds(one) for one in damaged] == [[("received", None), ("admitted", None)]] * 3
    assert worker.process.poll() is None
    assert CANARY not in made.log
    for request_id in damaged:
        made.client.delete(f"/v1/tasks/{request_id}")


def test_a_message_of_an_epoch_that_is_past(made: Site) -> None:
    """Its request was published again since: the older message leads nowhere and is dropped."""
    (worker,) = made.started
    worker.send(signal.SIGSTOP)
    try:
        request_id = made.submit("Of old", max_tokens=3)
        name = made.keys.named("messages")
        record = made.redis.hget(name, f"{request_id}:1")
        made.database.write(lambda on: republish(on, request_id))
        assert record
    finally:
        worker.send(signal.SIGCONT)
    wait_until(lambda: is_gone(made, f"{request_id}:1"), 30, "the older message to be dropped")
    assert [row.state for row in made.rows(request_id)] == ["queued"]
    made.client.delete(f"/v1/tasks/{request_id}")


def republish(connection: Any, request_id: str) -> None:
    """Raise a request's epoch, as the housekeeper does; its new message is not published."""
    assert lifecycle.republish(connection, request_id, 1, 0, max_epochs=9) is not None


def test_a_revoke_is_a_cancel(made: Site) -> None:
    """Waiting or running, terminated or not, by whatever signal: the request ends as by DELETE, once, and nothing else does.
    Ids of nobody, and what is no id, do no harm; nobody who inspects the worker sees a payload.
    """
    (worker,) = made.started
    assert worker.process is not None
    pid = worker.process.pid
    control = made.celery.control
    running = [made.submit(f"{CANARY} {number}") for number in range(2)]
    made.wait_for_states(running, "running")
    waiting = [made.submit(f"{CANARY} {number}") for number in range(2)]
    active = json.dumps(control.inspect(timeout=10, limit=1).active())
    assert all(one in active for one in running)
    assert "sealed" not in active
    control.revoke(waiting[0])
    control.revoke(running[0], terminate=True, signal="SIGKILL")
    control.terminate("gw_nobody", signal="SIGTERM")
    replies = control.broadcast("revoke", {"task_id": [None, 7, "", CANARY]}, reply=True, timeout=10, limit=1)
    assert "ok" in json.dumps(replies)
    made.check_ends([waiting[0], running[0]], "cancelled")
    # Before the other one was begun, or while it waits: either way it goes on.
    assert {row.state for row in made.rows(running[1], waiting[1])} <= {"queued", "running"}
    control.revoke([running[1], waiting[1]], terminate=True)
    made.check_ends([running[1], waiting[1]], "cancelled")
    after = made.submit("And now?", max_tokens=3)
    made.check_ends([after])
    assert (worker.process.poll(), worker.process.pid) == (None, pid)
    assert CANARY not in made.log
    assert "Traceback" not in made.log


def test_an_organizations_blocks_are_erased_on_a_workers_host(made: Site) -> None:
    """Each worker that lives erases that organization's only, and says how much that was. What is no organization's folder does
    no harm, as whoever can write to Redis could ask for it.
    """
    blocks = [made.folder / "kv" / f"{engine}-0" / name / f"{KEY}.kv" for engine in ENGINES for name in (MINE, OTHERS)]
    for block in blocks:
        block.parent.mkdir(parents=True)
        block.write_bytes(bytes(1000))
    harmless: list[Any] = ["..", f"{ENGINES[0]}-0", "/", 7, None]
    for names, erased in (([], Erased(0, 0)), (harmless, Erased(0, 0)), ([MINE], Erased(2, 2000))):
        purged = purge(made.celery, made.redis, made.keys, names)
        assert (purged.by_worker, purged.failed) == ({"one@test": erased}, {})
    assert [block.exists() for block in blocks] == [False, True] * 2
