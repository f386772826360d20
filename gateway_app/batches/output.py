"""A batch's end: write what became of its lines into two files, in the order of the input.

Answers are read from the record a few at a time and go straight into sealed chunks. Both files become visible in the
transaction that ends the batch. A driver that takes over here begins with new files; what the last one wrote is swept.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from gateway_app.batches import items
from gateway_app.batches.answers import Answer, failed, succeeded
from gateway_app.batches.claims import Claim, ClaimLost
from gateway_app.batches.files import FileWriter
from gateway_app.batches.ports import Services
from gateway_app.batches.usage import Usage
from gateway_app.governance.api_keys import Caller
from tasks.db import now
from tasks.errors import ServiceUnavailable
from tasks.logs import get_logger
from tasks.schema import requests

logger = get_logger(__name__)
#: Lines whose answers are in memory at once.
_PAGE = 16


class Output:
    """Writes the files of one batch."""

    def __init__(self, services: Services, claim: Claim, row: Row[Any]) -> None:
        self._services = services
        self._claim = claim
        self._batch = row
        self._key = services.keys.unwrap(row.data_key, row.batch_id)
        self._writers: dict[bool, FileWriter] = {}
        self._usage = Usage()
        self._unreadable = 0

    def pages(self) -> Iterator[float]:
        """Write both files and end the batch. Yields between pages. Raises ClaimLost."""
        after = 0
        while page := self._services.database.read(
            lambda connection, after=after: items.page(connection, self._batch.batch_id, after, _PAGE)  # type: ignore[misc]
        ):
            for answer in self._answers(page):
                self._writer(answer).write(answer.text)
            after = page[-1].line_number
            self._claim.look()
            yield 0
        for writer in self._writers.values():
            writer.flush()
        self._claim.write(self._conclude)

    def _answers(self, page: list[Row[Any]]) -> Iterator[Answer]:
        wanted = [item.request_id for item in page if item.state == "completed"]
        query = sa.select(requests).where(requests.c.request_id.in_(wanted))
        rows = self._services.database.read(lambda connection: list(connection.execute(query))) if wanted else []
        found = {row.request_id: row for row in rows}
        for item in page:
            yield self._answer(item, found.get(item.request_id))

    def _answer(self, item: Row[Any], row: Row[Any] | None) -> Answer:
        if item.state == "completed":
            try:
                if row is None:
                    raise LookupError
                body = self._services.render(row)
                answer = succeeded(item, body)
            except ServiceUnavailable:
                raise
            except Exception as error:  # this line's, whatever it is: the others have their answers
                logger.error("an answer cannot be read", request_id=item.request_id, error=type(error).__name__)
                self._unreadable += 1
            else:
                self._usage.add(body)
                return answer
        return failed(item, self._key)

    def _writer(self, answer: Answer) -> FileWriter:
        writer = self._writers.get(answer.succeeded)
        if writer is None:
            caller = Caller(self._batch.api_key_id, self._batch.organization)
            name = f"{self._batch.batch_id}_{'output' if answer.succeeded else 'error'}.jsonl"
            writer = self._services.files.open(caller, name, self._claim.write)
            self._writers[answer.succeeded] = writer
        return writer

    def _conclude(self, connection: Connection) -> None:
        seconds = self._batch.output_seconds
        for writer in self._writers.values():
            writer.finish(connection, "batch_output", timedelta(seconds=seconds) if seconds else None)
        counts = items.counts(connection, self._batch.batch_id)
        status = (
            "cancelled" if self._batch.status == "cancelling" else "expired" if "expired" in counts else "completed"
        )
        values = {
            "ended_at": now(),
            "completed": counts.get("completed", 0) - self._unreadable,
            "failed": counts.get("failed", 0) + self._unreadable,
            "output_file_id": self._writers[True].file_id if True in self._writers else None,
            "error_file_id": self._writers[False].file_id if False in self._writers else None,
            "usage": self._usage.as_dict(),
        }
        if not self._claim.move(connection, self._batch.status, status, values):
            raise ClaimLost
