"""The response stream: what a request's watchers see, frame by frame.

A frame's id is `<attempt>-<sequence>`. It is at once the Redis stream id, SSE's `id`, and the cursor a client comes
back with. Redis refuses ids that do not grow, so a worker that was given up for lost cannot write into the attempt
that replaced it. Frames are sealed with the request's data key. The first frame of an attempt is number 0, text
follows from 1, and the terminal frame comes last; where there is no answer, it has the highest number there can be, so that
it follows whatever text was shown.

After Redis has forgotten a stream, `replay` makes the same frames, with the same ids, from the stored result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tasks.crypto import seal, unseal
from tasks.errors import InvalidCursor, by_code
from tasks.job import Piece, Result

#: The field of a Redis stream entry that holds the sealed frame.
FIELD = b"f"
TERMINAL_EVENTS = frozenset({"completed", "failed", "cancelled", "expired", "dead"})
#: Made once: `json.dumps` with options makes an encoder at each call.
compact_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_CURSOR = re.compile(r"(\d{1,10})-(\d{1,15})")


class Cursor(NamedTuple):
    """A position in a stream; cursors order as frames do. The smallest is before every frame."""

    attempt: int
    sequence: int

    def __str__(self) -> str:
        """Return the form that Redis, SSE and clients use."""
        return f"{self.attempt}-{self.sequence}"

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """Read a client's cursor; None or an empty text is the start. Raises InvalidCursor."""
        if not text:
            return START
        match = _CURSOR.fullmatch(text.strip())
        if match is None or not text.isascii():
            raise InvalidCursor
        return cls(int(match[1]), int(match[2]))

    def follows(self, before: Cursor) -> bool:
        """Tell whether no frame can be missing between `before` and this; a new attempt needs none of those before."""
        if self.attempt == before.attempt:
            return self.sequence in (before.sequence + 1, _LAST_SEQUENCE)
        return self.attempt > before.attempt and self.sequence in (0, _LAST_SEQUENCE)


START = Cursor(0, 0)
_LAST_SEQUENCE = 10**15 - 1


@dataclass(frozen=True, slots=True)
class Frame:
    """One event of a stream: `started`, `reset`, `delta`, or a terminal one."""

    cursor: Cursor
    event: str
    data: Mapping[str, Any]

    @property
    def terminal(self) -> bool:
        """Tell whether nothing follows this frame."""
        return self.event in TERMINAL_EVENTS

    def seal(self, data_key: bytes, request_id: str) -> bytes:
        """Return the frame encrypted, bound to its place in the stream."""
        return seal(data_key, compact_json([self.event, self.data]).encode(), _context(request_id, self.cursor))

    @classmethod
    def unseal(cls, data_key: bytes, request_id: str, cursor: Cursor, sealed: bytes) -> Frame:
        """Return the frame of `seal`. Raises DecryptionFailed if it was altered or moved."""
        event, data = json.loads(unseal(data_key, sealed, _context(request_id, cursor)))
        return cls(cursor, event, data)


def stream_key(prefix: str, request_id: str) -> str:
    """Return the Redis key of a request's stream."""
    return f"{prefix}stream:{request_id}"


def opening(attempt: int) -> Frame:
    """Return an attempt's first frame: `reset` tells clients to drop the text of the attempt before."""
    return Frame(Cursor(attempt, 0), "started" if attempt == 1 else "reset", {"attempt": attempt})


def completed(cursor: Cursor, result: Result) -> Frame:
    """Return the terminal frame of an answered request."""
    facts = result.model_dump(include={"model", "usage", "timings"}, mode="json")
    return Frame(cursor, "completed", {"finish_reason": result.finish_reason, **_all_reasons(result), **facts})


def delta(cursor: Cursor, piece: Piece | str) -> Frame:
    """Return the frame that carries `piece`; what is usual (the first choice, nothing but text) is left out."""
    if isinstance(piece, str):
        return Frame(cursor, "delta", {"text": piece})
    return Frame(cursor, "delta", {"text": piece.text, **piece.model_dump(mode="json", exclude_defaults=True)})


def ended(attempt: int, state: str, code: str | None) -> Frame:
    """Return the terminal frame of a request that has no answer."""
    message = by_code(code).title() if code else f"The request was {state}."
    return Frame(Cursor(attempt, _LAST_SEQUENCE), state, {"code": code, "message": message})


def replay(attempt: int, result: Result, state: str = "completed", code: str | None = None) -> Iterator[Frame]:
    """Make a request's frames again, as its last attempt wrote them."""
    yield opening(attempt)
    sequence = 0
    for sequence, piece in enumerate(result.pieces, start=1):
        yield delta(Cursor(attempt, sequence), piece)
    if state == "completed":
        yield completed(Cursor(attempt, sequence + 1), result)
    else:
        yield ended(attempt, state, code)


def gathered(frames: Sequence[Frame]) -> Result:
    """Return the result that a whole stream, with `completed` as its last frame, carried: what `replay` was given."""
    last = frames[-1]
    pieces = (frame.data for frame in frames if frame.event == "delta" and frame.cursor.attempt == last.cursor.attempt)
    reasons = last.data.get("finish_reasons") or [last.data["finish_reason"]]
    facts = {name: last.data[name] for name in ("model", "usage", "timings")}
    return Result.model_validate({"pieces": tuple(pieces), "finish_reasons": reasons, **facts}, strict=False)


def _all_reasons(result: Result) -> dict[str, Any]:
    """Return how each choice ended, where there are several."""
    return {"finish_reasons": list(result.finish_reasons)} if len(result.finish_reasons) > 1 else {}


def _context(request_id: str, cursor: Cursor) -> str:
    return f"frame:{request_id}:{cursor}"
