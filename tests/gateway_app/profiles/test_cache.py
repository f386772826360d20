"""The cache that makes each value once: bounded, and honest about failures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway_app.profiles.cache import OnceCache
from tasks.errors import UnknownAgent
from tests.services import wait_until


def cache(max_count: int = 3, max_weight: int = 100) -> OnceCache[str, str]:
    """Return a cache of texts that weigh as much as they are long."""
    return OnceCache(max_count, max_weight, len)


def never() -> str:
    """Fail if a value is made again."""
    raise AssertionError("made again")


def test_the_least_recently_used_goes_first() -> None:
    """Using is reading or writing."""
    kept = cache()
    for key in "abc":
        kept.get(key, lambda key=key: key)  # type: ignore[misc]
    assert kept.get("a", never) == "a"
    kept.put("d", "d")
    assert [kept.get(key, never) for key in "acd"] == list("acd")
    assert kept.get("b", lambda: "again") == "again"
    assert len(kept) == 3


def test_weight_is_bounded() -> None:
    """Many light values or few heavy ones; one that alone is too heavy is kept until the next."""
    kept = cache(max_count=100, max_weight=10)
    for key in "abc":
        kept.put(key, key * 4)
    assert len(kept) == 2
    kept.put("c", "cc")
    kept.put("d", "dddd")
    assert len(kept) == 3
    kept.put("e", "e" * 50)
    assert len(kept) == 1
    kept.put("f", "f")
    assert [kept.get("f", never), len(kept)] == ["f", 1]


def test_a_value_is_made_once() -> None:
    """However many want it; another key's value is made meanwhile."""
    kept, go, made = cache(), threading.Event(), []

    def slow() -> str:
        made.append(1)
        assert go.wait(10)
        return "slow"

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(kept.get, "a", slow) for _ in range(8)]
        wait_until(lambda: bool(made), 10, "somebody to begin")
        assert kept.get("b", lambda: "quick") == "quick"
        go.set()
        assert {future.result() for future in futures} == {"slow"}
    assert len(made) == 1


def test_a_failure_is_told_to_all_and_forgotten() -> None:
    """Each waiter has an exception of its own: it writes its request's id into it."""
    kept, go, made = cache(), threading.Event(), []

    def failing() -> str:
        made.append(1)
        assert go.wait(10)
        raise UnknownAgent("gone", agents=["a"])

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(kept.get, "a", failing) for _ in range(4)]
        wait_until(lambda: bool(made), 10, "somebody to begin")
        go.set()
        errors = [future.exception() for future in futures]
    assert {(type(error), str(error)) for error in errors} == {(UnknownAgent, "gone")}
    assert all(isinstance(error, UnknownAgent) and error.extensions == {"agents": ["a"]} for error in errors)
    assert len({id(error) for error in errors}) == 4
    with pytest.raises(ZeroDivisionError):
        kept.get("a", lambda: str(1 / 0))
    assert kept.get("a", lambda: "made at last") == "made at last"
