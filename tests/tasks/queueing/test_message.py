"""A queue message is believed only if a gateway wrote it as it is, and shows nothing of what was asked."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from tasks.crypto import KEY_BYTES, KeyWrapper, Signer
from tasks.errors import MessageRejected
from tasks.ids import new_request_id
from tasks.job import Job, Priority, Prompt, ResponseFormat, Sampling, ToolUse
from tasks.lifecycle import Republished
from tasks.prompts.packing import pack
from tasks.queueing.message import MessageCodec

SIGNING, MASTER = b"s" * KEY_BYTES, b"m" * KEY_BYTES
KEYS = KeyWrapper((MASTER,))
CODEC = MessageCodec(Signer((SIGNING,)), KEYS)
HASH = "ab" * 32
SECRET_TEXT = "xyzzy-what-was-asked"
TOKENS = tuple(range(40_000, 40_200))

floats = st.floats(0, 1, allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 1_000_000),
    temperature=floats,
    top_p=floats.filter(bool),
    top_k=st.integers(0, 1_000_000),
    min_p=floats,
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    stop=st.lists(st.text(min_size=1, max_size=20), max_size=4).map(tuple),
    seed=st.none() | st.integers(0, 2**63 - 1),
    n=st.integers(1, 16),
    logprobs=st.none() | st.integers(0, 20),
    response_format=st.none()
    | st.builds(
        ResponseFormat, type=st.just("json_schema"), json_schema=st.none() | st.dictionaries(st.text(), json_values)
    ),
)
tool_uses = st.builds(
    ToolUse,
    tools=st.lists(st.dictionaries(st.text(), json_values), min_size=1, max_size=3).map(tuple),
    choice=st.sampled_from(["auto", "required", "function:reboot"]),
    parallel=st.booleans(),
)


def new_job(**changes: Any) -> tuple[Job, bytes]:
    """Return a job and its wrapped key."""
    request_id = changes.pop("request_id", None) or new_request_id()
    data_key, wrapped = KEYS.new_key(request_id)
    facts: dict[str, Any] = {
        "epoch": 1,
        "organization": "acme",
        "prompt": Prompt(HASH, TOKENS, 6200),
        "sampling": Sampling(seed=7, stop=(SECRET_TEXT,)),
        "published_at": 1_795_000_000.123456,
    }
    return Job(request_id=request_id, data_key=data_key, **{**facts, **changes}), wrapped


def layers(message: str) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """Return a message, its decoded body, and the envelope in it."""
    outer = json.loads(message)
    body = json.loads(outer["body"])
    return outer, body, body[0][0]


def envelope_of(job: Job, wrapped: bytes, codec: MessageCodec = CODEC) -> dict[str, Any]:
    """Return the envelope that a worker gets as its task's only argument."""
    return layers(codec.encode(job, wrapped).message)[2]


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=300),
    samplings,
    st.integers(1, 2**31 - 1),
    st.text(max_size=50),
    st.floats(0, 4e9),
    st.integers(0, 2**31),
    st.none() | tool_uses,
    st.sampled_from(["low", "normal", "high"]),
)
def test_round_trip(
    ids: list[int],
    sampling: Sampling,
    epoch: int,
    organization: str,
    published_at: float,
    count: int,
    tools: ToolUse | None,
    priority: Priority,
) -> None:
    """Every job comes back exactly, having gone through JSON as text."""
    job, wrapped = new_job(
        prompt=Prompt(HASH, tuple(ids), count),
        sampling=sampling,
        epoch=epoch,
        organization=organization,
        published_at=published_at,
        tools=tools,
        priority=priority,
    )
    assert CODEC.decode(envelope_of(job, wrapped)) == job


OTHER_VALUES: list[Any] = [
    None,
    "",
    "x",
    0,
    1,
    2,
    -1,
    1.0,
    1.5,
    True,
    False,
    [],
    {},
    ["x"],
    "AAAA",
    "ü",
    "\ud800",
    10**400,
]


@pytest.mark.parametrize(
    "name",
    ["v", "id", "epoch", "organization", "hash", "tokens", "published_at", "priority", "key", "sealed", "signature"],
)
def test_any_changed_field(name: str) -> None:
    """Of another value, of another type, or missing: it is refused, with an error that says nothing of the content."""
    envelope = envelope_of(*new_job())
    others = [*OTHER_VALUES, envelope_of(*new_job())[name], str(envelope[name]) + " "]
    for other in others:
        if type(other) is type(envelope[name]) and other == envelope[name]:
            continue
        with pytest.raises(MessageRejected) as caught:
            CODEC.decode({**envelope, name: other})
        assert "acme" not in str(caught.value)
    with pytest.raises(MessageRejected):
        CODEC.decode({key: value for key, value in envelope.items() if key != name})


