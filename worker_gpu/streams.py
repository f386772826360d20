"""Writing response streams, in few and large pieces.

Text that comes within a few milliseconds travels as one frame, and the frames of many requests travel in one pipeline.
With many streams the milliseconds become more, up to the fifth of a second that no reader minds. Streams keep their own
time: a crowd goes out in several small pipelines, one after another, so that whoever relays and reads the first works
while the next is made, and no token waits for the frames of all others. The first frame, which says only that there is
an attempt, waits a moment for the text to go with it. What somebody waits for goes at once: the first text, and the last
frame.

The worker never waits for a client, whom it does not know, and while it runs it never waits for Redis either. What cannot
be sent is sent when Redis is back, however long that takes. Only the end of a request waits for its frames to be sent,
before its lease is dropped.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterable

import redis
from redis.asyncio import Redis

from tasks.job import Piece
from tasks.logs import get_logger
from tasks.metrics import worker as metrics
from tasks.settings import StreamingGroup
from tasks.stream import FIELD, Frame, stream_key
from worker_gpu.request_stream import RequestStream

logger = get_logger(__name__)
_RETRY_S = 0.5
#: Streams at once for which text is gathered longest.
CROWD = 1000
#: In how many parts the streams of a crowd are sent, one after another.
PIPELINES = 4
#: What Redis answers to an id that does not grow: the frame is there already, or another attempt has taken over.
_NOT_NEWER = "equal or smaller"


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
        #: Set when it is time to send again.
        self._next = asyncio.Event()

    def open(self, request_id: str, data_key: bytes, attempt: int) -> RequestStream:
        """Begin an attempt's stream, with its first frame."""
        stream = self._add(RequestStream(self, request_id, data_key, attempt, opens=True))
        stream.due_at = asyncio.get_running_loop().time() + self._join_s
        self.wake(stream)
        return stream

    def reopen(self, request_id: str, data_key: bytes, attempt: int) -> RequestStream:
        """Return a stream that lacks only its last frame."""
        return self._add(RequestStream(self, request_id, data_key, attempt, opens=False))

    def wake(self, stream: RequestStream) -> None:
        """Note that `stream` has something to send."""
        self._waiting.add(stream)
        self._awake.set()

    def hurry(self, stream: RequestStream) -> None:
        """Send what `stream` has at once."""
        stream.due_at = 0.0
        self.wake(stream)
        self._next.set()

    def restore(self, request_id: str, data_key: bytes, attempt: int, pieces: Iterable[Piece]) -> RequestStream:
        """Return a stream whose frames are sent again. Redis has some of them, and takes those that it lacks."""
        stream = self.open(request_id, data_key, attempt)
        stream.carry(pieces)
        return stream

    def _add(self, stream: RequestStream) -> RequestStream:
        self._open.add(stream)
        return stream

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
                each.due_at = now + max(self._join_s, gather_s)
            self._next.clear()
            try:
                await self._send(streams)
                if not self._waiting:
                    self._awake.clear()
                await self._pause(max(self._join_s, gather_s / PIPELINES))
            except redis.RedisError as error:
                metrics.SEND_FAILURES.inc()
                logger.warning("frames are kept until Redis takes them", error=type(error).__name__)
                for each in streams:
                    each.due_at = 0.0
                self._waiting |= streams
                await asyncio.sleep(_RETRY_S)

    async def _pause(self, longest_s: float) -> None:
        """Wait so long, or until something must be sent at once."""
        alarm = asyncio.get_running_loop().call_later(longest_s, self._next.set)
        await self._next.wait()
        alarm.cancel()

    async def _send(self, streams: set[RequestStream]) -> None:
        sending: list[tuple[RequestStream, list[Frame]]] = []
        # In a transaction, or a reader would be woken by the first frame, and again for the others.
        async with self._client.pipeline(transaction=True) as pipe:
            for stream in streams:
                stream.cut()
                key = stream_key(self._prefix, stream.request_id)
                frames = stream.unsent()
                for frame in frames:
                    sealed = frame.seal(stream.data_key, stream.request_id)
                    pipe.xadd(key, {FIELD: sealed}, id=str(frame.cursor))
                if any(frame.terminal or frame.cursor.sequence == 0 for frame in frames):
                    pipe.expire(key, self._retention_s)
                sending.append((stream, frames))
            answers = await pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, redis.ResponseError) and _NOT_NEWER in str(answer):
                continue
            if isinstance(answer, Exception):
                raise answer
        metrics.FRAMES.inc(sum(len(frames) for _, frames in sending))
        for stream, frames in sending:
            if not stream.confirm(frames):
                # Text that came meanwhile will wake it; this is for what was too much for once, or ended meanwhile.
                self._waiting.add(stream)
