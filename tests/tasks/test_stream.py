"""A stream can be joined at any frame, from Redis or from SQL, and shows one attempt's text, whoever else writes."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tasks.crypto import KEY_BYTES, DecryptionFailed
from tasks.errors import InvalidCursor
from tasks.ids import new_request_id
from tasks.job import Choice, FinishReason, Piece, Result, Timings, TokenLogprob, ToolCall, ToolCallDelta, Usage
from tasks.settings import StreamingGroup
from tasks.stream import FIELD, START, Cursor, Frame, completed, delta, ended, gathered, opening, replay, stream_key
from tests.services import RedisServer
from worker_gpu.engines.base import Delta
from worker_gpu.request_stream import RequestStream
from worker_gpu.streams import CROWD, StreamWriter

PREFIX = "test:"
KEY = os.urandom(KEY_BYTES)
#: For this long a test waits for what must come.
PATIENCE_S = 10.0

cursors = st.builds(Cursor, st.integers(0, 10**10 - 1), st.integers(0, 10**15 - 1))
texts = st.text(st.characters(codec="utf-8"), max_size=12)
log_probabilities = st.floats(-1e3, 0)
tool_call_deltas = st.builds(
    ToolCallDelta, index=st.integers(0, 2), id=st.none() | texts, name=st.none() | texts, arguments=texts
)
token_logprobs = st.builds(
    TokenLogprob,
    token=texts,
    logprob=log_probabilities,
    top=st.lists(st.tuples(texts, log_probabilities), max_size=2).map(tuple),
)
pieces = st.builds(
    Piece,
    text=texts,
    choice=st.integers(0, 2),
    tool_calls=st.just(()) | st.lists(tool_call_deltas, max_size=2).map(tuple),
    logprobs=st.just(()) | st.lists(token_logprobs, max_size=2).map(tuple),
)
states = st.sampled_from(["completed", "cancelled", "expired"])
STOPPED: tuple[FinishReason, ...] = ("stop",)


def said(piece: Piece) -> Delta:
    """Return the engine's delta that says this."""
    return Delta(
        text=piece.text,
        output_tokens=1,
        cached_tokens=0,
        prefill_s=None,
        finish_reason=None,
        choice=piece.choice,
        tool_calls=piece.tool_calls,
        logprobs=piece.logprobs,
    )


def result_of(stream: RequestStream, choices: int = 1) -> Result:
    """Return the result that a runner stores of a stream; without a choice it is that of one that was stopped."""
    return Result(
        pieces=tuple(stream.pieces),
        finish_reasons=STOPPED * choices,
        model="tiny",
        usage=Usage(prompt_tokens=700, cached_tokens=640, output_tokens=5),
        timings=Timings(queued_ms=1.5, prefill_ms=None, first_token_ms=30.5, total_ms=99.75),
    )


def frames_in(client: redis.Redis, request_id: str, after: Cursor = START) -> list[Frame]:
    """Return the frames that Redis has of a stream behind a cursor."""
    start = "-" if after == START else f"({after}"
    entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(stream_key(PREFIX, request_id), start, "+"))
    return [
        Frame.unseal(KEY, request_id, Cursor.parse(entry_id.decode()), fields[FIELD]) for entry_id, fields in entries
    ]


