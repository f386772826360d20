"""HTTP/1.1 and OpenAI's chat completions as the client needs them: whole requests out, whole answers in, checked later.

While it is measured the client only looks for an answer's end. What the answer says is taken apart afterwards, so that
its cost falls into no measurement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"
#: Content never holds this: JSON escapes line ends.
_LAST_CHUNK = b"\r\n0\r\n\r\n"
#: The first words of a stream, after an event that only names the role.
FIRST_TEXT = re.compile(rb'"content": ?"[^"]')


class WrongAnswer(Exception):
    """The answer is not what was asked for."""


@dataclass(frozen=True, slots=True)
class Said:
    """What an answer said. `chunks` counts the events with text of a stream, and is 1 for a plain answer.

    Tokens of the prompt, and those of them that were cached, are 0 where the answer does not tell.
    """

    id: str
    text: str
    finish_reason: str
    chunks: int
    prompt_tokens: int = 0
    cached_tokens: int = 0


def post(host: str, path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> bytes:
    """Return a whole request, with a body as OpenAI's clients send it."""
    content = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


class Reply:
    """The bytes of one answer, as they come. `reusable` tells, at its end, whether the connection may be used again."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.reusable = True
        self._length: int | None = None
        self._chunked = False

    def add(self, data: bytes) -> bool:
        """Take more bytes; tell whether the answer is complete. One without a stated length ends with its connection."""
        begins = not self.data
        self.data += data
        if self._length is None and not self._chunked:
            end = self.data.find(_HEAD_END, 0 if begins else max(0, len(self.data) - len(data) - len(_HEAD_END)))
            if end < 0:
                return False
            head = bytes(self.data[: end + 2])
            self.reusable = _CLOSE.search(head) is None
            if _CHUNKED.search(head):
                self._chunked = True
            elif found := _LENGTH.search(head):
                self._length = end + len(_HEAD_END) + int(found[1])
            else:
                self.reusable = False
                return False
        if self._chunked:
            return self.data.endswith(_LAST_CHUNK)
        return self._length is not None and len(self.data) >= self._length


def read(data: bytes, *, stream: bool) -> Said:
    """Return what a chat completion says. Raises WrongAnswer if it is none, or an unfinished one."""
    head, _, body = data.partition(_HEAD_END)
    status = head.split(b"\r\n", 1)[0]
    if not status.startswith(b"HTTP/1.1 200"):
        raise WrongAnswer(f"{status.decode('latin-1')}: {body[:300].decode('utf-8', 'replace')}")
    try:
        content = _unchunked(body) if _CHUNKED.search(head) else body
        return _stream(content) if stream else _plain(content)
    except (ValueError, LookupError, TypeError) as error:
        raise WrongAnswer(f"{type(error).__name__} in {body[:300]!r}") from None


def _unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end].split(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


def _plain(content: bytes) -> Said:
    answer = json.loads(content)
    [choice] = answer["choices"]
    return Said(answer["id"], choice["message"]["content"], choice["finish_reason"], 1, *_usage(answer))


def _stream(content: bytes) -> Said:
    texts, ids, reason, used = [], set(), None, (0, 0)
    events = [event[6:] for event in content.split(b"\n\n") if event.startswith(b"data: ")]
    if events.pop() != b"[DONE]":
        raise ValueError("the stream is cut")
    for event in map(json.loads, events):
        ids.add(event["id"])
        used = max(used, _usage(event))
        for choice in event["choices"]:
            reason = choice.get("finish_reason") or reason
            if text := choice["delta"].get("content"):
                texts.append(text)
    [identifier] = ids
    return Said(identifier, "".join(texts), str(reason), len(texts), *used)


def _usage(event: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens of the prompt and those of them that were cached, as far as an event says."""
    usage = event.get("usage") or {}
    return usage.get("prompt_tokens", 0), (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
