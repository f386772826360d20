"""One client: it submits a question until it is taken, then reads the answer until it has ended.

It does what a careful client would, and no more. It submits under an idempotency key, so that it may say the same again
when no answer came. It reads server-sent events, drops the text at a `reset`, and comes back with the last id it saw
when the connection breaks, to whichever gateway answers. All that it was told is kept (`Told`) and judged afterwards.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

AGENT = "incident-responder"
TERMINAL = ("completed", "failed", "cancelled", "expired", "dead")
BACK_AFTER_S = (0.05, 0.3)
#: Longer than the gateway's heartbeats of 15 s.
SILENCE_S = 40.0
BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. The same question has the same answer for ever: the simulated model draws it from the prompt."""

    directive: str
    max_tokens: int
    seed: int = 1

    def body(self) -> dict[str, Any]:
        """Return the body of `POST /v1/tasks`."""
        sampling = {"max_tokens": self.max_tokens, "seed": self.seed}
        return {"agent": AGENT, "directive": self.directive, "sampling": sampling}


@dataclass(slots=True)
class Told:
    """What a client was told of one question. Times are of the wall clock, in seconds.

    `refusals` are the answers other than 202, as (status, Retry-After); `faults` are answers that should never come.
    """

    question: Question
    asked_at: float = 0.0
    request_id: str | None = None
    accepted_at: float = 0.0
    first_text_at: float | None = None
    ended_at: float | None = None
    event: str | None = None
    code: str | None = None
    text: str = ""
    cursor: str | None = None
    resets: int = 0
    resumed: int = 0
    refusals: list[tuple[int, str | None]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Client:
    """Asks and reads. `persistent`: whether it asks again when it is refused for now, or leaves it at that."""

    session: aiohttp.ClientSession
    urls: Sequence[str]
    rng: random.Random
    persistent: bool = True

    async def ask(self, told: Told) -> None:
        """Ask one question and read its answer to the end."""
        told.asked_at = time.time()
        if await self._submit(told):
            await self._read(told)

    async def _submit(self, told: Told) -> bool:
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        timeout = aiohttp.ClientTimeout(total=60, sock_connect=5)
        while True:
            try:
                async with self.session.post(
                    f"{self.rng.choice(self.urls)}/v1/tasks",
                    json=told.question.body(),
                    headers=headers,
                    timeout=timeout,
                ) as answer:
                    if answer.status == 202:
                        told.request_id = (await answer.json())["id"]
                        told.accepted_at = time.time()
                        return True
                    told.refusals.append((answer.status, answer.headers.get("Retry-After")))
                    if answer.status not in BUSY:
                        told.faults.append(f"submitting was answered {answer.status}: {(await answer.text())[:300]}")
                        return False
                    if not self.persistent:
                        return False
            except (aiohttp.ClientError, TimeoutError, OSError):
                # No answer: it may have been taken, and the key makes it safe to ask again.
                pass
            await asyncio.sleep(self.rng.uniform(*BACK_AFTER_S))

    async def _read(self, told: Told) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S)
        while told.event is None:
            headers = {"Last-Event-ID": told.cursor} if told.cursor else {}
            url = f"{self.rng.choice(self.urls)}/v1/tasks/{told.request_id}/events"
            try:
                async with self.session.get(url, headers=headers, timeout=timeout) as answer:
                    if answer.status == 200:
                        async for name, cursor, data in _events(answer.content):
                            _take(told, name, cursor, data)
                    elif answer.status not in BUSY:
                        # 204 too: it says that the stream had ended, and its end was never seen.
                        told.faults.append(f"reading was answered {answer.status} after {told.cursor}")
                        return
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            if told.event is None:
                told.resumed += 1
                await asyncio.sleep(self.rng.uniform(*BACK_AFTER_S))


def _take(told: Told, name: str, cursor: str, data: dict[str, Any]) -> None:
    """Take one frame in, as docs/tasks.md says that a client should."""
    if told.cursor is not None and _order(cursor) <= _order(told.cursor):
        told.faults.append(f"frame {cursor} came after {told.cursor}")
    told.cursor = cursor
    if name == "reset":
        told.text = ""
        told.resets += 1
    elif name == "delta":
        told.text += data["text"]
        told.first_text_at = told.first_text_at or time.time()
    elif name in TERMINAL:
        told.event, told.code, told.ended_at = name, data.get("code"), time.time()


def _order(cursor: str) -> tuple[int, int]:
    attempt, _, sequence = cursor.partition("-")
    return int(attempt), int(sequence)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, id and data of each server-sent event that came whole."""
    fields: dict[str, str] = {}
    async for raw in content:
        line = raw.decode().rstrip("\n")
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield fields["event"], fields["id"], json.loads(fields["data"])
            fields = {}
        else:
            fields = {}
