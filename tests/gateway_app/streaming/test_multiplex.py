"""Many tasks through one feed: every watch sees what a watcher of that task alone sees."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from gateway_app.streaming import multiplex
from gateway_app.streaming.multiplex import Outcome, Watches
from gateway_app.streaming.relay import BLOCK_S, Relay
from gateway_app.streaming.watch import Watcher
from tasks.errors import DatabaseUnavailable, GatewayError, InvalidCursor
from tasks.queueing.connecting import connect
from tasks.queueing.together import Together
from tasks.settings import settings
from tasks.stream import START, Cursor, Frame, ended, opening, replay, stream_key
from tests.played_worker import PREFIX, PlayedWorker, result
from tests.services import wait_until

HEARTBEAT_S = 0.2


@pytest.fixture
def database_kind() -> str:
    """Return SQLite: what a database is like is no matter here."""
    return "sqlite"


@pytest.fixture
def worker(client: FlaskClient) -> Iterator[PlayedWorker]:
    """Return the worker."""
    worker = PlayedWorker(client)
    yield worker
    worker.close()


@pytest.fixture
def watcher(worker: PlayedWorker) -> Iterator[Watcher]:
    """Return a watcher of the same gateway."""
    url = settings().gateway.request_queue_url
    clients = connect(url, BLOCK_S + 15), connect(url, 15)
    relay = Relay(clients[0], Together(clients[1]), PREFIX, 8)
    yield Watcher(worker.database, clients[1], relay, worker.keys, PREFIX, HEARTBEAT_S)
    relay.close()
    for client in clients:
        client.close()


class Seen:
    """Watches, and all that came of them."""

    def __init__(self, watcher: Watcher) -> None:
        self.woken = threading.Event()
        self.watches = Watches(watcher, "default", self.woken.set)
        self.watcher = watcher
        self.outcomes: defaultdict[str, list[Outcome]] = defaultdict(list)

    def watch(self, request_id: str, cursor: Cursor = START) -> None:
        """Watch a task."""
        self.watches.add(self.watcher.find(request_id, "default"), cursor)

    def until(self, done: Any, timeout_s: float = 30) -> None:
        """Go on until `done`."""
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, f"{len(self.watches)} watches are left"
            if not self.take():
                self.woken.wait(0.05)
                self.woken.clear()
                self.watches.look_up()

    def until_over(self) -> dict[str, list[Outcome]]:
        """Return what came, once no watch is left."""
        self.until(lambda: not len(self.watches))
        assert self.watches.idle
        return self.outcomes

    def take(self) -> int:
        """Take what there is, and return how much that was."""
        count = 0
        while (step := self.watches.take()) is not None:
            self.outcomes[step[0]].append(step[1])
            count += 1
        return count


def events(outcomes: list[Outcome]) -> list[str]:
    """Return outcomes as words."""
    words = []
    for outcome in outcomes:
        if isinstance(outcome, Frame):
            words.append(f"{outcome.cursor} {outcome.event}")
        else:
            words.append(outcome.code if isinstance(outcome, GatewayError) else "nothing")
    return words


def after(cursor: Cursor, frames: list[Frame]) -> list[str]:
    """Return the frames after a cursor, as words."""
    return events([frame for frame in frames if frame.cursor > cursor])


@pytest.mark.parametrize("held", [5, 4096])
def test_every_watch_sees_its_own_frames(
    watcher: Watcher, worker: PlayedWorker, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty tasks, each watched from a random cursor while it is written or after; also if next to nothing is held."""
    monkeypatch.setattr(multiplex, "HELD_FRAMES", held)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    texts = [[f"{task}.{number} " for number in range(choose.randrange(1, 40))] for task in range(30)]
    tasks = {worker.submit(): list(replay(1, result(*words))) for words in texts}
    attempts = {request_id: worker.start(request_id) for request_id in tasks}
    cursors = {
        request_id: choose.choice([START, *(frame.cursor for frame in frames[:-1])])
        for request_id, frames in tasks.items()
    }
    written = dict.fromkeys(tasks, 0)
    seen = Seen(watcher)
    waiting, unfinished = list(tasks), list(tasks)
    choose.shuffle(waiting)
    while waiting or unfinished:
        if waiting and choose.random() < 0.3:
            request_id = waiting.pop()
            seen.watch(request_id, cursors[request_id])
        if unfinished:
            request_id = choose.choice(unfinished)
            frames = tasks[request_id]
            count = choose.randrange(1, 10)
            worker.send(request_id, *frames[written[request_id] : written[request_id] + count])
            written[request_id] += count
            if written[request_id] >= len(frames):
                unfinished.remove(request_id)
                worker.answer(request_id, attempts[request_id], result(*(frame.data["text"] for frame in frames[1:-1])))
        if choose.random() < 0.5:
            seen.take()
    outcomes = seen.until_over()
    for request_id, frames in tasks.items():
        assert events(outcomes[request_id]) == after(cursors[request_id], frames)


