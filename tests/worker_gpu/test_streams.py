"""Writing streams costs bounded memory, and waits for nobody who reads them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

import redis

from tasks.ids import new_request_id
from tasks.job import Result, Timings, Usage
from tasks.queueing.connecting import connect_async
from tasks.settings import StreamingGroup
from tasks.stream import FIELD, Cursor, Frame, completed, replay, stream_key
from tests.services import RedisServer
from worker_gpu.background import cancel
from worker_gpu.engines.base import Delta
from worker_gpu.request_stream import FRAMES_AT_ONCE, JOINED_AT_MOST, RequestStream
from worker_gpu.streams import StreamWriter

KEY = b"k" * 32
PREFIX = "metaqore:"


def with_writer(url: str, work: Callable[[StreamWriter], Coroutine[Any, Any, None]], join_ms: float = 0.0) -> None:
    """Run `work` beside a writer that sends."""

    async def run() -> None:
        client = connect_async(url, 1.0)
        writer = StreamWriter(client, PREFIX, StreamingGroup(join_ms=join_ms))
        sending = asyncio.create_task(writer.send_forever())
        try:
            async with asyncio.timeout(60):
                await work(writer)
        finally:
            await cancel([sending])
            await asyncio.gather(sending, return_exceptions=True)
            await client.aclose()

    asyncio.run(run())


def word(number: int) -> Delta:
    """Return an engine's delta."""
    return Delta(f"{number} ", number + 1, 0, None, None)


def result_of(stream: RequestStream) -> Result:
    """Return what a worker would record."""
    return Result(
        pieces=stream.pieces,
        finish_reasons=("stop",),
        model="tiny",
        usage=Usage(prompt_tokens=1, cached_tokens=0, output_tokens=1),
        timings=Timings(queued_ms=0, total_ms=0),
    )


def frames_in(url: str, request_id: str) -> list[Frame]:
    """Return the frames that Redis has."""
    with redis.Redis.from_url(url) as client:
        entries: Any = client.xrange(stream_key(PREFIX, request_id))
    return [Frame.unseal(KEY, request_id, Cursor.parse(name.decode()), fields[FIELD]) for name, fields in entries]


def test_an_outage_costs_no_memory_but_the_text(own_redis: RedisServer) -> None:
    """While Redis is away nothing is kept but the text that the record needs, in few pieces; all of it follows."""
    request_id, words = new_request_id(), 20_000

    async def work(writer: StreamWriter) -> None:
        stream = writer.open(request_id, KEY, 1)
        stream.write(word(0))
        await stream.sent.wait()
        own_redis.kill()
        for number in range(1, words):
            stream.write(word(number))
            if not number % 1000:
                await asyncio.sleep(0.01)
        kept = len(stream.pieces)
        print(f"{words} words in {kept} pieces")
        assert kept <= words / JOINED_AT_MOST + 5
        assert sum(map(len, stream._waiting.values())) < JOINED_AT_MOST
        own_redis.start()
        stream.cut()
        await stream.end(completed(stream.next_cursor, result_of(stream)))
        assert frames_in(own_redis.url, request_id) == list(replay(1, result_of(stream)))
        assert result_of(stream).text == "".join(f"{number} " for number in range(words))

    with_writer(own_redis.url, work)


def test_what_is_too_much_for_once_goes_out_in_parts(redis_url: str) -> None:
    """In order, and to the end."""
    request_id = new_request_id()

    async def work(writer: StreamWriter) -> None:
        stream = writer.open(request_id, KEY, 1)
        for number in range(3 * FRAMES_AT_ONCE + 1):
            stream.write(word(number))
            stream.cut()
        assert len(stream.unsent()) == FRAMES_AT_ONCE + 1
        await stream.end(completed(stream.next_cursor, result_of(stream)))
        assert frames_in(redis_url, request_id) == list(replay(1, result_of(stream)))

    with_writer(redis_url, work)


def test_the_first_text_waits_for_no_other(redis_url: str) -> None:
    """Text gathers for a second here, but somebody waits for the first of it. What comes right after it is joined."""
    request_id, join_ms = new_request_id(), 1000.0

    async def work(writer: StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        stream = writer.open(request_id, KEY, 1)
        stream.write(word(0))
        await stream.sent.wait()
        print(f"sent after {(clock() - began) * 1000:.0f} ms")
        assert clock() - began < join_ms / 1000
        assert [frame.event for frame in frames_in(redis_url, request_id)] == ["started", "delta"]
        for number in range(1, 5):
            stream.write(word(number))
            await asyncio.sleep(0.01)
        stream.cut()
        await stream.end(completed(stream.next_cursor, result_of(stream)))
        assert [piece.text for piece in stream.pieces] == ["0 ", "1 2 3 4 "]

    with_writer(redis_url, work, join_ms=join_ms)


def test_readers_who_do_not_read_hold_up_nobody(redis_url: str) -> None:
    """A hundred of them ask Redis for everything and take nothing. The worker does not know them: each write returns at once,
    and the end is as prompt as in peace.
    """
    request_id = new_request_id()
    address = urlsplit(redis_url)
    stalled: list[socket.socket] = []
    slowest_s = 0.0

    async def work(writer: StreamWriter) -> None:
        nonlocal slowest_s
        stream = writer.open(request_id, KEY, 1)
        for number in range(2000):
            if number % 20 == 0:
                reader = socket.create_connection((address.hostname, address.port))
                reader.setblocking(False)
                stalled.append(reader)
                key = stream_key(PREFIX, request_id)
                reader.send(f"XREAD BLOCK 0 STREAMS {key} 0\r\n".encode() + f"XRANGE {key} - +\r\n".encode() * 20)
            began = time.perf_counter()
            stream.write(word(number))
            slowest_s = max(slowest_s, time.perf_counter() - began)
            if number % 50 == 0:
                await asyncio.sleep(0.01)
        began = time.perf_counter()
        stream.cut()
        await stream.end(completed(stream.next_cursor, result_of(stream)))
        print(f"slowest write {slowest_s * 1000:.2f} ms, end {(time.perf_counter() - began) * 1000:.0f} ms")
        assert time.perf_counter() - began < 10
        assert "".join(piece.text for piece in stream.pieces) == "".join(f"{number} " for number in range(2000))

    try:
        with_writer(redis_url, work, join_ms=1)
    finally:
        for reader in stalled:
            reader.close()
    assert frames_in(redis_url, request_id)[-1].event == "completed"