def with_writer(
    url: str,
    work: Callable[[StreamWriter], Awaitable[None]],
    *,
    join_ms: float = 0.0,
    join_max_ms: float = 120.0,
    retention_s: int = 3600,
    **options: Any,
) -> None:
    """Run `work` beside a writer that sends, as a worker's loop does. Raises what the writer itself fails with."""

    async def run() -> None:
        client = AsyncRedis.from_url(url, socket_timeout=5, **options)
        writer = StreamWriter(
            client, PREFIX, StreamingGroup(join_ms=join_ms, join_max_ms=join_max_ms, retention_s=retention_s)
        )
        sending = asyncio.create_task(writer.send_forever())
        working = asyncio.ensure_future(cast("Coroutine[Any, Any, None]", work(writer)))
        try:
            done, _ = await asyncio.wait({sending, working}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError("the stream did not end")
            for task in done:
                task.result()
        finally:
            for task in (sending, working):
                task.cancel()
            await asyncio.gather(sending, working, return_exceptions=True)
            await client.aclose()

    asyncio.run(run())


# --- Cursors --------------------------------------------------------------------------------------


@given(cursors)
def test_cursor_round_trip(cursor: Cursor) -> None:
    """A cursor's text is read as that cursor, also with blanks around it, as header values may have."""
    assert Cursor.parse(str(cursor)) == cursor
    assert Cursor.parse(f" {cursor}\t") == cursor


@given(cursors, cursors)
def test_cursors_order_as_redis_orders(one: Cursor, other: Cursor) -> None:
    """By attempt, then by number: as numbers and not as text."""
    key = (one.attempt * 10**15 + one.sequence, other.attempt * 10**15 + other.sequence)
    assert (one < other) == (key[0] < key[1])
    assert (one == other) == (str(one) == str(other))


@pytest.mark.parametrize("text", [None, ""])
def test_no_cursor_is_the_start(text: str | None) -> None:
    """The start is before every frame there can be."""
    assert Cursor.parse(text) == START <= opening(1).cursor


@pytest.mark.parametrize(
    "text",
    [" ", "-", "1", "1-", "-1", "1--1", "1-1-1", "1 - 1", "+1-1", "1-1x", "1.0-1", "0x1-1", "1e3-1", "1_0-1", "$", "*",
     "١-١", "１-１", "\u20281-1", "1-\x001", "9" * 11 + "-1", "1-" + "9" * 16, "1-" + "9" * 10_000],
)  # fmt: skip
def test_what_is_no_cursor(text: str) -> None:
    """It comes from clients and goes to Redis: only two numbers pass, and none that Redis could not hold."""
    with pytest.raises(InvalidCursor):
        Cursor.parse(text)


# --- Frames ---------------------------------------------------------------------------------------


@given(cursors, st.text(st.characters(codec="utf-8"), max_size=50))
def test_frame_round_trip(cursor: Cursor, text: str) -> None:
    """Any text comes back; nothing of it is readable in Redis."""
    frame = Frame(cursor, "delta", {"text": text})
    sealed = frame.seal(KEY, "gw_1")
    assert Frame.unseal(KEY, "gw_1", cursor, sealed) == frame
    if len(text.encode()) > 3:
        assert text.encode() not in sealed


def test_a_frame_is_bound_to_its_place() -> None:
    """Who can write to Redis can't move a frame within a stream or into another, nor change a byte of it."""
    frame = Frame(Cursor(1, 11), "delta", {"text": "x"})
    sealed = frame.seal(KEY, "gw_1")
    for request_id, cursor in (
        ("gw_1", Cursor(1, 12)), ("gw_1", Cursor(2, 11)), ("gw_1", Cursor(11, 1)),
        ("gw_2", Cursor(1, 11)), ("gw_1:1", Cursor(1, 11)), ("", Cursor(1, 11)),
    ):  # fmt: skip
        with pytest.raises(DecryptionFailed):
            Frame.unseal(KEY, request_id, cursor, sealed)
    with pytest.raises(DecryptionFailed):
        Frame.unseal(os.urandom(KEY_BYTES), "gw_1", frame.cursor, sealed)
    for index in range(len(sealed)):
        changed = sealed[:index] + bytes([sealed[index] ^ 1]) + sealed[index + 1 :]
        with pytest.raises(DecryptionFailed):
            Frame.unseal(KEY, "gw_1", frame.cursor, changed)


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled", "expired"])
def test_a_terminal_frame_follows_all_text(state: str) -> None:
    """Where there is no answer, the last frame has the highest number; a newer attempt still follows it."""
    frame = ended(3, state, "engine_failed")
    assert frame.terminal
    assert Cursor(3, 10**14) < frame.cursor < opening(4).cursor
    assert Cursor.parse(str(frame.cursor)) == frame.cursor
    assert frame.data == {"code": "engine_failed", "message": "The model engine failed while running the request."}


def test_the_first_frame_of_an_attempt() -> None:
    """The first attempt starts; a later one tells clients to drop the text they have."""
    assert [opening(attempt).event for attempt in (1, 2, 3)] == ["started", "reset", "reset"]
    assert [str(opening(attempt).cursor) for attempt in (1, 2, 3)] == ["1-0", "2-0", "3-0"]


# --- What is written is what is replayed ----------------------------------------------------------


@dataclass
class Written:
    """One attempt's answer: the pieces that an engine gave, how the attempt ended, and what was stored of it."""

    given: list[Piece]
    attempt: int
    state: str
    result: Result | None = None

    async def write(self, writer: StreamWriter, request_id: str, pauses: random.Random) -> None:
        """Stream it with random pauses, then end it as a runner does."""
        stream = writer.open(request_id, KEY, self.attempt)
        for piece in self.given:
            stream.write(said(piece))
            if pauses.random() < 0.5:
                await asyncio.sleep(pauses.choice([0, 0, 0.001]))
        stream.cut()
        stored = result_of(stream, 3 if self.state == "completed" else 0).model_dump_json(exclude_defaults=True)
        self.result = Result.model_validate_json(stored)
        if self.state == "completed":
            await stream.end(completed(stream.next_cursor, self.result))
        else:
            await stream.end(ended(self.attempt, self.state, self.state))

    def replay(self) -> list[Frame]:
        """Return the frames as they are made from the stored result."""
        assert self.result is not None
        code = None if self.state == "completed" else self.state
        return list(replay(self.attempt, self.result, self.state, code))

    def choice(self, index: int) -> Choice:
        """Return what one choice must be, put together from what was given."""
        own = [piece for piece in self.given if piece.choice == index]
        deltas = [delta for piece in own for delta in piece.tool_calls]
        calls = [[delta for delta in deltas if delta.index == call] for call in sorted({d.index for d in deltas})]
        return Choice(
            text="".join(piece.text for piece in own),
            finish_reason="stop" if self.state == "completed" else None,
            tool_calls=tuple(
                ToolCall(
                    id=next((part.id for part in parts if part.id), ""),
                    name="".join(part.name or "" for part in parts),
                    arguments="".join(part.arguments for part in parts),
                )
                for parts in calls
            ),
            logprobs=tuple(logprob for piece in own for logprob in piece.logprobs),
        )


def as_sent(frames: list[Frame]) -> list[str]:
    """Return frames as a client sees them, byte for byte: the order of fields counts, too."""
    return [f"{frame.cursor} {frame.event} {json.dumps(frame.data)}" for frame in frames]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.builds(Written, st.lists(pieces, max_size=12), st.integers(1, 5), states), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_replay_equals_what_was_written(redis_url: str, answers: list[Written], seed: int) -> None:
    """Several streams at once, each of random pieces with random pauses, answered, cancelled or expired: the same frames
    with the same ids, from Redis as from the stored result, and from every cursor.
    """
    pauses = random.Random(seed)
    ids = [new_request_id() for _ in answers]

    async def work(writer: StreamWriter) -> None:
        await asyncio.gather(*(answer.write(writer, name, pauses) for name, answer in zip(ids, answers, strict=True)))

    with_writer(redis_url, work)
    with redis.Redis.from_url(redis_url) as client:
        for request_id, answer in zip(ids, answers, strict=True):
            live = frames_in(client, request_id)
            again = answer.replay()
            assert as_sent(again) == as_sent(live)
            if live[-1].event == "completed":
                assert gathered(live) == answer.result
            assert [frame.terminal for frame in live] == [False] * (len(live) - 1) + [True]
            for cursor in [START, *(frame.cursor for frame in live)]:
                tail = [frame for frame in again if frame.cursor > cursor]
                assert as_sent(frames_in(client, request_id, cursor)) == as_sent(tail)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.builds(Written, st.lists(pieces, max_size=12), st.just(1), states), st.integers(0, 2**32))
