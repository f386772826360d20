"""The stream of one attempt: what the engine says, cut into frames, and which of them Redis has.

Frames that wait cost no memory of their own: they are made, for each try anew, of the text that is kept for the record in
any case and that the request's limit of tokens bounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from tasks import stream
from tasks.job import Piece, TokenLogprob, ToolCallDelta
from tasks.metrics import worker as metrics
from tasks.stream import Cursor, Frame, opening
from tasks.tracing import span
from worker_gpu.engines.base import Delta

#: Of one stream, so many frames at most go out together: after an outage there may be thousands.
FRAMES_AT_ONCE = 200
#: So many deltas at most wait to be joined, which is more than come in the time of a try.
JOINED_AT_MOST = 500


class Sender(Protocol):
    """Who sends what streams have."""

    def wake(self, stream: RequestStream) -> None:
        """Note that `stream` has something to send."""
        ...

    def hurry(self, stream: RequestStream) -> None:
        """Send what `stream` has at once."""
        ...


class RequestStream:
    """The stream of one attempt.

    With `opens`, its first frame is still to be sent. `due_at` is when text of it is sent next, in seconds of the loop's
    clock; `sent` is set while Redis has everything.
    """

    def __init__(self, writer: Sender, request_id: str, data_key: bytes, attempt: int, *, opens: bool) -> None:
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
