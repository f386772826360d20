"""A batch's input: one JSON object a line, found in a stream of chunks and read again by its place in the file.

Lines are cut out of the stream as it passes, so that memory holds one line and one chunk. Where a line begins and how
long it is are kept in SQL; its content is fetched from the file again when it is its turn to run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from gateway_app.batches.files import CHUNK_BYTES, Files, StoredFile

#: Longest custom_id, in characters: it is an index key.
MAX_CUSTOM_ID = 512
_BOM = b"\xef\xbb\xbf"
_CONTROL = frozenset(map(chr, (*range(32), 127)))


@dataclass(frozen=True, slots=True)
class Line:
    """One line, numbered from 1. `content` is None if it is too long to be read; `length` is without its newline."""

    number: int
    offset: int
    length: int
    content: bytes | None

    @property
    def blank(self) -> bool:
        """Tell whether there is nothing on the line."""
        return self.content is not None and not self.content.strip()


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a batch's input, in OpenAI's words."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the batch error object."""
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


def split(chunks: Iterable[bytes], max_bytes: int) -> Iterator[Line]:
    """Cut a file into lines, blank ones too; a line of more than `max_bytes` comes without its content."""
    number, offset, held, dropped = 1, 0, bytearray(), 0
    for chunk in chunks:
        pieces = chunk.split(b"\n")
        for index, piece in enumerate(pieces):
            if dropped or len(held) + len(piece) > max_bytes:
                dropped += len(held) + len(piece)
                held.clear()
            else:
                held += piece
            if index < len(pieces) - 1:
                line = _line(number, offset, held, dropped)
                yield line
                number, offset, dropped = number + 1, line.offset + line.length + 1, 0
                held.clear()
    if held or dropped:
        yield _line(number, offset, held, dropped)


def _line(number: int, offset: int, held: bytearray, dropped: int) -> Line:
    if dropped:
        return Line(number, offset, dropped, None)
    if number == 1 and held.startswith(_BOM):
        return Line(number, offset + len(_BOM), len(held) - len(_BOM), bytes(held[len(_BOM) :]))
    return Line(number, offset, len(held), bytes(held))


def check(line: Line, endpoint: str, max_bytes: int) -> str | Problem:
    """Return the custom_id of a line that asks for `endpoint`, or what is wrong, without repeating what was sent."""
    if line.content is None:
        return Problem("line_too_long", f"This line is longer than {max_bytes} bytes.", line.number)
    request = _parsed(line.content)
    if request is None:
        return Problem("invalid_json_line", "This line is not parseable as valid JSON.", line.number)
    custom_id = request.get("custom_id")
    told = _wrong_name(custom_id) or _wrong_target(request, endpoint)
    if told is not None:
        code, message, param = told
        return Problem(code, message, line.number, param)
    return str(custom_id)


def _wrong_name(custom_id: Any) -> tuple[str, str, str] | None:
    if not isinstance(custom_id, str) or not custom_id:
        return "missing_required_parameter", "custom_id must be a non-empty string.", "custom_id"
    if len(custom_id) > MAX_CUSTOM_ID or not _CONTROL.isdisjoint(custom_id):
        told = f"custom_id may have up to {MAX_CUSTOM_ID} characters and no control characters."
        return "invalid_custom_id", told, "custom_id"
    return None


def _wrong_target(request: dict[str, Any], endpoint: str) -> tuple[str, str, str] | None:
    if request.get("method") != "POST":
        return "invalid_method", "The method of every request must be POST.", "method"
    if request.get("url") != endpoint:
        return "url_mismatch", f"The url of every request must be the batch's endpoint, {endpoint}.", "url"
    if not isinstance(request.get("body"), dict):
        return "missing_required_parameter", "body must be a JSON object.", "body"
    return None


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        request = from_json(content, allow_inf_nan=False)
    except ValueError:
        return None
    return request if isinstance(request, dict) else None


class LineReader:
    """Fetches lines' bodies from a file, keeping the chunk it read last. Threads may share it."""

    def __init__(self, files: Files, file: StoredFile) -> None:
        self._files = files
        self._file = file
        self._lock = threading.Lock()
        self._held: tuple[int, bytes] = (-1, b"")

    def body(self, offset: int, length: int) -> dict[str, Any]:
        """Return the request body on the line at byte `offset`. Raises ValueError if there is none."""
        with self._lock:
            content = b"".join(self._pieces(offset, offset + length))
        request = _parsed(content)
        if request is None or not isinstance(request.get("body"), dict):
            raise ValueError("there is no request on this line")
        body: dict[str, Any] = request["body"]
        return body

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        for number in range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            if self._held[0] != number:
                self._held = (number, self._files.chunk(self._file, number))
            first = number * CHUNK_BYTES
            yield self._held[1][max(0, start - first) : end - first]
