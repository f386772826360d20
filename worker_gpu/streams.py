"""Writing response streams, in few and large pieces.

Text that comes within a few milliseconds travels as one frame, and the frames of many requests travel in one pipeline.
With many streams the milliseconds become more, up to the fifth of a second that no reader minds. Streams keep their own
time: a crowd goes out in several small pipelines, one after another, so that whoever relays and reads the first works
while the next is made, and no token waits for the frames of all others. The first frame, which says only that there is
an attempt, waits a moment for the text to go with it. What somebody waits for goes at once: the first text, and the last
frame.

The worker never waits for a client, whom it does not know, and while it runs it never waits for Redis either. What cannot
be sent is sent when Redis is back, however long that takes, and costs no memory of its own: frames are made, for each try
anew, of the text that is kept for the record in any case and that the request's limit of tokens bounds. Only the end of a
request waits for its frames to be sent, before its lease is dropped.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Iterable, Sequence

import redis
from redis.asyncio import Redis

from tasks import stream
from tasks.job import Piece, TokenLogprob, ToolCallDelta
from tasks.logs import get_logger
from tasks.metrics import worker as metrics
from tasks.settings import StreamingGroup
from tasks.stream import FIELD, Cursor, Frame, opening, stream_key
from tasks.tracing import span
from worker_gpu.engines.base import Delta

logger = get_logger(__name__)
_RETRY_S = 0.5
#: Streams at once for which text is gathered longest.
CROWD = 1000
#: In how many parts the streams of a crowd are sent, one after another.
PIPELINES = 4
#: Of one stream, so many frames at most go out together: after an outage there may be thousands.
FRAMES_AT_ONCE = 200
#: So many deltas at most wait to be joined, which is more than come in the time of a try.
JOINED_AT_MOST = 500
#: What Redis answers to an id that does not grow: the frame is there already, or another attempt has taken over.
_NOT_NEWER = "equal or smaller"


class RequestStream:
    """The stream of one attempt.

    With `opens`, its first frame is still to be sent. `due_at` is when text of it is sent next, in seconds of the loop's
    clock; `sent` is set while Redis has everything.
    """

    def __init__(self, writer: StreamWriter, request_id: str, data_key: bytes, attempt: int, *, opens: bool) -> None:
        self.request_id = request_id
        self.data_key = data_key
        self.attempt = attempt
        self.due_at = 0.0
        self.sent = asyncio.Event()
        # Plain text is kept as such: a million small objects would make each search for garbage a long pause.
        self._carried: list[Piece | str] = []
        self._confirmed = 0
        self._tokens = self._tokens_cut = 0
        self._cut_at = 0.0
        self._opens = opens
        self._last: Frame | None = None
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
        """Send what a delta says, soon; the first one at once."""
        self._tokens = delta.output_tokens
        if delta.text or delta.tool_calls or delta.logprobs:
            is_first = not self._carried and not self._waiting
            waiting = self._waiting.setdefault(delta.choice, [])
            waiting.append(delta)
            if len(waiting) >= JOINED_AT_MOST:
                self.cut()
            if is_first:
                self._writer.hurry(self)
            else:
                self._writer.wake(self)

    def cut(self) -> None:
        """Make a frame of what waits, one a choice, so that what was written so far has its place in the stream."""
        for waiting in self._waiting.values():
            self._carried.append(joined(waiting))
        self._waiting.clear()
        if (tokens := self._tokens - self._tokens_cut) > 0:
            # Measured a frame, not a token: so it costs the same however fast the model is.
            at = time.monotonic()
            metrics.decoded(tokens, at - self._cut_at if self._tokens_cut else None)
            self._tokens_cut, self._cut_at = self._tokens, at

    def carry(self, pieces: Iterable[Piece]) -> None:
        """Make a frame of each of these, as of an answer that was cut before."""
        self._carried += pieces

    def unsent(self) -> list[Frame]:
        """Return the next frames that Redis has not confirmed, and not too many of them."""
        first = self._confirmed
        parts = self._carried[first : first + FRAMES_AT_ONCE]
        frames = [opening(self.attempt)] if self._opens else []
        frames += [
            stream.delta(Cursor(self.attempt, number), part) for number, part in enumerate(parts, start=first + 1)
        ]
        if self._last is not None and first + len(parts) == len(self._carried):
            frames.append(self._last)
        return frames

    def confirm(self, frames: Sequence[Frame]) -> bool:
        """Note that Redis has these frames; tell whether it has all that there is so far."""
        for frame in frames:
            if frame is self._last:
                self._last = None
            elif frame.cursor.sequence == 0:
                self._opens = False
            else:
                self._confirmed = frame.cursor.sequence
        if self._last is not None or self._confirmed < len(self._carried):
            return False
        self.sent.set()
        return True

    async def end(self, frame: Frame) -> None:
        """Send the terminal frame; return when Redis has it."""
        self._last = frame
        self.sent.clear()
        self._writer.hurry(self)
        with span("last frame"):
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