def test_any_changed_character() -> None:
    """Each character of each text in it."""
    envelope = envelope_of(*new_job())
    for name in ("id", "organization", "hash", "key", "sealed", "signature"):
        text = envelope[name]
        # The last character before base64's padding has bits that mean nothing; they are changed below, in bytes.
        for index in range(len(text.rstrip("=")) - (name == "signature")):
            other = text[:index] + ("A" if text[index] != "A" else "B") + text[index + 1 :]
            with pytest.raises(MessageRejected):
                CODEC.decode({**envelope, name: other})


def test_any_changed_bit_of_the_signature() -> None:
    """None of its 256 bits is for show."""
    envelope = envelope_of(*new_job())
    signature = base64.b64decode(envelope["signature"])
    for bit in range(len(signature) * 8):
        changed = (int.from_bytes(signature) ^ 1 << bit).to_bytes(len(signature))
        with pytest.raises(MessageRejected):
            CODEC.decode({**envelope, "signature": base64.b64encode(changed).decode()})


@pytest.mark.parametrize(
    "envelope", [None, 1, "text", "", [], {}, [1], {"v": 1}, b"bytes", {"v": 1, "signature": "AAAA"}, True, 0.5]
)
def test_what_is_no_envelope(envelope: Any) -> None:
    """Whatever somebody puts into the queue, there is one error, and it is not a crash."""
    with pytest.raises(MessageRejected):
        CODEC.decode(envelope)


def test_parts_of_two_messages() -> None:
    """The sealed part, with its key or without, cannot be moved into another message of the same gateway."""
    first, second = envelope_of(*new_job()), envelope_of(*new_job())
    for names in (
        ("sealed",),
        ("key",),
        ("sealed", "key"),
        ("sealed", "key", "id"),
        ("signature",),
        ("epoch", "signature"),
    ):
        mixed = {**first, **{name: second[name] for name in names}}
        if mixed != first:
            with pytest.raises(MessageRejected):
                CODEC.decode(mixed)


def test_another_gateways_message() -> None:
    """Neither another signing key nor another master key is enough."""
    job, wrapped = new_job()
    envelope = envelope_of(job, wrapped)
    other = b"x" * KEY_BYTES
    for codec in (
        MessageCodec(Signer((other,)), KEYS),
        MessageCodec(Signer((SIGNING,)), KeyWrapper((other,))),
    ):
        with pytest.raises(MessageRejected):
            codec.decode(envelope)


def test_rotation() -> None:
    """Messages that wait while keys are rotated are still accepted; with the old keys gone they are not."""
    new_signing, new_master = b"S" * KEY_BYTES, b"M" * KEY_BYTES
    job, wrapped = new_job()
    envelope = envelope_of(job, wrapped)
    rotated = MessageCodec(Signer((new_signing, SIGNING)), KeyWrapper((new_master, MASTER)))
    assert rotated.decode(envelope) == job
    after = MessageCodec(Signer((new_signing,)), KeyWrapper((new_master, MASTER)))
    with pytest.raises(MessageRejected):
        after.decode(envelope)
    assert after.decode(envelope_of(job, wrapped, rotated)) == job


def _size(job: Job, wrapped: bytes) -> int:
    return len(CODEC.encode(job, wrapped).message.encode())


def test_size() -> None:
    """A message with 200 dynamic tokens stays below 2.5 KB: Redis holds one for every waiting request."""
    assert _size(*new_job(sampling=Sampling(seed=2**62))) < 2500


def test_size_does_not_explode() -> None:
    """What is fixed stays below 2 KB, and a token costs below 10 bytes."""
    empty = _size(*new_job(prompt=Prompt(HASH, (), 6000), sampling=Sampling(seed=2**62)))
    assert empty < 2000
    many = _size(*new_job(prompt=Prompt(HASH, tuple(range(10_000)), 16_000), sampling=Sampling(seed=2**62)))
    assert (many - empty) / 10_000 < 10


def test_nothing_of_the_prompt_is_in_it() -> None:
    """Neither token ids nor stop strings nor tools nor the data key, in whatever layer and encoding."""
    job, wrapped = new_job(tools=ToolUse(tools=({"type": "function", "function": {"name": SECRET_TEXT}},)))
    message = CODEC.encode(job, wrapped).message
    outer, body, envelope = layers(message)
    shown = [message.encode(), json.dumps(outer).encode(), json.dumps(body).encode()]
    shown += [base64.b64decode(envelope[name]) for name in ("key", "sealed", "signature")]
    packed = pack(TOKENS)
    hidden = [
        SECRET_TEXT.encode(),
        b"function",
        job.data_key,
        packed[:40],
        pack(TOKENS[100:103]),
        b"40100",
        b"max_tokens",
    ]
    hidden += [base64.b64encode(part).rstrip(b"=")[:-1] for part in (SECRET_TEXT.encode(), job.data_key, packed[:39])]
    for layer in shown:
        for part in hidden:
            assert part not in layer, part


