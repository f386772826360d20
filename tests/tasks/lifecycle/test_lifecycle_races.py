"""A client cancels in the very moment in which something else happens to the request, at every stage of its life.

Each round lets two or three threads loose at once, after pauses that a seeded generator draws, and then plays the rest
as workers would. Whoever comes first wins, cleanly: there is one terminal event, and a client that was told that its
request no longer waited for anything finds it cancelled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tasks.lifecycle import FIRST_EPOCH, Attempt, NotStarted
from tasks.schema import TERMINAL_KINDS, TERMINAL_STATES
from tasks.states import reached
from tests.tasks.lifecycle.admitted import Request

SEED = 20261126
ROUNDS = 6
LONGEST_PAUSE_S = 0.004


def at_once(chance: Random, *acts: Callable[[], Any]) -> list[Any]:
    """Run all in threads that start together; return what each returned."""
    barrier = threading.Barrier(len(acts))
    pauses_s = [chance.uniform(0, LONGEST_PAUSE_S) for _ in acts]

    def run(act: Callable[[], Any], pause_s: float) -> Any:
        barrier.wait(30)
        time.sleep(pause_s)
        return act()

    with ThreadPoolExecutor(len(acts)) as threads:
        return list(threads.map(run, acts, pauses_s))


def cancel_while_queued(request: Request, chance: Random) -> list[Any]:
    """Two clients at once."""
    return at_once(chance, request.cancel, request.cancel)


def cancel_while_published_again(request: Request, chance: Random) -> list[Any]:
    """The housekeeper finds that Redis lost it."""
    return at_once(chance, request.cancel, request.republish)


def cancel_while_delayed(request: Request, chance: Random) -> list[Any]:
    """It waits after a failed attempt, and a worker takes it."""
    assert request.give_back(request.begun(), delay_s=0.001) == "queued"
    return at_once(chance, request.cancel, lambda: request.start("gpu-2"))


def cancel_while_leased(request: Request, chance: Random) -> list[Any]:
    """A worker has the message, and begins."""
    return at_once(chance, request.cancel, request.start)


def cancel_while_given_back(request: Request, chance: Random) -> list[Any]:
    """Its engine fails."""
    attempt = request.begun()
    return at_once(chance, request.cancel, lambda: request.give_back(attempt, delay_s=1))


def cancel_while_handed_back(request: Request, chance: Random) -> list[Any]:
    """Its worker is stopped, and another has it at once."""
    attempt = request.begun()

    def hand_over() -> Attempt | NotStarted:
        request.give_back(attempt, "worker_draining", most=None)
        return request.start("gpu-2")

    return at_once(chance, request.cancel, hand_over)


def cancel_while_running_is_lost(request: Request, chance: Random) -> list[Any]:
    """It runs, and Redis lost its message."""
    request.begun()
    return at_once(chance, request.cancel, lambda: request.republish(attempt=1))


def cancel_while_finishing(request: Request, chance: Random) -> list[Any]:
    """Its worker records the answer."""
    attempt = request.begun()
    return at_once(chance, request.cancel, lambda: request.answer(attempt), request.cancel)


STAGES = [
    cancel_while_queued,
    cancel_while_published_again,
    cancel_while_delayed,
    cancel_while_leased,
    cancel_while_given_back,
    cancel_while_handed_back,
    cancel_while_running_is_lost,
    cancel_while_finishing,
]


@pytest.mark.parametrize("stage", STAGES)
def test_cancelling_at_every_stage(engine: Engine, stage: Callable[[Request, Random], list[Any]]) -> None:
    """One end, for ever; it is `cancelled` wherever no answer was recorded first, and never left waiting with a mark."""
    chance = Random(f"{SEED} {stage.__name__}")
    print(f"seed {SEED}, stage {stage.__name__}")
    for _ in range(ROUNDS):
        request = Request(engine)
        before = stage(request, chance)[0]
        assert isinstance(before, sa.Row)
        row = request.row
        assert (row.state, row.cancel_requested_at is not None) != ("queued", True)
        if row.state not in TERMINAL_STATES:
            # It was marked while it ran: its worker hears of it, and ends it.
            assert (row.state, row.cancel_requested_at is not None) == ("running", True)
            attempt = Attempt(request.subject, row.epoch, row.attempt, row.worker)
            assert request.answer(attempt, "half", "cancelled")
        if before.state == "queued":
            assert request.row.state == "cancelled"
        assert request.row.state == ("completed" if "completed" in request.kinds else "cancelled")
        assert stage is cancel_while_finishing or request.row.state == "cancelled"
        assert len([kind for kind in request.kinds if kind in TERMINAL_KINDS]) == 1
        assert reached(request.kinds) == {request.row.state}
        assert request.row.message is None


def test_of_two_housekeepers_one_publishes(engine: Engine) -> None:
    """Both saw the same; the other one finds that it is done."""
    chance = Random(SEED)
    print(f"seed {SEED}")
    for _ in range(ROUNDS):
        request = Request(engine)
        made = at_once(chance, request.republish, request.republish, request.republish)
        assert [again.epoch for again in made if again is not None] == [FIRST_EPOCH + 1]
        assert request.kinds == ["received", "admitted", "requeued"]


def test_publishing_again_what_is_being_answered(engine: Engine) -> None:
    """Either the answer stands and nothing is published, or it is fenced off and the request runs again."""
    chance = Random(SEED)
    print(f"seed {SEED}")
    for _ in range(ROUNDS):
        request = Request(engine)
        attempt = request.begun()
        answered, again = at_once(
            chance,
            partial(request.answer, attempt),
            partial(request.republish, attempt=1),
        )
        assert answered == (again is None)
        assert request.row.state == ("completed" if answered else "queued")


def test_a_last_attempt_handed_back_while_another_worker_begins(engine: Engine) -> None:
    """Its worker, thought lost, hands it back as it is stopped: it counts for nothing, so another attempt may begin."""
    chance = Random(SEED)
    print(f"seed {SEED}")
    for _ in range(ROUNDS):
        request = Request(engine)
        last = [request.begun() for _ in range(3)][-1]
        given, started = at_once(
            chance,
            partial(request.give_back, last, "worker_draining", most=None),
            partial(request.start, "gpu-2"),
        )
        if given == "queued":
            assert isinstance(started, Attempt)
            assert (request.row.attempt, request.row.excused) == (4, 1)
        else:
            assert (given, started) == ("dead", NotStarted("dead", 3, "attempts_exhausted"))
