"""The model behind the other systems: one process that answers every chat completion at once, as vLLM words it.

It says the same words each time, under a new id. A stream is a chunk with the role, one chunk a word, each written on its
own as an engine does, and one with the end. Asked for the model `bench-paced`, it leaves `gap_s` between the words.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, Self

import psutil

from bench.overheadlab.system import ANSWER_TOKENS

MODEL, PACED_MODEL = "bench", "bench-paced"
TEXT = "".join(f"word{number} " for number in range(ANSWER_TOKENS))
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAMED = re.compile(rb'"stream": ?true')
_HEAD_END = b"\r\n\r\n"
_ID = b"chatcmpl-00000000"
_JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
#: What a router asks of a worker before it sends any request there.
_MODELS = {
    "object": "list",
    "data": [{"id": name, "object": "model", "created": 0, "owned_by": "bench"} for name in (MODEL, PACED_MODEL)],
}


def _json(kind: str, **more: Any) -> bytes:
    return json.dumps(
        {"id": _ID.decode(), "object": kind, "created": int(time.time()), "model": MODEL, **more}
    ).encode()


def _plain() -> bytes:
    message = {"role": "assistant", "content": TEXT}
    usage = {"prompt_tokens": 1000, "completion_tokens": ANSWER_TOKENS, "total_tokens": 1000 + ANSWER_TOKENS}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    return _with_length(_json("chat.completion", choices=[choice], usage=usage))


def _with_length(content: bytes) -> bytes:
    return _JSON_HEAD % len(content) + content


def _chunks() -> list[bytes]:
    words = [f"{word} " for word in TEXT.split()]
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": word}, None) for word in words] + [({}, "length")]
    events = [
        _json("chat.completion.chunk", choices=[{"index": 0, "delta": delta, "finish_reason": reason}])
        for delta, reason in deltas
    ]
    lines = [b"data: %b\n\n" % event for event in (*events, b"[DONE]")]
    return [_STREAM_HEAD, *(b"%x\r\n%b\r\n" % (len(line), line) for line in lines), b"0\r\n\r\n"]


class _Answering(asyncio.Protocol):
    """One connection of a system to the model."""

    def __init__(self, gap_s: float, new_id: Callable[[], int]) -> None:
        self._gap_s, self._new_id = gap_s, new_id
        self._received = bytearray()
        self._transport: Any = None
        self._writing: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(_HEAD_END)) >= 0:
            head = bytes(self._received[: end + 2])
            found = _LENGTH.search(head)
            whole = end + len(_HEAD_END) + (int(found[1]) if found else 0)
            if len(self._received) < whole:
                return
            body = bytes(self._received[end:whole])
            del self._received[:whole]
            self._answer(head, body)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  why makes no difference
        if self._writing is not None:
            self._writing.cancel()

    def _answer(self, head: bytes, body: bytes) -> None:
        identifier = b"chatcmpl-%08d" % self._new_id()
        if head.startswith(b"GET "):
            self._transport.write(_with_length(json.dumps(_MODELS if b"/models" in head else {}).encode()))
        elif not _STREAMED.search(body):
            self._transport.write(_PLAIN.replace(_ID, identifier))
        elif PACED_MODEL.encode() in body:
            self._writing = asyncio.create_task(self._pace(identifier))
        else:
            for chunk in _CHUNKS:
                self._transport.write(chunk.replace(_ID, identifier))

    async def _pace(self, identifier: bytes) -> None:
        for chunk in _CHUNKS:
            self._transport.write(chunk.replace(_ID, identifier))
            if b'"content": "word' in chunk:
                await asyncio.sleep(self._gap_s)


_PLAIN, _CHUNKS = _plain(), _chunks()


class Upstream:
    """The model's process; a context manager. `port` is where it answers."""

    def __init__(self, gap_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._near, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, gap_s), daemon=True)
        self.port = 0

    @property
    def process(self) -> psutil.Process:
        """Return the process."""
        return psutil.Process(self._process.pid)

    def __enter__(self) -> Self:
        self._process.start()
        self.port = self._near.recv()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, gap_s: float) -> None:
    with suppress(KeyboardInterrupt):
        asyncio.run(_run(connection, gap_s))


async def _run(connection: Connection, gap_s: float) -> None:
    numbers = count(1)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Answering(gap_s, lambda: next(numbers)), "127.0.0.1", 0, backlog=1024
    )
    connection.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()
