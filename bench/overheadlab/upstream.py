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

from bench.overheadlab.answering import STREAM_END, STREAM_HEAD, Answering, event, with_length
from bench.overheadlab.system import ANSWER_TOKENS

MODEL, PACED_MODEL = "bench", "bench-paced"
TEXT = "".join(f"word{number} " for number in range(ANSWER_TOKENS))
_STREAMED = re.compile(rb'"stream": ?true')
_ID = b"chatcmpl-00000000"
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
    return with_length(_json("chat.completion", choices=[choice], usage=usage))


def _chunks() -> list[bytes]:
    words = [f"{word} " for word in TEXT.split()]
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": word}, None) for word in words] + [({}, "length")]
    events = [
        _json("chat.completion.chunk", choices=[{"index": 0, "delta": delta, "finish_reason": reason}])
        for delta, reason in deltas
    ]
    return [STREAM_HEAD, *map(event, (*events, b"[DONE]")), STREAM_END]


class _Answering(Answering):
    """One connection of a system to the model."""

    def __init__(self, gap_s: float, new_id: Callable[[], int]) -> None:
        super().__init__()
        self._gap_s, self._new_id = gap_s, new_id
        self._writing: asyncio.Task[None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  why makes no difference
        """Say no more."""
        if self._writing is not None:
            self._writing.cancel()

    def answer(self, head: bytes, body: bytes) -> None:
        """Say what is always said."""
        identifier = b"chatcmpl-%08d" % self._new_id()
        if head.startswith(b"GET "):
            self.transport.write(with_length(json.dumps(_MODELS if b"/models" in head else {}).encode()))
        elif not _STREAMED.search(body):
            self.transport.write(_PLAIN.replace(_ID, identifier))
        elif PACED_MODEL.encode() in body:
            self._writing = asyncio.create_task(self._pace(identifier))
        else:
            for chunk in _CHUNKS:
                self.transport.write(chunk.replace(_ID, identifier))

    async def _pace(self, identifier: bytes) -> None:
        for chunk in _CHUNKS:
            self.transport.write(chunk.replace(_ID, identifier))
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
