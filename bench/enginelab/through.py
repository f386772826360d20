"""The whole gateway, as `bin/run` starts it, asked over HTTP: streams of OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from bench.enginelab.prompts import Ask
from bench.enginelab.rounds import Answered, Round, now, play
from tests.local_gateway import READY, LocalGateway
from tests.services import wait_until

START_S = 900.0
ANSWER_S = 600.0
DONE = b"data: [DONE]"


class Through:
    """A gateway with one worker. It starts at once; `wait` returns when it is ready."""

    def __init__(self, folder: Path, model: Path, variables: Mapping[str, str]) -> None:
        """Start it in a new folder, with `variables` in its environment."""
        self.gateway = LocalGateway(folder, model)
        self.gateway.start(**variables)

    def wait(self) -> None:
        """Return when the worker takes requests. Raises RuntimeError, with the logs' ends, if it never does."""
        gateway = self.gateway

        def ended() -> bool:
            return gateway.process is None or gateway.process.poll() is not None

        wait_until(lambda: READY in gateway.output or ended(), START_S, "a gateway that is ready")
        if READY not in gateway.output:
            raise RuntimeError(gateway.everything_said())

    def play(self, clients: Sequence[Sequence[Ask]], answer_tokens: int) -> Round:
        """Have the questions answered, each with so many tokens."""
        key = self.gateway.folder.api_key.read_text().strip()
        return asyncio.run(play_over_http(self.gateway.url, key, clients, answer_tokens))

    def stop(self) -> None:
        """End every process of it."""
        self.gateway.kill_everything()


async def play_over_http(url: str, key: str, clients: Sequence[Sequence[Ask]], answer_tokens: int) -> Round:
    """Let every client ask a gateway its questions, each for so many tokens as a stream."""
    headers = {"Authorization": f"Bearer {key}"}
    # A connection a client, kept open, as a fleet of agents has them.
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:

        async def answer(ask: Ask) -> Answered:
            body = {
                "model": ask.agent,
                "messages": [{"role": "user", "content": ask.text}],
                "max_tokens": answer_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            return await _stream(session, f"{url}/v1/chat/completions", body)

        return await play(clients, answer)


async def _stream(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> Answered:
    """Read a stream to its end. Raises RuntimeError if it did not end as it should."""
    asked_at, first_at = now(), None
    received = bytearray()
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"the gateway answers {response.status}: {(await response.text())[:500]}")
        async for piece in response.content.iter_any():
            received += piece
            # The first chunk only names the role; the next is the first that a reader can see something in.
            if first_at is None and received.count(b"data: ") > 1:
                first_at = now()
    ended_at = now()
    events = received.strip().split(b"\n\n")
    if events[-1] != DONE:
        raise RuntimeError(f"a stream ended with {bytes(events[-1][:500])!r}")
    usage = json.loads(events[-2].removeprefix(b"data: "))["usage"]
    return Answered(asked_at, first_at or ended_at, ended_at, int(usage["completion_tokens"]))
