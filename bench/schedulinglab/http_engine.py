"""Simulated engines as OpenAI-compatible servers, for routers that push: one process, a port an engine.

What a router sends is text. A word is a token, so that the same requests cost an engine the same as behind the
gateway, whose tokenizer is made so. Every token leaves as a chunk of its own, as vLLM sends it. An answer's id begins with its
engine's number; its usage tells how much of the prompt was cached.

vLLM's `/v1/chat/completions/render`, which vllm-router asks before each request, gives the token ids of the messages.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from contextlib import aclosing, suppress
from functools import lru_cache
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, Self

import psutil

from bench.overheadlab.answering import STREAM_END, STREAM_HEAD, Answering, event, with_length
from tasks.errors import GatewayError
from tasks.job import Sampling
from worker_gpu.engines.base import Delta, GenerationRequest
from worker_gpu.engines.simulated import SimulatedEngine
from worker_gpu.engines.simulated_options import SimulationOptions

MODEL = "bench-model"
SALT = "bench"
COMPLETIONS = b"POST /v1/chat/completions "
RENDER = b"POST /v1/chat/completions/render "
MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "bench"}]}
#: More texts than any run has profiles.
REMEMBERED_TEXTS = 1_024
START_S = 60.0


class Engines:
    """The process; a context manager. `ports` are where the engines answer, by their number."""

    def __init__(self, number: int, options: SimulationOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._near, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, number, options), daemon=True)
        self.ports: list[int] = []

    @property
    def process(self) -> psutil.Process:
        """Return the process."""
        return psutil.Process(self._process.pid)

    def __enter__(self) -> Self:
        self._process.start()
        if not self._near.poll(START_S):
            raise RuntimeError("the engines do not start")
        self.ports = self._near.recv()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._process.kill()
        self._process.join()


def engine_of(answer_id: str) -> int:
    """Return the number of the engine that gave an answer."""
    return int(answer_id.split("-")[1])


class Words:
    """Gives each word an id. Texts that come again, as profiles do, are looked up whole."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._of_text = lru_cache(REMEMBERED_TEXTS)(self._look_up)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation, in which each role is a word, too."""
        return [
            token
            for message in messages
            for token in (*self._of_text(message["role"]), *self._of_text(message["content"]))
        ]

    def _look_up(self, text: str) -> tuple[int, ...]:
        return tuple(self._ids.setdefault(word, len(self._ids)) for word in text.split())


class _Serving(Answering):
    """One connection to an engine."""

    def __init__(self, engine: SimulatedEngine, words: Words, name: str, numbers: count[int]) -> None:
        super().__init__()
        self._engine, self._words, self._name, self._numbers = engine, words, name, numbers
        self._running: asyncio.Task[None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  why makes no difference
        """Abort what nobody waits for."""
        if self._running is not None:
            self._running.cancel()

    def answer(self, head: bytes, body: bytes) -> None:
        """Answer what routers ask of an engine."""
        if head.startswith(COMPLETIONS):
            self._running = asyncio.create_task(self._complete(json.loads(body)))
        elif head.startswith(RENDER):
            rendered = {"request_id": "render", "token_ids": self._words.prompt(json.loads(body)["messages"])}
            self.transport.write(with_length(json.dumps(rendered).encode()))
        else:
            self.transport.write(with_length(json.dumps(MODELS if b"/v1/models" in head else {}).encode()))

    async def _complete(self, body: dict[str, Any]) -> None:
        answer_id = f"{self._name}-{next(self._numbers)}"
        try:
            prompt = self._words.prompt(body["messages"])
            # SGLang's router passes the newer name on, whichever it was asked with.
            sampling = Sampling(max_tokens=body.get("max_completion_tokens") or body["max_tokens"])
            request = GenerationRequest(answer_id, prompt, sampling, SALT)
            async with aclosing(self._engine.generate(request)) as deltas:
                await (self._stream if body.get("stream") else self._plain)(answer_id, len(prompt), deltas)
        except GatewayError as error:
            self._refuse(str(error), error.code)
        except KeyError as missing:
            self._refuse(f"{missing} is missing", "invalid_request")

    def _refuse(self, message: str, code: str) -> None:
        refused = {"error": {"message": message, "type": code}}
        self.transport.write(with_length(json.dumps(refused).encode(), b"400 Bad Request"))

    async def _plain(self, answer_id: str, prompt_tokens: int, deltas: Any) -> None:
        said = [delta async for delta in deltas]
        message = {"role": "assistant", "content": "".join(delta.text for delta in said)}
        choice = {"index": 0, "message": message, "finish_reason": said[-1].finish_reason}
        whole = {"id": answer_id, "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
        self.transport.write(with_length(json.dumps({**whole, "usage": _usage(prompt_tokens, said[-1])}).encode()))

    async def _stream(self, answer_id: str, prompt_tokens: int, deltas: Any) -> None:
        chunk = {"id": answer_id, "object": "chat.completion.chunk", "created": 0, "model": MODEL}

        def write(*choices: Any, **more: Any) -> None:
            self.transport.write(event(json.dumps({**chunk, "choices": choices, **more}).encode()))

        last: Delta | None = None
        async for delta in deltas:
            if last is None:
                self.transport.write(STREAM_HEAD)
                write({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            last = delta
            write({"index": 0, "delta": {"content": delta.text}, "finish_reason": delta.finish_reason})
        assert last is not None  # noqa: S101  an answer has at least one token
        write(usage=_usage(prompt_tokens, last))
        self.transport.write(event(b"[DONE]") + STREAM_END)


def _usage(prompt_tokens: int, last: Delta) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": last.output_tokens,
        "total_tokens": prompt_tokens + last.output_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }


def _serve(connection: Connection, number: int, options: SimulationOptions) -> None:
    with suppress(KeyboardInterrupt):
        asyncio.run(_run(connection, number, options))


async def _run(connection: Connection, number: int, options: SimulationOptions) -> None:
    loop, words, numbers = asyncio.get_running_loop(), Words(), count(1)
    servers = []
    for engine_number in range(number):
        engine = SimulatedEngine(MODEL, options)
        await engine.start()

        def serve(engine: SimulatedEngine = engine, name: str = f"engine-{engine_number}") -> _Serving:
            return _Serving(engine, words, name, numbers)

        servers.append(await loop.create_server(serve, "127.0.0.1", 0, backlog=1024))
    connection.send([server.sockets[0].getsockname()[1] for server in servers])
    await asyncio.gather(*(server.serve_forever() for server in servers))