def test_equal_jobs_look_different() -> None:
    """Nobody who reads Redis sees that the same was asked twice."""
    request_id = new_request_id()
    job, wrapped = new_job(request_id=request_id)
    assert envelope_of(job, wrapped)["sealed"] != envelope_of(job, wrapped)["sealed"]


def test_what_celery_shows_is_the_id_alone() -> None:
    """`argsrepr` and `kwargsrepr` go to logs, events and Flower."""
    job, wrapped = new_job(organization=SECRET_TEXT)
    outer, body, _ = layers(CODEC.encode(job, wrapped).message)
    headers = outer["headers"]
    assert (headers["argsrepr"], headers["kwargsrepr"], headers["id"]) == (job.request_id, "{}", job.request_id)
    assert SECRET_TEXT not in json.dumps([headers, outer["properties"]])
    assert len(body) == 3
    assert len(body[0]) == 1
    assert body[1] == {}
    # With these Celery would hold messages back, or drop them without a word.
    assert (headers["eta"], headers["expires"], headers["timelimit"]) == (None, None, [None, None])


def test_each_epoch_has_a_lease_of_its_own() -> None:
    """The delivery tag names request and epoch, so that a message published again isn't taken for the old one."""
    request_id = new_request_id()
    tags = []
    for epoch in (1, 2):
        queued = CODEC.encode(*new_job(request_id=request_id, epoch=epoch))
        outer = layers(queued.message)[0]
        assert outer["properties"]["delivery_tag"] == queued.tag
        tags.append(queued.tag)
        assert outer["properties"]["delivery_info"] == {"exchange": "gpu", "routing_key": f"gpu.{HASH}"}
    assert tags == [f"{request_id}:1", f"{request_id}:2"]


def republished(job: Job, wrapped: bytes, sealed: bytes, epoch: int) -> Republished:
    """Return what the database gives of a job that is to be published again."""
    return Republished(
        request_id=job.request_id,
        epoch=epoch,
        organization=job.organization,
        static_profile_hash=job.prompt.static_profile_hash,
        prompt_tokens=job.prompt.token_count,
        priority=job.priority,
        data_key=wrapped,
        message=sealed,
        published_at=datetime.fromtimestamp(job.published_at, UTC),
        static_tokens=job.prompt.static_tokens,
        chain=job.prompt.chain,
    )


@example_settings(max_examples=25)
@given(tool_uses | st.none(), samplings, st.sampled_from(["low", "normal", "high"]), st.integers(2, 2**31 - 1))
def test_published_again(tools: ToolUse | None, sampling: Sampling, priority: Priority, epoch: int) -> None:
    """From what SQL keeps comes the same job under the new epoch, and the queue is told the same of it."""
    job, wrapped = new_job(tools=tools, sampling=sampling, priority=priority)
    sealed = CODEC.sealed(job)
    first = CODEC.encode(job, wrapped, sealed)
    again = CODEC.again(republished(job, wrapped, sealed, epoch))
    assert again.tag == f"{job.request_id}:{epoch}"
    assert replace(again, tag=first.tag, message=first.message) == first
    envelope = layers(again.message)[2]
    assert CODEC.decode(envelope) == replace(job, epoch=epoch)
    assert layers(first.message)[2]["sealed"] == envelope["sealed"]
    with pytest.raises(MessageRejected):
        CODEC.decode({**envelope, "epoch": 1})


def test_publishing_again_needs_no_data_key() -> None:
    """A housekeeper that cannot open what is in a request can still sign its message."""
    job, wrapped = new_job()
    blind = MessageCodec(Signer((SIGNING,)), KeyWrapper((b"x" * KEY_BYTES,)))
    again = blind.again(republished(job, wrapped, CODEC.sealed(job), 2))
    assert CODEC.decode(layers(again.message)[2]) == replace(job, epoch=2)


def test_what_the_queue_is_told() -> None:
    """The list, the organization and the size are in the open; the message itself stays out of logs."""
    job, wrapped = new_job(priority="high", organization="acme")
    queued = CODEC.encode(job, wrapped)
    assert (queued.list, queued.organization, queued.tokens, queued.head_start_s) == (f"{HASH}:high", "acme", 6200, 30)
    assert queued.message not in repr(queued)
    assert "sealed" not in repr(queued)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_random_bytes_are_refused(ids: list[int]) -> None:
    """A well-formed envelope without the right signature, as somebody with access to Redis would write it."""
    job, wrapped = new_job(prompt=Prompt(HASH, tuple(ids), 1))
    forged = envelope_of(job, wrapped, MessageCodec(Signer((os.urandom(KEY_BYTES),)), KEYS))
    with pytest.raises(MessageRejected):
        CODEC.decode(forged)
