"""A crowd of clients, in a thread and on an event loop of its own, so that harm in the main thread does not hold it up."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Self

import aiohttp

from bench.chaoslab.asking import Client, Question, Told

END_S = 30.0


class Crowd:
    """Asks `questions`, of which there may be no end; a context manager, at whose end whoever still waits gives up.

    With `at_once`, so many clients ask one question after the other, as fast as they are answered. With `per_second`,
    questions come at random moments at that mean rate, whatever became of those before, and a refusal is final.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str,
        questions: Iterable[Question],
        *,
        seed: int,
        at_once: int = 16,
        per_second: float | None = None,
    ) -> None:
        self.told: list[Told] = []
        self.finished = 0
        self._questions = iter(questions)
        self._urls = urls
        self._key = key
        self._rng = random.Random(seed)
        self._at_once = at_once
        self._per_second = per_second
        self._error: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._everything: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="clients", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_raised: object) -> None:
        if self._thread.is_alive():
            with suppress(RuntimeError):  # It ended by itself this moment.
                self._loop.call_soon_threadsafe(self._give_up)
        self._thread.join(END_S)
        if self._error is not None and kind is None:
            raise RuntimeError("a client did not understand what it was told") from self._error

    @property
    def done(self) -> bool:
        """Tell whether every question has come to its end."""
        return not self._thread.is_alive()

    def enough(self) -> None:
        """Have nothing more asked; what was asked is read to its end."""
        self._questions = iter(())

    def progress(self) -> str:
        """Return how far it is, in words."""
        accepted = sum(told.request_id is not None for told in self.told)
        resets, resumed = sum(told.resets for told in self.told), sum(told.resumed for told in self.told)
        return f"{accepted:,} accepted, {self.finished:,} of {len(self.told):,} asked have ended, {resets:,} resets, {resumed:,} resumed"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._everything = self._loop.create_task(self._ask_all())
        try:
            self._loop.run_until_complete(self._everything)
        except asyncio.CancelledError:
            # It was given up; what is missing is for the judges to say.
            pass
        except Exception as error:
            # Whatever it is would end this thread without a word; the main thread raises it.
            self._error = error
        finally:
            self._loop.close()

    def _give_up(self) -> None:
        if self._everything is not None:
            self._everything.cancel()

    async def _ask_all(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"Authorization": f"Bearer {self._key}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            client = Client(session, self._urls, self._rng, persistent=self._per_second is None)
            if self._per_second is None:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._at_once):
                        group.create_task(self._one_by_one(client))
            else:
                await self._at_random(client, self._per_second)

    def _next(self) -> Told | None:
        question = next(self._questions, None)
        if question is None:
            return None
        self.told.append(told := Told(question))
        return told

    async def _one(self, client: Client, told: Told) -> None:
        await client.ask(told)
        self.finished += 1

    async def _one_by_one(self, client: Client) -> None:
        while (told := self._next()) is not None:
            await self._one(client, told)

    async def _at_random(self, client: Client, per_second: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        async with asyncio.TaskGroup() as group:
            while (told := self._next()) is not None:
                due += self._rng.expovariate(per_second)
                await asyncio.sleep(max(0.0, due - loop.time()))
                group.create_task(self._one(client, told))
