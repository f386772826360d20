"""Who asks: one process beside everything measured, whose own processor time counts for nobody.

It sends requests made beforehand over kept-alive connections and keeps the answers' bytes; only when a cell is over are
they read and checked. In a closed loop each of some clients asks again when it is answered. In an open one requests
leave at random moments at a mean rate, whatever became of those before.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

from bench.overheadlab.connection import Connections
from bench.overheadlab.wire import Said, WrongAnswer, read

#: How long one answer may take, on however busy a machine.
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What to ask: all of `requests`, but begun within `seconds`. With `rate` a second in an open loop, else `clients` ask."""

    port: int
    requests: tuple[bytes, ...]
    stream: bool
    clients: int
    seconds: float
    rate: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a cell. Times are in seconds, one a right answer; `first_s` are until the first words of it."""

    elapsed_s: float
    whole_s: tuple[float, ...]
    first_s: tuple[float, ...]
    said: tuple[Said, ...]
    errors: tuple[str, ...]


class _Run:
    """One cell while it runs."""

    def __init__(self, cell: Cell) -> None:
        self.answers: list[tuple[float, float, bytes]] = []
        self.errors: list[str] = []
        self._cell = cell
        self._connections = Connections(cell.port)

    async def ask(self, request: bytes) -> None:
        """Ask one question, on an idle connection or another one, and note what comes."""
        began = time.perf_counter()
        try:
            connection = await self._connections.take()
            async with asyncio.timeout(ANSWER_S):
                done_at = await connection.ask(request)
        except (OSError, TimeoutError) as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            return
        self.answers.append((done_at - began, connection.first_at - began, bytes(connection.reply.data)))
        self._connections.give_back(connection)

    async def closed_loop(self) -> None:
        """Have each client ask one question after the other."""
        until = time.perf_counter() + self._cell.seconds
        left = iter(self._cell.requests)

        async def client() -> None:
            while time.perf_counter() < until and (request := next(left, None)) is not None:
                await self.ask(request)

        await asyncio.gather(*(client() for _ in range(self._cell.clients)))

    async def open_loop(self, rate: float) -> None:
        """Ask at random moments."""
        chance = random.Random(self._cell.seed)
        began = time.perf_counter()
        due_s = 0.0
        tasks = []
        for request in self._cell.requests:
            due_s += chance.expovariate(rate)
            if due_s > self._cell.seconds:
                break
            await asyncio.sleep(max(0.0, began + due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(request)))
        await asyncio.gather(*tasks)

    async def connect(self) -> None:
        """Have a connection for each client before the first question."""
        await self._connections.open(self._cell.clients)

    async def close(self) -> None:
        """Close all connections."""
        await self._connections.close()


class Client:
    """The client's process; a context manager."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._near, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far,), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._process.kill()
        self._process.join()

    def run(self, cell: Cell, finished: Callable[[], None] = lambda: None) -> Outcome:
        """Run a cell; `finished` is called when the last answer has come, before any is read."""
        self._near.send(cell)
        self._near.recv()
        finished()
        outcome: Outcome = self._near.recv()
        return outcome


def _serve(connection: Connection) -> None:
    # The answers that are kept are many objects that all stay; searching them for garbage would take the client's time.
    gc.disable()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            asyncio.run(_cell(connection, connection.recv()))
            gc.collect()


async def _cell(connection: Connection, cell: Cell) -> None:
    run = _Run(cell)
    await run.connect()
    began = time.perf_counter()
    await (run.closed_loop() if cell.rate is None else run.open_loop(cell.rate))
    elapsed_s = time.perf_counter() - began
    connection.send(None)
    await run.close()
    connection.send(_checked(run, elapsed_s, stream=cell.stream))


def _checked(run: _Run, elapsed_s: float, *, stream: bool) -> Outcome:
    right = list(_right(run, stream=stream))
    return Outcome(
        elapsed_s,
        tuple(whole_s for whole_s, _, _ in right),
        tuple(first_s for _, first_s, _ in right),
        tuple(said for _, _, said in right),
        tuple(run.errors),
    )


def _right(run: _Run, *, stream: bool) -> Iterator[tuple[float, float, Said]]:
    for whole_s, first_s, data in run.answers:
        try:
            yield whole_s, first_s, read(data, stream=stream)
        except WrongAnswer as error:
            run.errors.append(str(error))
