"""One connection to Redis, for a thread that asks often.

redis-py's client takes a connection from its pool for each command, counts that, wraps it in a retry, and turns what comes into
other containers; a pipeline does so too. That is 25 to 70 µs of Python for a command that Redis answers in ten, and each
lock on the way is a place to lose Python's own lock. Here commands are packed, sent and read on one connection that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis


class Line:
    """A connection of `client`'s kind, made when it is first needed, and again after a failure. One thread at a time uses it."""

    def __init__(self, client: redis.Redis) -> None:
        self._pool = client.connection_pool
        self._connection: Any = None

    def ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return Redis's answers as they come, without redis-py's conversions; a command that it refuses has its ResponseError.

        Raises another RedisError if Redis does not answer; whether the commands were done is then not known.
        """
        connection = self._ready()
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            return [_answer(connection) for _ in commands]
        except BaseException:
            # What else comes on it would be taken for the answer to something else.
            connection.disconnect()
            raise

    def _ready(self) -> Any:
        """Return the connection. One that Redis has closed meanwhile is made anew, as the pool does."""
        if self._connection is None:
            self._connection = self._pool.make_connection()
        connection = self._connection
        connection.connect()
        try:
            usable = not connection.can_read()
        except (redis.RedisError, OSError):
            usable = False
        if not usable:
            connection.disconnect()
            connection.connect()
        return connection


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as refusal:
        return refusal