def test_the_choices_are_what_was_given(redis_url: str, answer: Written, seed: int) -> None:
    """However pieces of several choices, tool calls and log probabilities were mixed and joined, each choice gets its
    own, in order; and so does a client that adds the frames up.
    """
    request_id = new_request_id()
    with_writer(redis_url, lambda writer: answer.write(writer, request_id, random.Random(seed)))
    assert answer.result is not None
    expected = [answer.choice(index) for index in range(len(answer.result.choices))]
    assert list(answer.result.choices) == expected
    assert {piece.choice for piece in answer.given if piece != Piece(choice=piece.choice)} <= set(range(len(expected)))
    assert answer.result.text == expected[0].text
    assert answer.result.finish_reason == expected[0].finish_reason
    with redis.Redis.from_url(redis_url) as client:
        deltas = [frame.data for frame in frames_in(client, request_id) if frame.event == "delta"]
    for index, choice in enumerate(expected):
        own = [data for data in deltas if data.get("choice", 0) == index]
        assert "".join(data["text"] for data in own) == choice.text
        assert len([logprob for data in own for logprob in data.get("logprobs", ())]) == len(choice.logprobs)


def test_a_frame_says_no_more_than_it_must() -> None:
    """Text of the only choice is a frame of text alone; what else there is comes beside it."""
    assert delta(Cursor(1, 1), Piece(text="a")).data == {"text": "a"}
    call = ToolCallDelta(index=0, id="call_1", name="reboot", arguments="{")
    top = (("a", -0.5), ("b", -1.5))
    logprob = TokenLogprob(token=top[0][0], logprob=-0.5, top=top)
    assert delta(Cursor(1, 1), Piece(choice=1, tool_calls=(call,), logprobs=(logprob,))).data == {
        "text": "",
        "choice": 1,
        "tool_calls": [{"index": 0, "id": "call_1", "name": "reboot", "arguments": "{"}],
        "logprobs": [{"token": "a", "logprob": -0.5, "top": [["a", -0.5], ["b", -1.5]]}],
    }


