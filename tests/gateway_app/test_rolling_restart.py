"""A rolling restart of gateways and workers under load: whatever was accepted is answered, once, and nobody waits in vain.

Two of each run; twice, one of each is replaced: another is started, then the old one is asked to end, as an orchestrator
does. Clients talk to any gateway that takes connections, ask again with the same idempotency key where one goes away, and go
on reading a stream elsewhere from the last frame they got.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import redis
import requests

from tasks.ids import new_request_id
from tests.conftest import new_key
from tests.fleet import Gateway, own_services
from tests.services import wait_until
from tests.workers import Worker

SOON_S = 60.0
#: Less than a request takes, so that gateways cut streams off and workers hand requests back.
GRACE_S = 1
SETTINGS = {
    "SCHEDULING__DRAIN_S": str(GRACE_S),
    "SCHEDULING__LEASE_S": "4",
    "ENGINE__MAX_NUM_SEQS": "4",
    "ENGINE__OPTIONS": '{"time_scale": 12}',
}
SEEDS = 3
TOKENS = 48


class Balancer:
    """The gateways that clients know of."""

    def __init__(self) -> None:
        self.gateways: list[Gateway] = []
        self._turn = 0

    def url(self) -> str:
        """Return the next gateway's URL, in turn."""
        self._turn += 1
        gateways = list(self.gateways)
        return gateways[self._turn % len(gateways)].url


class Customer(threading.Thread):
    """Sends tasks one after the other and reads each answer to its end, through whatever happens."""

    def __init__(self, balancer: Balancer, key: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._balancer = balancer
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {key}"
        self._seed = seed
        self.texts: dict[str, str] = {}
        self.refused: list[str] = []
        self.resumed = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Go on until stopped; the last task is read to its end."""
        while not self.stopped.is_set():
            request_id = self._submit()
            if request_id is not None:
                self.texts[request_id] = self._read(request_id)

    def _submit(self) -> str | None:
        task = {
            "agent": "incident-responder",
            "directive": "What now?",
            "sampling": {"max_tokens": TOKENS, "seed": self._seed},
        }
        key = {"Idempotency-Key": new_request_id()}
        while not self.stopped.is_set():
            with suppress(requests.RequestException):
                answer = self._session.post(f"{self._balancer.url()}/v1/tasks", json=task, headers=key, timeout=30)
                if answer.status_code == 202:
                    request_id: str = answer.json()["id"]
                    return request_id
                if answer.status_code != 503:
                    self.refused.append(answer.text)
                    return None
            self.stopped.wait(0.05)
        return None

    def _read(self, request_id: str) -> str:
        text, last, name = "", "", ""
        while name != "completed":
            with suppress(requests.RequestException):
                for cursor, kind, data in self._frames(request_id, last):
                    last, name = cursor, kind
                    text = "" if name == "reset" else text + data.get("text", "")
            if name in ("failed", "dead", "cancelled", "expired"):
                self.refused.append(f"{request_id}: {name}")
                return text
            self.resumed += name != "completed"
        return text

    def _frames(self, request_id: str, last: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        url = f"{self._balancer.url()}/v1/tasks/{request_id}/events"
        headers = {"Last-Event-ID": last} if last else {}
        with self._session.get(url, headers=headers, stream=True, timeout=30) as answer:
            fields: dict[str, str] = {}
            for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
                if not line and "event" in fields:
                    yield fields["id"], fields["event"], json.loads(fields["data"])
                    fields = {}
                elif line and not line.startswith(":"):
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")


class Rolling:
    """Gateways and workers, some of them on their way out."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self.balancer = Balancer()
        self.workers: list[Worker] = []
        self._started: list[Gateway] = []

    def start_pair(self) -> None:
        """Start a gateway and a worker."""
        number = len(self._started)
        worker = Worker(self._folder / "worker.log", f"gpu{number}@test")
        worker.start()
        self.workers.append(worker)
        options = ("--graceful-timeout", str(GRACE_S))
        self._started.append(Gateway(self._folder / "gateway.log", self._environment | os.environ, *options))

    def let_in(self, client: redis.Redis, number: int) -> None:
        """Wait until the pair of that number is ready, and let clients know of its gateway."""
        gateway = self._started[number]
        ready = f"metaqore:worker:gpu{number}@test"

        def takes_requests() -> bool:
            state: Any = client.get(ready)
            return gateway.ready() and state is not None and json.loads(state)["state"] == "ready"

        wait_until(takes_requests, SOON_S, "a gateway and a worker")
        self.balancer.gateways.append(gateway)

    def end_pair(self) -> None:
        """Ask the oldest pair to end, and wait until it has. No new connections come to it."""
        gateway, worker = self.balancer.gateways.pop(0), self.workers.pop(0)
        assert worker.process is not None
        worker.process.send_signal(signal.SIGTERM)
        os.kill(gateway.process.pid, signal.SIGTERM)
        assert gateway.process.wait(SOON_S) == 0
        worker.stop()

    def kill(self) -> None:
        """End everything at once."""
        for gateway in self._started:
            gateway.kill()
        for worker in self.workers:
            worker.kill()


def test_a_rolling_restart(tmp_path: Path, tiny_model: Path) -> None:
    """Every accepted task is answered with the text that its seed has, exactly once; streams that were cut off go on."""
    with own_services(tmp_path, tiny_model, **SETTINGS) as environment:
        rolling = Rolling(tmp_path, environment)
        key = new_key("default")
        client = redis.Redis.from_url(environment["REDIS_URL"])
        customers = [Customer(rolling.balancer, key, number % SEEDS) for number in range(2 * SEEDS)]
        try:
            rolling.start_pair()
            rolling.start_pair()
            rolling.let_in(client, 0)
            rolling.let_in(client, 1)
            for customer in customers:
                customer.start()
            for number in (2, 3):
                rolling.start_pair()
                rolling.let_in(client, number)
                rolling.end_pair()
            answered = sum(len(customer.texts) for customer in customers)
            wait_until(
                lambda: sum(len(customer.texts) for customer in customers) >= answered + 2, SOON_S, "answers afterwards"
            )
            for customer in customers:
                customer.stopped.set()
            for customer in customers:
                customer.join(SOON_S)
                assert not customer.is_alive(), "an answer that never ends"
        finally:
            rolling.kill()
            client.close()
    assert [refusal for customer in customers for refusal in customer.refused] == []
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as database:
        states = dict(database.execute("SELECT request_id, state FROM requests").fetchall())
        kinds = Counter(database.execute("SELECT request_id, kind FROM audit_events").fetchall())
    read = {request_id for customer in customers for request_id in customer.texts}
    assert read == set(states), "every accepted task was read, and every one that was read was accepted"
    assert set(states.values()) == {"completed"}
    assert all(kinds[request_id, "completed"] == 1 for request_id in states)
    for seed in range(SEEDS):
        texts = {text for customer in customers if customer._seed == seed for text in customer.texts.values()}
        assert len(texts) == 1, f"seed {seed}: what a restart cut off came out otherwise"
    handed_back = sum(count for (_, kind), count in kinds.items() if kind == "requeued")
    resumed = sum(customer.resumed for customer in customers)
    print(f"{len(states)} tasks, {handed_back} handed back, {resumed} streams resumed")
    assert handed_back, "no worker had anything to hand back: this test showed nothing of it"
    assert resumed, "no gateway cut a stream off: this test showed nothing of it"
