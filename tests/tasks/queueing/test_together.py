"""Commands of many threads go to Redis together, and each thread gets its own answer, whatever becomes of the others'."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from tasks.queueing.connecting import connect
from tasks.queueing.together import Together
from tasks.redis_line import Line
from tests.services import RedisServer, wait_until

THREADS = 12


class Slow(Line):
    """A line whose first command waits until the test lets it go on; it notes how many are sent at a time."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(client)
        self.client = client
        self.asked, self.may_go_on = threading.Event(), threading.Event()
        self.sent: list[int] = []

    def ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.sent.append(len(commands))
        self.asked.set()
        assert self.may_go_on.wait(30)
        return super().ask(commands)


def held_up(slow: Slow, pool: ThreadPoolExecutor, commands: list[tuple[Any, ...]]) -> list[Any]:
    """Have all commands but the first wait for it; return what each thread got, an error as such."""
    together = Together(slow.client)
    together._line = slow

    def ask(command: tuple[Any, ...]) -> Any:
        try:
            return together.execute_command(*command)
        except redis.RedisError as error:
            return error

    first = pool.submit(ask, commands[0])
    assert slow.asked.wait(30)
    others = [pool.submit(ask, command) for command in commands[1:]]
    wait_until(lambda: len(together._waiting) == len(others), 30, "all to wait")
    slow.may_go_on.set()
    return [future.result(30) for future in (first, *others)]


@pytest.fixture
def pool() -> Any:
    """Return a thread for each command."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield pool


def test_what_waits_goes_out_in_one_pipeline(redis_url: str, pool: ThreadPoolExecutor) -> None:
    """While one asks, the others wait; then one of them asks for all."""
    with connect(redis_url, 15) as client:
        slow = Slow(client)
        assert held_up(slow, pool, [("ECHO", str(number)) for number in range(THREADS)]) == [
            str(number).encode() for number in range(THREADS)
        ]
        assert slow.sent == [1, THREADS - 1]


def test_a_refusal_is_its_own_threads(redis_url: str, pool: ThreadPoolExecutor) -> None:
    """What Redis makes of one command does not concern the others."""
    with connect(redis_url, 15) as client:
        commands = [("NO_SUCH_COMMAND", "x") if number % 2 else ("ECHO", str(number)) for number in range(THREADS)]
        answers = held_up(Slow(client), pool, commands)
    assert [isinstance(answer, redis.ResponseError) for answer in answers] == [bool(n % 2) for n in range(THREADS)]
    assert answers[2] == b"2"


def test_redis_away(own_redis: RedisServer, pool: ThreadPoolExecutor) -> None:
    """Everybody who waits hears of it at once, and the next one asks again."""
    with connect(own_redis.url, 15) as client:
        slow = Slow(client)
        own_redis.stop()
        answers = held_up(slow, pool, [("PING",)] * THREADS)
        assert all(isinstance(answer, redis.ConnectionError) for answer in answers)
        assert slow.sent == [1]
        own_redis.start()
        assert Together(client).execute_command("PING")


def test_alone(redis_url: str) -> None:
    """Each asks when it is its turn, in any number of rounds."""
    with connect(redis_url, 15) as client, ThreadPoolExecutor(THREADS) as pool:
        together = Together(client)
        numbers = list(range(400))
        answers = list(pool.map(lambda number: together.execute_command("ECHO", str(number)), numbers))
    assert answers == [str(number).encode() for number in numbers]