def test_a_piece_that_says_nothing_is_no_frame(redis_url: str) -> None:
    """A token whose character is incomplete: clients hear of it when there is something to show."""
    request_id = new_request_id()

    async def work(writer: StreamWriter) -> None:
        stream = writer.open(request_id, KEY, 1)
        for piece in (Piece(), Piece(choice=2), Piece(text="a"), Piece()):
            stream.write(said(piece))
            await asyncio.sleep(0.002)
        stream.cut()
        await stream.end(completed(stream.next_cursor, result_of(stream)))

    with_writer(redis_url, work)
    with redis.Redis.from_url(redis_url) as client:
        assert [str(frame.cursor) for frame in frames_in(client, request_id)] == ["1-0", "1-1", "1-2"]


def test_how_each_choice_ended() -> None:
    """The terminal frame has one reason for those who ask for one answer, and all of them where there are several."""
    usage, timings = Usage(prompt_tokens=1, cached_tokens=0, output_tokens=2), Timings(queued_ms=1, total_ms=2)
    several = Result(pieces=(), finish_reasons=("length", "stop"), model="tiny", usage=usage, timings=timings)
    data = completed(Cursor(1, 1), several).data
    assert (data["finish_reason"], data["finish_reasons"]) == ("length", ["length", "stop"])
    alone = several.model_copy(update={"finish_reasons": ("tool_calls",)})
    data = completed(Cursor(1, 1), alone).data
    assert (data["finish_reason"], "finish_reasons" in data) == ("tool_calls", False)


def test_text_that_comes_close_together_is_one_frame(redis_url: str) -> None:
    """A token costs no frame of its own: 100 within one pause travel in a few."""
    request_id = new_request_id()

    async def work(writer: StreamWriter) -> None:
        stream = writer.open(request_id, KEY, 1)
        for number in range(100):
            stream.write(said(Piece(text=f"{number} ")))
            await asyncio.sleep(0)
        stream.cut()
        await stream.end(completed(stream.next_cursor, result_of(stream)))

    with_writer(redis_url, work, join_ms=50)
    with redis.Redis.from_url(redis_url) as client:
        assert len(frames_in(client, request_id)) <= 5


def test_in_a_crowd_text_gathers_for_longer_and_the_end_waits_for_nothing(redis_url: str) -> None:
    """A thousand streams send their text seldom. What a stream ends with goes out at once, all the same."""
    request_id = new_request_id()

    async def work(writer: StreamWriter) -> None:
        crowd = [writer.reopen(new_request_id(), KEY, 1) for _ in range(CROWD)]
        stream = writer.open(request_id, KEY, 1)
        for number in range(20):
            stream.write(said(Piece(text=f"{number} ")))
            await asyncio.sleep(0.01)
        assert len(stream.pieces) <= 1
        stream.cut()
        async with asyncio.timeout(2.5):
            await stream.end(completed(stream.next_cursor, result_of(stream)))
        assert len(crowd) == CROWD

    with_writer(redis_url, work, join_max_ms=5000)
    with redis.Redis.from_url(redis_url) as client:
        frames = frames_in(client, request_id)
        assert [frame.event for frame in frames][-1] == "completed"
        assert "".join(frame.data.get("text", "") for frame in frames) == "".join(f"{number} " for number in range(20))


