"""A response as a stream of events, the same however often and wherever it is read.

Events are made from the request's frames, always from the first one, and numbered as they come; who comes back with
the number of the last event it saw gets what follows. For that, three things must not depend on when a stream is read:

- the objects that events carry: the first ones show the response at its outset, the last one how it ended;
- the division of the text: it is the frames', which Redis and SQL hold alike. Only when a lost worker's frames are
  forgotten is that not so, and then a number of the old stream is refused;
- the end of a response without an answer: how much of it was shown is forgotten with Redis, so its number is the
  highest there is.

Items stay open until the end, because a model may go on with its text after it began a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from gateway_app.openai.responses import TEXT, Key, function_call, message, parts, text_part
from gateway_app.openai.steady import steady
from tasks.errors import InvalidCursor
from tasks.job import Piece, Result
from tasks.stream import Cursor, Frame

Event = dict[str, Any]
#: The number of the last event where there is no answer; clients keep it in 32 bits.
LAST = 2**31 - 1
#: Before every event.
BEFORE = -1
_FIRST_FRAME = Cursor(1, 0)


class Events:
    """The events of one response.

    `outset` returns the response object at its outset under a status, `completed` the one that has an answer, `ended`
    the one that ended without; only `ended` reads what is stored.
    """

    def __init__(
        self,
        request_id: str,
        *,
        background: bool,
        outset: Callable[[str], Event],
        completed: Callable[[Result], Event],
        ended: Callable[[], Event],
    ) -> None:
        self.next_number = 0
        self._request_id = request_id
        self._background = background
        self._outset, self._completed, self._ended = outset, completed, ended
        #: What was said, by part, and the id and name of each call.
        self._said: dict[Key, str] = {}
        self._called: dict[Key, tuple[str, str]] = {}
        self._pieces: list[Piece] = []

    def after(self, number: int, frames: Iterable[Frame | None]) -> Iterator[Event | None]:
        """Yield the events whose number is higher, None where `frames` has a silence.

        Raises AnswerChanged, InvalidCursor if there is no event of that number or its place is forgotten, and whatever
        reading the end raises.
        """
        shown = BEFORE
        for event in self._all(number, frames):
            if event is not None:
                shown = event["sequence_number"]
            if event is None or shown > number:
                yield event
        if number > shown:
            raise InvalidCursor("the stream has no event of this number")

    def _all(self, number: int, frames: Iterable[Frame | None]) -> Iterator[Event | None]:
        yield self._event("response.created", response=self._outset("queued" if self._background else "in_progress"))
        if self._background:
            yield self._event("response.queued", response=self._outset("queued"))
        else:
            yield self._event("response.in_progress", response=self._outset("in_progress"))
        frames = iter(frames)
        for first in frames:
            if first is not None:
                break
            yield None
        else:
            return
        if self._background and first.cursor.attempt:
            yield self._event("response.in_progress", response=self._outset("in_progress"))
        if first.cursor != _FIRST_FRAME and not first.terminal and number >= self.next_number:
            raise InvalidCursor(
                "the answer was begun again, and what was sent before is forgotten; read from the start"
            )
        for item in steady(chain([first], frames)):
            if item is None:
                yield None
            elif isinstance(item, Piece):
                yield from self._piece(item)
            elif item.event == "completed":
                yield from self._end(item)
            else:
                response = self._ended()
                # There is no event for a cancelled response; this one is not taken for an error.
                kind = "response.incomplete" if response["status"] == "cancelled" else "response.failed"
                yield {"type": kind, "sequence_number": LAST, "response": response}

    def _piece(self, piece: Piece) -> Iterator[Event]:
        self._pieces.append(piece)
        calls = {call.index: call for call in piece.tool_calls}
        for key in parts(piece):
            if key not in self._said:
                if key is not TEXT:
                    self._called[key] = (calls[key].id or "", calls[key].name or "")
                yield from self._open(key)
            if key is TEXT:
                said, kind, more = piece.text, "response.output_text.delta", {"content_index": 0, "logprobs": []}
            else:
                said, kind, more = calls[key].arguments, "response.function_call_arguments.delta", {}
            self._said[key] += said
            if said:
                yield self._event(kind, **self._place(key), **more, delta=said)

    def _open(self, key: Key) -> Iterator[Event]:
        self._said[key] = ""
        item, place = self._item(key, "in_progress"), self._place(key)
        if key is not TEXT:
            yield self._event("response.output_item.added", output_index=place["output_index"], item=item)
            return
        part = item["content"].pop()
        yield self._event("response.output_item.added", output_index=place["output_index"], item=item)
        yield self._event("response.content_part.added", **place, content_index=0, part=part)

    def _end(self, terminal: Frame) -> Iterator[Event]:
        facts = {name: terminal.data[name] for name in ("model", "usage", "timings")}
        reasons = (terminal.data["finish_reason"],)
        answer = Result.model_validate({"pieces": self._pieces, "finish_reasons": reasons, **facts})
        response = self._completed(answer)
        if not self._said:
            yield from self._open(TEXT)
        for key, item in zip(self._said, response["output"], strict=True):
            yield from self._close(key, item)
        yield self._event(f"response.{response['status']}", response=response)

    def _close(self, key: Key, item: Event) -> Iterator[Event]:
        place = self._place(key)
        if key is TEXT:
            part, where = item["content"][0], {**place, "content_index": 0}
            yield self._event("response.output_text.done", **where, logprobs=[], text=part["text"])
            yield self._event("response.content_part.done", **where, part=part)
        else:
            facts = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **place, **facts)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _item(self, key: Key, status: str) -> Event:
        if key is TEXT:
            return message(self._request_id, status, text_part(self._said[key]))
        return function_call(self._request_id, key, status, *self._called[key], self._said[key])

    def _place(self, key: Key) -> Event:
        item_id = self._item(key, "")["id"]
        return {"item_id": item_id, "output_index": list(self._said).index(key)}

    def _event(self, kind: str, **facts: Any) -> Event:
        number, self.next_number = self.next_number, self.next_number + 1
        return {"type": kind, "sequence_number": number, **facts}