def test_next_to_nothing_is_held(watcher: Watcher, worker: PlayedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tasks that go on: what was dropped comes from Redis, without a look into the database."""
    monkeypatch.setattr(multiplex, "HELD_FRAMES", 3)
    frames = list(replay(1, result(*map(str, range(20)))))[:-1]
    tasks = [worker.submit() for _ in range(5)]
    seen = Seen(watcher)
    for request_id in tasks:
        seen.watch(request_id)
        worker.send(request_id, *frames)
    with monkeypatch.context() as patch:
        patch.setattr(Watches, "look_up", lambda _: None)
        seen.until(lambda: all(len(seen.outcomes[request_id]) == len(frames) for request_id in tasks))
    for request_id in tasks:
        assert events(seen.outcomes[request_id]) == events(list(frames))
    seen.watches.close()


@pytest.mark.parametrize("forgotten", [False, True])
def test_finished_tasks_are_replayed(watcher: Watcher, worker: PlayedWorker, forgotten: bool) -> None:
    """From every cursor; from the last, only the end of the watch is told, and one past it is an error."""
    request_id = worker.submit()
    frames = list(replay(1, result("one ", "two ")))
    attempt = worker.start(request_id)
    worker.send(request_id, *frames)
    worker.answer(request_id, attempt, result("one ", "two "))
    if forgotten:
        worker.redis.flushall()
    seen = Seen(watcher)
    for cursor in (START, *(frame.cursor for frame in frames[:-1])):
        seen.watch(request_id, cursor)
        assert events(seen.until_over().pop(request_id)) == after(cursor, frames)
    seen.watch(request_id, frames[-1].cursor)
    assert events(seen.until_over().pop(request_id)) == ["nothing"]
    seen.watch(request_id, Cursor(1, 99))
    assert events(seen.until_over().pop(request_id)) == ["invalid_cursor"]


def test_replays_and_what_is_new_take_turns(watcher: Watcher, worker: PlayedWorker) -> None:
    """However long the replay is."""
    finished, running = worker.submit(), worker.submit()
    answer = result(*map(str, range(50)))
    worker.answer(finished, worker.start(finished), answer)
    seen = Seen(watcher)
    seen.watch(running)
    worker.send(running, *list(replay(1, answer))[:10])
    wait_until(lambda: seen.watches._feed.held == 10, 10, "the frames")
    seen.watch(finished)
    order = [step[0] for step in iter(seen.watches.take, None) if step is not None]
    assert sorted(order[:20]) == sorted([finished] * 10 + [running] * 10)
    seen.watches.close()


def test_a_task_that_ends_without_a_word(watcher: Watcher, worker: PlayedWorker) -> None:
    """Among more that go on than are looked up in a row: each is found, and its rest is replayed."""
    answer = result("one ", "two ")
    frames = list(replay(1, answer))
    tasks = [worker.submit() for _ in range(3)]
    attempts = {request_id: worker.start(request_id) for request_id in tasks}
    queued, failed = [worker.submit() for _ in range(10)], worker.submit()
    seen = Seen(watcher)
    for request_id in (*queued, failed, *tasks):
        seen.watch(request_id)
    for request_id, attempt in attempts.items():
        worker.send(request_id, *frames[:2])
        worker.answer(request_id, attempt, answer)
    worker.fail(worker.start(failed))
    seen.until(lambda: len(seen.watches) == len(queued))
    assert all(request_id in seen.watches for request_id in queued)
    for request_id in tasks:
        assert events(seen.outcomes[request_id]) == events(list(frames))
    assert events(seen.outcomes[failed]) == events([ended(1, "failed", "engine_failed")])
    assert seen.watches.drop(queued[0])
    assert not seen.watches.drop(queued[0])
    seen.watches.close()


@pytest.mark.parametrize("last_word", [False, True])
def test_frames_that_redis_lost(watcher: Watcher, worker: PlayedWorker, last_word: bool) -> None:
    """Are never skipped: they come from the database when the task has ended, if its stream says so or not."""
    request_id = worker.submit()
    answer = result("one ", "two ", "three ")
    frames = list(replay(1, answer))
    attempt = worker.start(request_id)
    seen = Seen(watcher)
    seen.watch(request_id)
    worker.send(request_id, *frames[:2])
    seen.until(lambda: len(seen.outcomes[request_id]) == 2)
    worker.send(request_id, frames[3])
    worker.answer(request_id, attempt, answer)
    if last_word:
        worker.send(request_id, frames[4])
    assert events(seen.until_over()[request_id]) == events(list(frames))


def test_a_stream_that_says_more_than_the_database(watcher: Watcher, worker: PlayedWorker) -> None:
    """With a hole before its end: nobody waits for it."""
    request_id = worker.submit()
    frames = list(replay(1, result("one ")))
    worker.start(request_id)
    seen = Seen(watcher)
    seen.watch(request_id)
    worker.send(request_id, frames[0], frames[2])
    assert events(seen.until_over()[request_id]) == ["1-0 started", "stream_unavailable"]


def test_while_the_database_is_away(watcher: Watcher, worker: PlayedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames come all the same, and silence costs one question, however many tasks are silent."""
    tasks = [worker.submit() for _ in range(20)]
    seen = Seen(watcher)
    for request_id in tasks:
        seen.watch(request_id)
    asked = 0

    def away(*_: object) -> None:
        nonlocal asked
        asked += 1
        raise DatabaseUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "find", away)
        time.sleep(1.5 * HEARTBEAT_S)
        seen.watches.look_up()
        seen.watches.look_up()
        assert asked == 1
        worker.send(tasks[0], *replay(1, result("one ")))
        seen.until(lambda: tasks[0] not in seen.watches)
    seen.watches.close()
    assert len(seen.watches) == 0


