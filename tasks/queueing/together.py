"""Redis commands of many threads, sent together.

A thread that alone wants something of Redis asks as usual. What others want meanwhile waits for the answer, and then goes
out in one pipeline: one of those who wait sends it for all. So the busier a process is, the fewer round trips it makes,
and the fewer threads of it wake for a socket, each of which then waits for Python's lock.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import redis

from tasks.redis_line import Line

#: So many commands go out together at most.
_AT_ONCE = 100


class _Command:
    """One command that waits. Its future's result is None if its thread shall send what waits, else the answer in a list."""

    __slots__ = ("arguments", "future")

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments
        self.future: Future[list[Any] | None] = Future()


class Together:
    """Asks Redis through `client`, one pipeline at a time. Any thread may use it."""

    def __init__(self, client: redis.Redis) -> None:
        self._line = Line(client)
        self._lock = threading.Lock()
        self._waiting: list[_Command] = []
        self._sending = False

    def execute_command(self, *arguments: Any) -> Any:
        """Return Redis's answer to one command. Raises redis.RedisError; whether it was done is then not known."""
        command = _Command(arguments)
        with self._lock:
            self._waiting.append(command)
            first, self._sending = not self._sending, True
        if not first and (answer := command.future.result()) is not None:
            return _value(answer[0])
        return self._send(command)

    def _send(self, own: _Command) -> Any:
        """Send what waits, which includes `own`, tell the others, and leave the rest to the next one."""
        with self._lock:
            batch, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
        try:
            answers = self._line.ask([command.arguments for command in batch])
        except BaseException as error:
            with self._lock:
                # Whoever waited behind has waited as long, for the same Redis.
                batch, self._waiting = [*batch, *self._waiting], []
            answers = [error] * len(batch)
        with self._lock:
            following = self._waiting[0] if self._waiting else None
            self._sending = following is not None
        if following is not None:
            following.future.set_result(None)
        mine: Any = None
        for command, answer in zip(batch, answers, strict=True):
            if command is own:
                mine = answer
            else:
                command.future.set_result([answer])
        return _value(mine)


def _value(answer: Any) -> Any:
    if isinstance(answer, BaseException):
        raise answer
    return answer
