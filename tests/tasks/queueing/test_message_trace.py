"""A queue message says which trace its request belongs to, to whoever knows of traces, and harms nobody else by it."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any

import pytest

from tasks.crypto import KEY_BYTES, KeyWrapper, Signer
from tasks.ids import new_request_id
from tasks.job import Job, Prompt, Sampling
from tasks.lifecycle import Republished
from tasks.queueing.message import MessageCodec, Queued

SIGNING = os.urandom(KEY_BYTES)
KEYS = KeyWrapper((os.urandom(KEY_BYTES),))
CODEC = MessageCodec(Signer((SIGNING,)), KEYS)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01 vendor=x"
OTHER = TRACE.replace("0af7", "ffff")


def new_job() -> tuple[Job, bytes]:
    """Return a job and its wrapped key."""
    request_id = new_request_id()
    data_key, wrapped = KEYS.new_key(request_id)
    prompt = Prompt("ab" * 32, (1, 2, 3), 703)
    return Job(request_id, 1, "acme", prompt, Sampling(seed=7), 1_795_000_000.0, data_key), wrapped


def envelope_of(queued: Queued) -> dict[str, Any]:
    """Return what a worker gets."""
    envelope: dict[str, Any] = json.loads(json.loads(queued.message)["body"])[0][0]
    return envelope


def test_it_travels() -> None:
    """The worker's job has the trace; one without has none, and its message holds no field for it."""
    job, wrapped = new_job()
    assert CODEC.decode(envelope_of(CODEC.encode(job, wrapped, trace=TRACE))).trace_context == TRACE
    plain = envelope_of(CODEC.encode(job, wrapped))
    assert CODEC.decode(plain).trace_context is None
    assert not {"trace", "trace_signature"} & set(plain)


def test_what_is_signed_besides_is_as_ever() -> None:
    """A release that does not know the field finds the signature it expects, over the fields it knows."""
    job, wrapped = new_job()
    sealed = CODEC.sealed(job)
    plain = envelope_of(CODEC.encode(job, wrapped, sealed))
    traced = envelope_of(CODEC.encode(job, wrapped, sealed, TRACE))
    assert {name: traced[name] for name in plain} == plain


@pytest.mark.parametrize(
    "changes",
    [
        {"trace": OTHER},
        {"trace": None},
        {"trace": 1},
        {"trace": {"a": []}},
        {"trace_signature": "AAAA"},
        {"trace_signature": "no base64"},
        {"trace_signature": None},
        {"trace_signature": 7},
    ],
)
def test_a_trace_that_no_gateway_wrote(changes: dict[str, Any]) -> None:
    """It is not believed; the request runs all the same, as whoever may change the message could also take it out."""
    job, wrapped = new_job()
    envelope = envelope_of(CODEC.encode(job, wrapped, trace=TRACE))
    assert CODEC.decode({**envelope, **changes}).trace_context is None
    for name in ("trace", "trace_signature"):
        found = CODEC.decode({key: value for key, value in envelope.items() if key != name})
        assert (found.request_id, found.trace_context) == (job.request_id, None)


def test_the_trace_of_another_message() -> None:
    """Its signature holds for one request, and one publishing of it."""
    (job, wrapped), (other, other_wrapped) = new_job(), new_job()
    envelope, another = (
        envelope_of(CODEC.encode(*one, trace=trace))
        for one, trace in (((job, wrapped), TRACE), ((other, other_wrapped), OTHER))
    )
    moved = {name: another[name] for name in ("trace", "trace_signature")}
    assert CODEC.decode(envelope | moved).trace_context is None
    again = envelope_of(CODEC.again(republished(job, wrapped)))
    assert CODEC.decode(again | {name: envelope[name] for name in moved}).trace_context is None


def test_publishing_again() -> None:
    """The request's own trace goes on, or the span that publishes it."""
    job, wrapped = new_job()
    request = republished(job, wrapped)
    assert CODEC.decode(envelope_of(CODEC.again(request))).trace_context == TRACE
    assert CODEC.decode(envelope_of(CODEC.again(request, OTHER))).trace_context == OTHER


def republished(job: Job, wrapped: bytes) -> Republished:
    """Return the job's request as the housekeeper publishes it again."""
    at = datetime.fromtimestamp(job.published_at, UTC)
    prompt = job.prompt
    return Republished(
        job.request_id, 2, "acme", prompt.static_profile_hash, 703, "normal", wrapped, CODEC.sealed(job), at, TRACE
    )