def test_watching_again_goes_on_from_there(watcher: Watcher, worker: PlayedWorker) -> None:
    """With one watch, not two. A cursor that cannot be leaves the watch as it was."""
    request_id = worker.submit()
    worker.start(request_id)
    frames = list(replay(1, result("one ", "two ")))
    worker.send(request_id, *frames[:3])
    seen = Seen(watcher)
    seen.watch(request_id)
    seen.until(lambda: len(seen.outcomes[request_id]) == 3)
    with pytest.raises(InvalidCursor):
        seen.watch(request_id, Cursor(2, 1))
    seen.watch(request_id, frames[1].cursor)
    assert len(seen.watches) == 1
    worker.send(request_id, frames[3])
    assert events(seen.until_over()[request_id]) == events([*frames[:3], *frames[2:]])


def test_a_frame_that_was_altered(watcher: Watcher, worker: PlayedWorker) -> None:
    """Ends its own watch."""
    bad, good = worker.submit(), worker.submit()
    seen = Seen(watcher)
    for request_id in (bad, good):
        worker.start(request_id)
        seen.watch(request_id)
        worker.send(request_id, opening(1))
    worker.redis.xadd(stream_key(PREFIX, bad), {"f": b"no frame of ours at all"}, id="1-1")
    worker.send(good, *list(replay(1, result("one ")))[1:])
    outcomes = seen.until_over()
    assert events(outcomes[bad]) == ["1-0 started", "internal_error"]
    assert len(outcomes[good]) == 3
