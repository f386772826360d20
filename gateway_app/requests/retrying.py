"""Sending a dead request again.

What is dead stays dead: its record has ended. What is sent is a new request with the same content, from the same caller,
governed by what is in force now. Its `admitted` event names the dead one as `retry_of`, and the idempotency key that the
client used, if any, stands for it from then on. Within a day a dead request is sent again only once, however often that
is asked for.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from gateway_app.governance.api_keys import Caller
from gateway_app.pipeline import Accepted, Pipeline
from tasks.crypto import unseal
from tasks.db import now
from tasks.errors import KeyRevoked
from tasks.job import TaskRequest
from tasks.schema import api_keys


def retry(pipeline: Pipeline, row: Row[tuple[object, ...]]) -> Accepted:
    """Take the request of a dead row in once more. A deadline that has passed is left out.

    Raises KeyRevoked if its caller's key is not in use any more, and what Pipeline.submit raises.
    """
    caller = pipeline.database.read(lambda connection: _caller(connection, row.api_key_id))
    # No client can send a key that begins so.
    once = pipeline.idempotency(f"\0retry of {row.request_id}", b"")
    return pipeline.submit(caller, lambda: _task(pipeline, row), once, retry_of=row.request_id)


def _caller(connection: Connection, key_id: str) -> Caller:
    query = sa.select(api_keys).where(api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None))
    key = connection.execute(query).one_or_none()
    if key is None:
        raise KeyRevoked(f"the API key {key_id}, which sent the request, was revoked")
    return Caller(key.key_id, key.organization, key.role)


def _task(pipeline: Pipeline, row: Row[tuple[object, ...]]) -> TaskRequest:
    data_key = pipeline.keys.unwrap(row.data_key, row.request_id)
    task = TaskRequest.model_validate_json(unseal(data_key, row.payload, f"payload:{row.request_id}"))
    late = task.deadline is not None and task.deadline <= now()
    return task.model_copy(update={"deadline": None}) if late else task
