"""A line gives each command its own answer, also after one that failed, and finds its way back to Redis."""

from __future__ import annotations

import pytest
import redis

from tasks.queueing.connecting import connect
from tasks.redis_line import Line
from tests.services import RedisServer


def test_answers_in_order(redis_url: str) -> None:
    """A command that is refused has its refusal in its place, and the others have their answers."""
    with connect(redis_url, 15) as client:
        one, refused, two = Line(client).ask([("ECHO", "1"), ("NO_SUCH_COMMAND",), ("ECHO", 2)])
    assert (one, two) == (b"1", b"2")
    assert isinstance(refused, redis.ResponseError)


def test_one_connection_is_kept(redis_url: str) -> None:
    """It is the same with every question."""
    with connect(redis_url, 15) as client:
        line = Line(client)
        assert line.ask([("CLIENT", "ID")]) == line.ask([("CLIENT", "ID")])


def test_a_connection_that_redis_closed(redis_url: str) -> None:
    """Nothing was asked on it, so it is made anew without anybody hearing of it."""
    with connect(redis_url, 15) as client:
        line = Line(client)
        [before] = line.ask([("CLIENT", "ID")])
        assert client.client_kill_filter(_id=before) == 1
        [after] = line.ask([("CLIENT", "ID")])
    assert after != before


def test_no_answer_in_time(redis_url: str) -> None:
    """Whoever asks next does not get the answer that comes too late."""
    with connect(redis_url, 0.2) as client, connect(redis_url, 15) as other:
        line = Line(client)
        with pytest.raises(redis.TimeoutError):
            line.ask([("BLPOP", "a-list-for-the-line", 10)])
        assert line.ask([("ECHO", "next")]) == [b"next"]
        other.rpush("a-list-for-the-line", "late")
        assert line.ask([("ECHO", "and next")]) == [b"and next"]
        other.delete("a-list-for-the-line")


def test_redis_away(own_redis: RedisServer) -> None:
    """It is told as redis-py tells it, each time, and Redis is reached again when it is back."""
    with connect(own_redis.url, 15) as client:
        line = Line(client)
        assert line.ask([("ECHO", "x")]) == [b"x"]
        own_redis.stop()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                line.ask([("ECHO", "x")])
        own_redis.start()
        assert line.ask([("ECHO", "x")]) == [b"x"]
