"""Telling the watchers of a request that has ended how it ended, where they may not have heard it."""

from __future__ import annotations

from pydantic import ValidationError

from tasks.crypto import DecryptionFailed, unseal
from tasks.job import Job, Result
from tasks.lifecycle import NotStarted
from tasks.logs import get_logger
from tasks.schema import TERMINAL_STATES
from tasks.stream import completed, ended
from worker_gpu.records import Records
from worker_gpu.streams import StreamWriter

logger = get_logger(__name__)


async def tell_again(job: Job, outcome: NotStarted, records: Records, streams: StreamWriter) -> None:
    """Send what the request's stream may lack; a watcher otherwise learns of it from SQL, later."""
    if outcome.state is None or outcome.state not in TERMINAL_STATES:
        logger.info("a message leads nowhere", request_id=job.request_id, epoch=job.epoch)
        return
    sealed = await records.result(job.request_id) if outcome.answered else None
    if sealed is None:
        stream = streams.reopen(job.request_id, job.data_key, outcome.attempt)
        await stream.end(ended(outcome.attempt, outcome.state, outcome.code))
        return
    try:
        result = Result.model_validate_json(unseal(job.data_key, sealed, f"result:{job.request_id}"))
    except (DecryptionFailed, ValidationError):
        logger.error("a stored answer cannot be read", request_id=job.request_id)
        return
    stream = streams.restore(job.request_id, job.data_key, outcome.attempt, result.pieces)
    if outcome.state == "completed":
        await stream.end(completed(stream.next_cursor, result))
    else:
        await stream.end(ended(outcome.attempt, outcome.state, outcome.code))
