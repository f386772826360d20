"""Writing response streams, in few and large pieces.

Text that comes within a few milliseconds travels as one frame, and the frames of many requests travel in one pipeline.
With many streams the milliseconds become more, up to the fifth of a second that no reader minds. Streams keep their own
time: a crowd goes out in several small pipelines, one after another, so that whoever relays and reads the first works
while the next is made, and no token waits for the frames of all others.

The worker never waits for a client, and while it runs it never waits for Redis either: frames that cannot be sent are
kept and sent when Redis is back. Only the end of a request waits for its frames to be sent, before its lease is
dropped.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence

import redis
from redis.asyncio import Redis

from tasks import stream
from tasks.job import Piece, TokenLogprob, ToolCallDelta
from tasks.settings import StreamingGroup
from tasks.stream import FIELD, Cursor, Frame, opening, stream_key
from worker_gpu.engines.base import Delta

logger = logging.getLogger(__name__)
_RETRY_S = 0.5
#: Streams at once for which text is gathered longest.
CROWD = 1000
#: In how many parts the streams of a crowd are sent, one after another.
PIPELINES = 4
#: What Redis answers to an id that does not grow: the frame is there already, or another attempt has taken over.
_NOT_NEWER = "equal or smaller"


class RequestStream:
    """The stream of one attempt.

    `unsent` are the frames that Redis has not confirmed yet; `due_at` is when text of it is sent next, in seconds of the
    loop's clock.
    """

    def __init__(self, writer: StreamWriter, request_id: str, data_key: bytes, attempt: int) -> None:
        self.request_id = request_id
        self.data_key = data_key
        self.attempt = attempt
        self.unsent: list[Frame] = []
        self.due_at = 0.0
        self.sent = asyncio.Event()
        # Plain text is kept as such: a million small objects would make each search for garbage a long pause.
        self._carried: list[Piece | str] = []
        self._waiting: dict[int, list[Delta]] = {}
        self._writer = writer

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Return what its frames carried so far."""
        return tuple(Piece(text=part) if isinstance(part, str) else part for part in self._carried)

    @property
    def next_cursor(self) -> Cursor:
        """Return where the frame after all pieces goes."""
        return Cursor(self.attempt, len(self._carried) + 1)

    def write(self, delta: Delta) -> None:
        """Send what a delta says, soon."""
        if delta.text or delta.tool_calls or delta.logprobs:
            self._waiting.setdefault(delta.choice, []).append(delta)
            self._writer.wake(self)

    def cut(self) -> None:
        """Make a frame of what waits, one a choice, so that what was written so far has its place in the stream."""
        for waiting in self._waiting.values():
            part = joined(waiting)
            self.unsent.append(stream.delta(self.next_cursor, part))
            self._carried.append(part)
        self._waiting.clear()

    async def end(self, frame: Frame) -> None:
        """Send the terminal frame; return when Redis has it."""
        self.unsent.append(frame)
        self.sent.clear()
        self.due_at = 0.0
        self._writer.wake(self)
        await self.sent.wait()


def joined(deltas: Sequence[Delta]) -> Piece | str:
    """Return deltas of one choice as one piece, or its text if there is nothing else to it.

    Half a surrogate pair, which nothing can encode, becomes a ?.
    """
    text = _encodable("".join(delta.text for delta in deltas))
    if not deltas[0].choice and not any(delta.tool_calls or delta.logprobs for delta in deltas):
        return text
    return Piece(
        text=text,
        choice=deltas[0].choice,
        tool_calls=tuple(
            ToolCallDelta(
                index=call.index,
                id=call.id and _encodable(call.id),
                name=call.name and _encodable(call.name),
                arguments=_encodable(call.arguments),
            )
            for delta in deltas
            for call in delta.tool_calls
        ),
        logprobs=tuple(
            TokenLogprob(
                token=_encodable(logprob.token),
                logprob=logprob.logprob,
                top=tuple((_encodable(token), value) for token, value in logprob.top),
            )
            for delta in deltas
            for logprob in delta.logprobs
        ),
    )


def _encodable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class StreamWriter:
    """Sends the frames of all of a worker's requests."""

    def __init__(self, client: Redis, prefix: str, settings: StreamingGroup) -> None:
        self._client = client
        self._prefix = prefix
        self._join_s = settings.join_ms / 1000
        self._join_max_s = max(settings.join_max_ms, settings.join_ms) / 1000
        self._retention_s = settings.retention_s
        self._waiting: set[RequestStream] = set()
        self._open: weakref.WeakSet[RequestStream] = weakref.WeakSet()
        self._awake = asyncio.Event()

    def open(self, request_id: str, data_key: bytes, attempt: int) -> RequestStream:
        """Begin an attempt's stream, with its first frame."""
        stream = self.reopen(request_id, data_key, attempt)
        stream.unsent.append(opening(attempt))
        self.wake(stream)
        return stream

    def reopen(self, request_id: str, data_key: bytes, attempt: int) -> RequestStream:
        """Return a stream that lacks only its last frame."""
        stream = RequestStream(self, request_id, data_key, attempt)
        self._open.add(stream)
        return stream

    def wake(self, stream: RequestStream) -> None:
        """Note that `stream` has something to send."""
        self._waiting.add(stream)
        self._awake.set()

    async def send_forever(self) -> None:
        """Send what is due, then let text gather for a moment."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._awake.wait()
            # The more streams there are, the more a frame each would cost whoever relays and reads them.
            crowd = min(1.0, len(self._open) / CROWD)
            gather_s = (self._join_max_s - self._join_s) * crowd
            now = clock()
            streams = {stream for stream in self._waiting if stream.due_at <= now}
            self._waiting -= streams
            # Before they are sent: one that ends meanwhile is due at once.
            for each in streams:
                each.due_at = now + gather_s
            try:
                await self._send(streams)
                if not self._waiting:
                    self._awake.clear()
                await asyncio.sleep(max(self._join_s, gather_s / PIPELINES))
            except redis.RedisError as error:
                logger.warning("frames are kept until Redis takes them: %s", type(error).__name__)
                for each in streams:
                    each.due_at = 0.0
                self._waiting |= streams
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
