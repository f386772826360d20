"""Writing response streams, in few and large pieces.

Text that comes within a few milliseconds travels as one frame, and the frames of all requests travel in one pipeline.

The worker never waits for a client, and while it runs it never waits for Redis either: frames that cannot be sent are
kept and sent when Redis is back. Only the end of a request waits for its frames to be sent, before its lease is
dropped.
"""

from __future__ import annotations

import asyncio
import logging

import redis
from redis.asyncio import Redis

from tasks.settings import StreamingGroup
from tasks.stream import FIELD, Cursor, Frame, opening, stream_key

logger = logging.getLogger(__name__)
_RETRY_S = 0.5
#: What Redis answers to an id that does not grow: the frame is there already, or another attempt has taken over.
_NOT_NEWER = "equal or smaller"


class RequestStream:
    """The stream of one attempt.

    `cuts` are the lengths, in characters, of the frames its text went out in, `unsent` the frames that Redis has not
    confirmed yet.
    """

    def __init__(self, writer: StreamWriter, request_id: str, data_key: bytes, attempt: int) -> None:
        self.request_id = request_id
        self.data_key = data_key
        self.attempt = attempt
        self.cuts: list[int] = []
        self.unsent: list[Frame] = []
        self.sent = asyncio.Event()
        self._pieces: list[str] = []
        self._waiting: list[str] = []
        self._writer = writer

    @property
    def text(self) -> str:
        """Return all text that has been cut into frames."""
        return "".join(self._pieces)

    @property
    def next_cursor(self) -> Cursor:
        """Return where the frame after all text goes."""
        return Cursor(self.attempt, len(self.cuts) + 1)

    def write(self, text: str) -> None:
        """Send text, soon. Half a surrogate pair, which no encoding has room for, becomes a question mark."""
        if text:
            self._waiting.append(text.encode("utf-8", "replace").decode("utf-8"))
            self._writer.wake(self)

    def cut(self) -> None:
        """Make one frame of the text that waits, so that what was written so far has its place in the stream."""
        if self._waiting:
            text = "".join(self._waiting)
            self._waiting.clear()
            self.unsent.append(Frame(self.next_cursor, "delta", {"text": text}))
            self.cuts.append(len(text))
            self._pieces.append(text)

    async def end(self, frame: Frame) -> None:
        """Send the terminal frame; return when Redis has it."""
        self.unsent.append(frame)
        self.sent.clear()
        self._writer.wake(self)
        await self.sent.wait()


class StreamWriter:
    """Sends the frames of all of a worker's requests."""

    def __init__(self, client: Redis, prefix: str, settings: StreamingGroup) -> None:
        self._client = client
        self._prefix = prefix
        self._join_s = settings.join_ms / 1000
        self._retention_s = settings.retention_s
        self._waiting: set[RequestStream] = set()
        self._awake = asyncio.Event()

    def open(self, request_id: str, data_key: bytes, attempt: int) -> RequestStream:
        """Begin an attempt's stream, with its first frame."""
        stream = self.reopen(request_id, data_key, attempt)
        stream.unsent.append(opening(attempt))
        self.wake(stream)
        return stream

    def reopen(self, request_id: str, data_key: bytes, attempt: int) -> RequestStream:
        """Return a stream that lacks only its last frame."""
        return RequestStream(self, request_id, data_key, attempt)

    def wake(self, stream: RequestStream) -> None:
        """Note that `stream` has something to send."""
        self._waiting.add(stream)
        self._awake.set()

    async def send_forever(self) -> None:
        """Send what waits, then let text gather for a moment."""
        while True:
            await self._awake.wait()
            self._awake.clear()
            streams, self._waiting = self._waiting, set()
            try:
                await self._send(streams)
                await asyncio.sleep(self._join_s)
            except redis.RedisError as error:
                logger.warning("frames are kept until Redis takes them: %s", type(error).__name__)
                self._waiting |= streams
                self._awake.set()
                await asyncio.sleep(_RETRY_S)

    async def _send(self, streams: set[RequestStream]) -> None:
        counts: list[tuple[RequestStream, int]] = []
        async with self._client.pipeline(transaction=False) as pipe:
            for stream in streams:
                stream.cut()
                key = stream_key(self._prefix, stream.request_id)
                for frame in stream.unsent:
                    sealed = frame.seal(stream.data_key, stream.request_id)
                    pipe.xadd(key, {FIELD: sealed}, id=str(frame.cursor))
                    if frame.terminal or frame.cursor.sequence == 0:
                        pipe.expire(key, self._retention_s)
                counts.append((stream, len(stream.unsent)))
            answers = await pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, redis.ResponseError) and _NOT_NEWER in str(answer):
                continue
            if isinstance(answer, Exception):
                raise answer
        for stream, count in counts:
            del stream.unsent[:count]
            if not stream.unsent:
                stream.sent.set()
