"""The cache of futures: one call for many, for its time, and not more than it may hold."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Barrier, Thread

from tasks.governance.metaqore.cache import Cache


class Calls:
    """Remembers the calls; each is answered when the test says so."""

    def __init__(self) -> None:
        self.futures: list[tuple[str, Future[str]]] = []
        self.now = 0.0

    def __call__(self, key: str) -> Future[str]:
        future: Future[str] = Future()
        self.futures.append((key, future))
        return future

    def answer(self, text: str) -> None:
        """Answer the newest call."""
        self.futures[-1][1].set_result(text)

    def clock(self) -> float:
        """Return the test's time."""
        return self.now


def cache(calls: Calls, size: int = 10) -> Cache[str]:
    """Return a cache that keeps an answer for 5 s, and `bad` ones for 1 s."""
    return Cache(calls, lambda answer: 1.0 if answer == "bad" else 5.0, size, calls.clock)


def test_many_who_ask_at_once_make_one_call() -> None:
    """All get the same answer, whenever they asked."""
    calls = Calls()
    asked, results = cache(calls), list[Future[str]]()
    barrier = Barrier(20)

    def ask() -> None:
        barrier.wait()
        results.append(asked.ask("a"))

    threads = [Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [key for key, _ in calls.futures] == ["a"]
    calls.answer("good")
    assert {future.result(0) for future in results} == {"good"}
    assert asked.ask("a").result(0) == "good"
    assert len(calls.futures) == 1


def test_an_answer_is_used_for_its_time() -> None:
    """A failure for a shorter one."""
    calls = Calls()
    asked = cache(calls)
    for answer, kept_s in (("good", 5.0), ("bad", 1.0)):
        begun, count = calls.now, len(calls.futures) + 1
        asked.ask("a")
        calls.answer(answer)
        calls.now = begun + kept_s - 0.01
        assert asked.ask("a").result(0) == answer
        assert len(calls.futures) == count
        calls.now = begun + kept_s
        assert not asked.ask("a").done()
        assert len(calls.futures) == count + 1
        calls.answer("good")
        calls.now += 5.0


def test_keys_are_apart_and_bounded() -> None:
    """The one that was not asked for longest goes first."""
    calls = Calls()
    asked = cache(calls, size=2)
    for key in ("a", "b", "c"):
        asked.ask(key)
        calls.answer(key)
    assert asked.ask("c").result(0) == "c"
    assert asked.ask("b").result(0) == "b"
    assert not asked.ask("a").done()


def test_a_call_that_was_cancelled_is_made_again() -> None:
    """It answered nobody."""
    calls = Calls()
    asked = cache(calls)
    asked.ask("a").cancel()
    asked.ask("a")
    assert len(calls.futures) == 2


def test_a_call_may_be_done_at_once() -> None:
    """The cache does not wait for itself."""
    calls = 0

    def call(key: str) -> Future[str]:
        nonlocal calls
        calls += 1
        future: Future[str] = Future()
        future.set_result(key)
        return future

    asked: Cache[str] = Cache(call, lambda _: 5.0, 10)
    assert asked.ask("a").result(0) == asked.ask("a").result(0) == "a"
    assert calls == 1
