"""A few at a time, and nobody held up by those who do not come on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from gateway_app.turns import Turns


def test_no_more_than_so_many_have_a_turn() -> None:
    """Twenty threads, three at once: never four, and three at some time."""
    turns, lock, inside, seen = Turns(3, patience_s=60), threading.Lock(), 0, []
    together = threading.Barrier(3)

    def work(number: int) -> None:
        nonlocal inside
        with turns.turn():
            with lock:
                inside += 1
                seen.append(inside)
            if number < 3:
                together.wait(30)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(21) as pool:
        list(pool.map(work, range(21)))
    assert max(seen) == 3


def test_whoever_has_waited_long_enough_goes_on() -> None:
    """Turns that never end hold the others up for a moment only, and are not given away twice."""
    turns, stuck, release = Turns(1, patience_s=0.05), threading.Event(), threading.Event()

    def hang() -> None:
        with turns.turn():
            stuck.set()
            release.wait(30)

    thread = threading.Thread(target=hang)
    thread.start()
    assert stuck.wait(30)
    try:
        with turns.turn():
            assert thread.is_alive()
        # Had the impatient one given back a turn, this one would find it free.
        assert not turns._free.acquire(blocking=False)
    finally:
        release.set()
        thread.join()
    assert turns._free.acquire(blocking=False)


def test_a_turn_ends_where_the_work_fails() -> None:
    """As many failures as there are turns leave all of them."""
    turns = Turns(1, patience_s=60)
    for _ in range(3):
        try:
            with turns.turn():
                raise ValueError
        except ValueError:
            continue
    with turns.turn():
        pass
