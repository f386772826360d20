"""One large batch through the gateway's part of it: memory, and lines a second.

A batch is uploaded as multipart, validated, run line by line against workers that answer at once, and its output is
read back, on a SQLite of its own. Requests are admitted in SQL as the pipeline does it, without tokenising: what is
measured is the batch itself. Memory is the growth of this process over its size once everything is imported and open.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import psutil
import sqlalchemy as sa

from bench.report import arguments, finish
from gateway_app.batches.batches import Batches
from gateway_app.batches.claims import take
from gateway_app.batches.driver import drive
from gateway_app.batches.files import Files
from gateway_app.batches.upload import receive
from gateway_app.governance.api_keys import ApiKeys, Caller
from tasks.audit.events import Subject
from tasks.crypto import KEY_BYTES, KeyWrapper
from tasks.db import Database, now
from tasks.migrating import upgrade
from tasks.schema import requests
from tasks.schema_batches import batches
from tasks.settings import DatabaseGroup
from tests.gateway_app.batches.fakes import URL, FakeGateway, jsonl, line

MIB = 2**20
BOUNDARY = "b0undary"


class Body(io.RawIOBase):
    """A multipart upload of many lines that is made as it is read."""

    def __init__(self, lines: int, pad: int) -> None:
        self._parts = self._all(lines, pad)
        self._held = bytearray()

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes."""
        while len(self._held) < size and (part := next(self._parts, None)) is not None:
            self._held += part
        data = bytes(self._held[:size])
        del self._held[:size]
        return data

    @staticmethod
    def _all(lines: int, pad: int) -> Iterator[bytes]:
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'.encode()
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n'.encode()
        for number in range(lines):
            yield jsonl(line(f"request-{number}", body={"name": f"request-{number}", "pad": "x" * pad}))
        yield f"\r\n--{BOUNDARY}--\r\n".encode()


class Gateway(FakeGateway):
    """Takes requests in; its workers answer all that came since they last did."""

    def __init__(self, database: Database, keys: KeyWrapper) -> None:
        super().__init__(database, keys)
        self._waiting: list[str] = []

    def admit(self, subject: Subject, body: Mapping[str, Any], deadline: datetime) -> None:
        """Store the request as queued."""
        super().admit(subject, body, deadline)
        self._waiting.append(subject.request_id)

    def answer(self) -> None:
        """Complete what waits."""
        waiting, self._waiting = self._waiting, []
        self.submitted.clear()
        done = sa.update(requests).where(requests.c.request_id.in_(waiting))
        done = done.values(state="completed", finished_at=now())
        self.database.write(lambda connection: connection.execute(done) and None)


class Memory:
    """Watches how large this process gets."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._base = self._process.memory_info().rss
        self._peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def peak(self) -> float:
        """Return the growth in MiB since the last call at its highest, and begin anew."""
        peak, self._peak = self._peak, 0
        return (peak - self._base) / MIB

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._process.memory_info().rss)
            time.sleep(0.01)


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    parser.add_argument("--lines", type=int, default=50_000, help="default: %(default)s")
    parser.add_argument("--pad", type=int, default=1000, help="bytes of each prompt; default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'gateway.db'}"
        upgrade(url)
        database = Database(DatabaseGroup(url=url))
        try:
            figures = measure(database, options)
        finally:
            database.close()
    finish("batch_memory", options, figures, {name: ("<=", 48.0) for name in figures if name.endswith("_mib")})


def measure(database: Database, options: Any) -> dict[str, float]:
    """Put one batch through."""
    keys = KeyWrapper((os.urandom(KEY_BYTES),))
    files, gateway = Files(database, keys), Gateway(database, keys)
    caller = Caller(ApiKeys(database, (b"pepper",)).create("default", "bench")[0], "default")
    services = gateway.services(files)
    stream = cast("Any", Body(10, options.pad))
    files.delete(receive(files, database, caller, stream, BOUNDARY), "default")
    memory, figures = Memory(), {}

    def timed(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        figures[f"{name}_lines_per_s"] = options.lines / (time.perf_counter() - started)
        figures[f"{name}_mib"] = memory.peak()

    def upload() -> None:
        body = cast("Any", Body(options.lines, options.pad))
        Batches(database, keys).create(caller, URL, receive(files, database, caller, body, BOUNDARY))

    timed("upload", upload)
    claim = take(database, "bench", 30)
    assert claim is not None  # noqa: S101  the batch is there
    steps = drive(services, claim)

    def until(*statuses: str) -> None:
        for _ in steps:
            gateway.answer()
            if status(database) in statuses:
                return

    timed("validate", lambda: until("in_progress"))
    timed("run", lambda: until("finalizing"))
    timed("write", lambda: until("completed"))
    [output] = files.page("default", "batch_output", None, 2, ascending=True)
    timed("read", lambda: sum(map(len, files.read(output))))
    if status(database) != "completed":
        raise SystemExit("the batch did not complete")
    return figures


def status(database: Database) -> str:
    """Return the batch's status."""
    return str(database.read(lambda connection: connection.execute(sa.select(batches.c.status)).scalar_one()))


if __name__ == "__main__":
    main()