def test_a_stream_that_ends_while_its_text_is_being_sent_waits_for_nothing(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent just now must not hold back the end that came meanwhile."""
    request_id = new_request_id()
    send = StreamWriter._send

    async def slowly(writer: StreamWriter, streams: set[RequestStream]) -> None:
        await send(writer, streams)
        await asyncio.sleep(0.1)

    monkeypatch.setattr(StreamWriter, "_send", slowly)

    async def work(writer: StreamWriter) -> None:
        crowd = [writer.reopen(new_request_id(), KEY, 1) for _ in range(CROWD)]
        stream = writer.open(request_id, KEY, 1)
        stream.write(said(Piece(text="All of it.")))
        await stream.sent.wait()
        async with asyncio.timeout(2.5):
            await stream.end(completed(stream.next_cursor, result_of(stream)))
        assert len(crowd) == CROWD

    with_writer(redis_url, work, join_max_ms=5000)
    with redis.Redis.from_url(redis_url) as client:
        assert [frame.event for frame in frames_in(client, request_id)] == ["started", "delta", "completed"]


def test_streams_are_forgotten(redis_url: str) -> None:
    """From the first frame on there is an expiry, so that also a worker that dies leaves nothing for ever."""
    request_id = new_request_id()
    key = stream_key(PREFIX, request_id)
    expiries: list[int] = []

    with redis.Redis.from_url(redis_url) as client:

        async def work(writer: StreamWriter) -> None:
            stream = writer.open(request_id, KEY, 1)
            while not client.exists(key):
                await asyncio.sleep(0.005)
            expiries.append(cast("int", client.ttl(key)))
            client.expire(key, 5)
            stream.write(said(Piece(text="text")))
            await stream.end(ended(1, "failed", "engine_failed"))
            expiries.append(cast("int", client.ttl(key)))

        with_writer(redis_url, work, retention_s=100)
    assert all(90 < expiry <= 100 for expiry in expiries)


# --- Attempts and failures ------------------------------------------------------------------------


def test_a_zombie_cannot_write_into_the_attempt_that_replaced_it(redis_url: str) -> None:
    """From the new attempt's first frame on, the old one's text and end are refused; its own `end` still returns."""
    request_id = new_request_id()
    client = redis.Redis.from_url(redis_url)

    async def work(writer: StreamWriter) -> None:
        zombie = writer.open(request_id, KEY, 1)
        zombie.write(said(Piece(text="seen before ")))
        while len(frames_in(client, request_id)) < 2:
            await asyncio.sleep(0.005)
        # The other worker has a writer of its own; here one does for both.
        second = writer.open(request_id, KEY, 2)
        while frames_in(client, request_id)[-1].event != "reset":
            await asyncio.sleep(0.005)
        zombie.write(said(Piece(text="must not be seen")))
        await zombie.end(ended(1, "failed", "engine_failed"))
        second.write(said(Piece(text="the answer")))
        zombie.write(said(Piece(text="nor this")))
        second.cut()
        result = result_of(second)
        assert result.text == "the answer"
        await second.end(completed(second.next_cursor, result))
        await zombie.end(ended(1, "failed", "engine_failed"))

    with_writer(redis_url, work)
    frames = frames_in(client, request_id)
    client.close()
    assert [(str(frame.cursor), frame.event) for frame in frames] == [
        ("1-0", "started"), ("1-1", "delta"), ("2-0", "reset"), ("2-1", "delta"), ("2-2", "completed"),
    ]  # fmt: skip
    assert frames[3].data == {"text": "the answer"}


def test_telling_again_changes_nothing(redis_url: str) -> None:
    """A redelivered message's worker sends the last frame once more: it is there once."""
    request_id = new_request_id()

    async def work(writer: StreamWriter) -> None:
        for _ in range(3):
            stream = writer.open(request_id, KEY, 2)
            await stream.end(ended(2, "failed", "attempts_exhausted"))

    with_writer(redis_url, work)
    with redis.Redis.from_url(redis_url) as client:
        assert [frame.event for frame in frames_in(client, request_id)] == ["reset", "failed"]


def test_redis_is_killed_while_streams_are_written(own_redis: RedisServer) -> None:
    """Frames are kept while Redis is away and sent when it is back: none is missing, none is there twice."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    pauses = random.Random(seed)
    written: dict[str, Result] = {}

    async def write(writer: StreamWriter) -> None:
        request_id = new_request_id()
        stream = writer.open(request_id, KEY, 1)
        words = [f"{number} " for number in range(120)]
        for number, word in enumerate(words):
            stream.write(said(Piece(text=word, choice=number % 2)))
            await asyncio.sleep(pauses.random() * 0.015)
        stream.cut()
        result = result_of(stream, 2)
        assert [choice.text for choice in result.choices] == ["".join(words[::2]), "".join(words[1::2])]
        await stream.end(completed(stream.next_cursor, result))
        written[request_id] = result

    async def work(writer: StreamWriter) -> None:
        writing = [asyncio.create_task(write(writer)) for _ in range(5)]
        for _ in range(2):
            await asyncio.sleep(0.15)
            own_redis.kill()
            await asyncio.sleep(0.15)
            own_redis.start()
        await asyncio.gather(*writing)

    with_writer(own_redis.url, work)
    assert len(written) == 5
    with redis.Redis.from_url(own_redis.url) as client:
        for request_id, result in written.items():
            assert frames_in(client, request_id) == list(replay(1, result))


def test_frames_are_kept_while_redis_is_away(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A request that ends while Redis is away for longer than its client tries: its frames follow, and `end` returns
    only then. Nothing else has to happen for that.
    """
    request_id = new_request_id()
    results: list[Result] = []

    async def work(writer: StreamWriter) -> None:
        stream = writer.open(request_id, KEY, 1)
        stream.write(said(Piece(text="before ")))
        while stream.unsent() or not stream.pieces:
            await asyncio.sleep(0.005)
        own_redis.kill()
        stream.write(said(Piece(text="meanwhile")))
        stream.cut()
        results.append(result_of(stream))
        ending = asyncio.create_task(stream.end(completed(stream.next_cursor, results[0])))
        while caplog.text.count("frames are kept") < 2:
            await asyncio.sleep(0.005)
        assert not ending.done()
        own_redis.start()
        await ending

    with_writer(own_redis.url, work, retry=Retry(NoBackoff(), 0))
    assert results[0].text == "before meanwhile"
    with redis.Redis.from_url(own_redis.url) as client:
        assert frames_in(client, request_id) == list(replay(1, results[0]))


def test_a_request_that_failed_before_its_first_attempt(redis_url: str) -> None:
    """Publishing seemed to fail and did not: a worker gets the message of a request that failed as attempt 0, and tells
    watchers again. That ends, and so does every other stream of the worker.
    """
    other_id = new_request_id()

    async def work(writer: StreamWriter) -> None:
        unpublished = writer.reopen(new_request_id(), KEY, 0)
        other = writer.open(other_id, KEY, 1)
        async with asyncio.timeout(2):
            await asyncio.gather(
                unpublished.end(ended(0, "failed", "queue_unavailable")),
                other.end(ended(1, "failed", "engine_failed")),
            )

    with_writer(redis_url, work)
    with redis.Redis.from_url(redis_url) as client:
        assert frames_in(client, other_id)[-1].terminal


HALF = "half a smile: \ud83d"


@pytest.mark.parametrize(
    "piece",
    [
        Piece(text=HALF),
        Piece(tool_calls=(ToolCallDelta(index=0, id=HALF, name=HALF, arguments=HALF),)),
        Piece(logprobs=(TokenLogprob(token=HALF, logprob=-1.0, top=((HALF, -1.0),)),)),
    ],
    ids=["text", "tool call", "log probability"],
)
def test_text_that_cannot_be_encoded(redis_url: str, piece: Piece) -> None:
    """One request's broken text, wherever a model or a parser of its calls put it, harms no other request, nor itself:
    what cannot be said becomes a question mark, in Redis as in what is stored.
    """
    broken_id, other_id = new_request_id(), new_request_id()
    stored: list[Result] = []

    async def work(writer: StreamWriter) -> None:
        broken = writer.open(broken_id, KEY, 1)
        broken.write(said(piece))
        other = writer.open(other_id, KEY, 1)
        async with asyncio.timeout(2):
            await other.end(ended(1, "failed", "engine_failed"))
            broken.cut()
            stored.append(Result.model_validate_json(result_of(broken).model_dump_json()))
            await broken.end(completed(broken.next_cursor, stored[0]))

    with_writer(redis_url, work)
    with redis.Redis.from_url(redis_url) as client:
        assert frames_in(client, other_id)[-1].terminal
        frames = frames_in(client, broken_id)
    assert as_sent(frames) == as_sent(list(replay(1, stored[0])))
    assert "half a smile: ?" in str(frames[1].data)
    assert "\\ud83d" not in json.dumps(frames[1].data)
