"""Who waits for an answer and goes away needs none: the request is cancelled. Who only watches cancels nothing.

The first half plays through what the waiting does with frames and silences; the second closes real connections to a
real server, whose slow engine takes 50 ms for a token.
"""

from __future__ import annotations

import itertools
import json
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import requests
import sqlalchemy as sa

from gateway_app import synchronous as module
from gateway_app.cancelling import Canceller
from gateway_app.streaming.pump import Pump
from gateway_app.streaming.watch import Watcher
from gateway_app.synchronous import LOOK_S, Synchronous
from tasks.errors import Cancelled, DatabaseUnavailable, EngineFailed
from tasks.job import Piece, Result, Timings, Usage
from tasks.schema import TERMINAL_STATES
from tasks.schema import requests as table
from tasks.stream import Frame, ended, replay
from tests.fleet import Fleet, fleet
from tests.services import wait_until

ANSWER = Result(
    pieces=tuple(Piece(text=f"{number} ") for number in range(5)),
    finish_reasons=("stop",),
    model="tiny",
    usage=Usage(prompt_tokens=1, cached_tokens=0, output_tokens=5),
    timings=Timings(queued_ms=1, total_ms=2),
)
FRAMES = list(replay(1, ANSWER))


# --- Frames and silences --------------------------------------------------------------------------


@dataclass
class Played:
    """Stands in for everything around the waiting: it gives `items`, each of which takes `takes_s` on a clock that
    nobody has to wait for.
    """

    items: Iterable[Frame | Exception | None]
    state: str = "running"
    error_code: str | None = None
    answer: Result | None = None
    takes_s: float = LOOK_S
    heartbeat_s: float = 15.0
    now_s: float = 1000.0
    abandoned: list[str] = field(default_factory=list)

    def frames(self, _row: Any, _cursor: Any, silence_s: float) -> Iterator[Frame | None]:
        assert silence_s == LOOK_S
        for item in self.items:
            self.now_s += self.takes_s
            if isinstance(item, Exception):
                raise item
            yield item

    def find(self, request_id: str, organization: str) -> Any:
        return SimpleNamespace(
            request_id=request_id, organization=organization, state=self.state, error_code=self.error_code
        )

    def result(self, _row: Any) -> Result | None:
        return self.answer

    def abandon(self, request_id: str, organization: str) -> None:
        assert organization == "default"
        self.abandoned.append(request_id)

    @property
    def row(self) -> Any:
        return self.find("gw_1", "default")


def waiting(played: Played, monkeypatch: pytest.MonkeyPatch) -> Synchronous:
    """Return what waits, on the player's clock."""
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: played.now_s))
    return Synchronous(cast("Watcher", played), cast("Canceller", played), cast("Pump", None))


def there() -> bool:
    """Say that the client is there."""
    return False


def leaving(after: int) -> Callable[[], bool]:
    """Return what says that the client is there so many times, then that it is gone."""
    looks = itertools.count(1)
    return lambda: next(looks) > after


def test_an_answer_that_somebody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given, with whatever silence there was in between, and nothing is cancelled."""
    played = Played([None, *FRAMES[:3], None, *FRAMES[3:]], state="completed", answer=ANSWER)
    assert waiting(played, monkeypatch).result(played.row, there) == ANSWER
    assert played.abandoned == []


@pytest.mark.parametrize("talkative", [True, False])
def test_a_client_that_left_is_noticed(monkeypatch: pytest.MonkeyPatch, talkative: bool) -> None:
    """Whether the model is silent or talks all the time: who waits for the whole answer writes nothing meanwhile."""
    words = [frame for frame in FRAMES if frame.event == "delta"]
    talk: Iterator[Frame | None] = itertools.cycle(words) if talkative else itertools.repeat(None)
    played = Played(itertools.islice(talk, 100), takes_s=LOOK_S / 5 if talkative else LOOK_S)
    with pytest.raises(Cancelled) as caught:
        waiting(played, monkeypatch).result(played.row, leaving(after=2))
    assert caught.value.request_id == "gw_1"
    assert played.abandoned == ["gw_1"]
    assert played.now_s - 1000 == pytest.approx(3 * LOOK_S)


def test_a_client_that_left_in_the_very_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is there: there is nothing to cancel."""
    played = Played(FRAMES, state="completed", answer=ANSWER, takes_s=LOOK_S)
    assert waiting(played, monkeypatch).result(played.row, leaving(after=len(FRAMES) - 1)) == ANSWER
    assert played.abandoned == []


def test_a_request_that_ends_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits gets its error, with the request's id."""
    played = Played([ended(1, "failed", "engine_failed")], state="failed", error_code="engine_failed")
    with pytest.raises(EngineFailed) as caught:
        waiting(played, monkeypatch).result(played.row, there)
    assert caught.value.request_id == "gw_1"
    assert played.abandoned == []


def test_a_stream_says_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in each heartbeat of silence, however often the client is looked at, counted from what was said last."""
    played = Played([*[None] * 9, FRAMES[0], *[None] * 9, *FRAMES[1:]], heartbeat_s=4 * LOOK_S)
    given = list(waiting(played, monkeypatch).frames(played.row, there))
    assert given == [None, None, FRAMES[0], None, None, *FRAMES[1:]]
    assert played.abandoned == []


@pytest.mark.parametrize("taken", range(len(FRAMES) + 1))
def test_a_stream_that_is_closed(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    """Before it began, in its middle, or at its end: it is cancelled unless its last frame was given."""
    played = Played(FRAMES)
    frames = waiting(played, monkeypatch).frames(played.row, there)
    assert list(itertools.islice(frames, taken)) == FRAMES[:taken]
    cast("Any", frames).close()
    assert played.abandoned == ["gw_1"] * (taken < len(FRAMES))


def test_a_stream_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client will not get the rest, so nobody needs it."""
    played = Played([FRAMES[0], DatabaseUnavailable()])
    with pytest.raises(DatabaseUnavailable):
        list(waiting(played, monkeypatch).frames(played.row, there))
    assert played.abandoned == ["gw_1"]


# --- Real connections -----------------------------------------------------------------------------

AGENT = "incident-responder"
SLOTS = 3
#: Longer than any test waits.
FOREVER = 400
#: What is promised of a plain call; of a stream, it is a heartbeat.
PROMISED_S = 1.0
HEARTBEAT_S = 2.0
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Fleet]:
    """Return a gateway with a slow worker, shared by the tests below."""
    options = {"time_scale": 10, "answer_tokens": 2 * FOREVER}
    variables = {
        "ENGINE__OPTIONS": json.dumps(options),
        "ENGINE__MAX_NUM_SEQS": str(SLOTS),
        "STREAMING__HEARTBEAT_S": str(HEARTBEAT_S),
    }
    with fleet(tmp_path_factory.mktemp("gateway"), tiny_model, **variables) as made:
        yield made


class Call:
    """One request over a connection of its own, of which the test decides when and how it ends."""

    def __init__(self, gateway: Fleet, method: str, path: str, body: Any = None, **headers: str) -> None:
        parts = urlsplit(gateway.url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)
        content = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {parts.netloc}",
            *(f"{k}: {v}" for k, v in gateway.headers.items()),
        ]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}", "", ""]
        self.socket.sendall("\r\n".join(lines).encode() + content)
        self.received = b""

    def receive(self, wanted: bytes) -> None:
        """Read until this has come."""
        while wanted not in self.received:
            data = self.socket.recv(4096)
            assert data, f"the connection ended after {self.received!r}"
            self.received += data

    def leave(self, how: str = "close") -> float:
        """End the connection; return when."""
        if how == "reset":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        return time.monotonic()


def completion(model: str, *, stream: bool = False, max_tokens: int = FOREVER) -> dict[str, Any]:
    """Return the body of a chat completion."""
    messages = [{"role": "user", "content": "What is on fire?"}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": stream}


class Record:
    """What the database has of the gateway's requests."""

    def __init__(self, gateway: Fleet) -> None:
        self.engine = sa.create_engine(gateway.environment["DATABASE_URL"])
        self.seen = {row.request_id for row in self.rows()}

    def rows(self) -> list[sa.Row[Any]]:
        """Return all of it."""
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(table).order_by(table.c.request_id)))

    def row(self, request_id: str) -> sa.Row[Any]:
        """Return one request."""
        with self.engine.connect() as connection:
            return connection.execute(sa.select(table).where(table.c.request_id == request_id)).one()

    def next(self, state: str) -> str:
        """Return the id of the request that came since, once it is in that state."""

        def found() -> list[str]:
            new = [row for row in self.rows() if row.request_id not in self.seen]
            return [row.request_id for row in new if row.state == state]

        [request_id] = wait_until(found, PATIENCE_S, f"a request that is {state}")
        self.seen.add(request_id)
        return str(request_id)

    def cancelled_after(self, request_id: str, since: float) -> float:
        """Return how long after `since` the request was cancelled, in seconds."""
        wait_until(lambda: self.row(request_id).state in TERMINAL_STATES, PATIENCE_S, "the request to end")
        took_s = time.monotonic() - since
        assert self.row(request_id).state == "cancelled"
        return took_s


@pytest.fixture
def record(gateway: Fleet) -> Iterator[Record]:
    """Return the record; what a test has left running is cancelled."""
    record = Record(gateway)
    yield record
    for row in record.rows():
        if row.state not in TERMINAL_STATES:
            url = f"{gateway.url}/v1/tasks/{row.request_id}"
            requests.delete(url, headers=gateway.headers, timeout=PATIENCE_S)
            record.cancelled_after(row.request_id, time.monotonic())
    record.engine.dispose()


def best_of_three(measure: Callable[[], float], what: str) -> float:
    """Return the shortest of three times: other tests may keep the machine busy."""
    times = [measure() for _ in range(3)]
    print(what, [f"{s:.3f} s" for s in times])
    return min(times)


@pytest.mark.parametrize(("served", "how"), [("agent", "close"), ("model", "reset")])
def test_a_plain_call_whose_client_leaves(gateway: Fleet, record: Record, served: str, how: str) -> None:
    """In the middle of an answer that has no pauses: it is cancelled within a second, and its partial text kept."""
    name = AGENT if served == "agent" else Path(gateway.environment["METAQORE_ENGINE__MODEL"]).name

    def measure() -> float:
        call = Call(gateway, "POST", "/v1/chat/completions", completion(name))
        request_id = record.next("running")
        time.sleep(0.6)
        left_at = call.leave(how)
        took_s = record.cancelled_after(request_id, left_at)
        assert record.row(request_id).result is not None
        return took_s

    assert best_of_three(measure, "plain") < PROMISED_S


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_its_turn(gateway: Fleet, record: Record, stream: bool) -> None:
    """All slots are taken, so there is only silence: its request ends without ever having begun."""
    running = [Call(gateway, "POST", "/v1/chat/completions", completion(AGENT)) for _ in range(SLOTS)]
    wait_until(lambda: sum(row.state == "running" for row in record.rows()) == SLOTS, PATIENCE_S, "full slots")
    record.seen |= {row.request_id for row in record.rows()}

    def measure() -> float:
        call = Call(gateway, "POST", "/v1/chat/completions", completion(AGENT, stream=stream))
        request_id = record.next("queued")
        time.sleep(0.2)
        took_s = record.cancelled_after(request_id, call.leave())
        assert record.row(request_id).attempt == 0
        return took_s

    assert best_of_three(measure, "queued") < (HEARTBEAT_S if stream else PROMISED_S)
    for call in running:
        call.leave()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_stream_whose_client_leaves(gateway: Fleet, record: Record, how: str) -> None:
    """After its first words: it is cancelled within a heartbeat."""

    def measure() -> float:
        call = Call(gateway, "POST", "/v1/chat/completions", completion(AGENT, stream=True))
        request_id = record.next("running")
        call.receive(b'"content":"')
        return record.cancelled_after(request_id, call.leave(how))

    assert best_of_three(measure, "stream") < HEARTBEAT_S


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_stays_gets_its_answer(gateway: Fleet, record: Record, stream: bool) -> None:
    """It is looked at several times meanwhile, and nothing is cancelled."""
    call = Call(gateway, "POST", "/v1/chat/completions", completion(AGENT, stream=stream, max_tokens=25))
    request_id = record.next("running")
    call.receive(b"[DONE]" if stream else b'"finish_reason":"length"')
    wait_until(lambda: record.row(request_id).state == "completed", PATIENCE_S, "its end")
    call.leave()


def test_who_watches_and_leaves_cancels_nothing(gateway: Fleet, record: Record) -> None:
    """Five watchers of a task go away, and so does one that waits for the answer by asking again and again."""
    body = {"agent": AGENT, "directive": "What now?", "sampling": {"max_tokens": 60}}
    accepted = requests.post(f"{gateway.url}/v1/tasks", json=body, headers=gateway.headers, timeout=PATIENCE_S).json()
    watchers = [Call(gateway, "GET", accepted["links"]["events"]) for _ in range(5)]
    for watcher in watchers:
        watcher.receive(b"event: delta")
    poller = Call(gateway, "GET", accepted["links"]["self"])
    poller.receive(b'"running"')
    for number, watcher in enumerate((*watchers, poller)):
        watcher.leave("reset" if number % 2 else "close")
    wait_until(lambda: record.row(accepted["id"]).state in TERMINAL_STATES, PATIENCE_S, "its end")
    row = record.row(accepted["id"])
    assert (row.state, row.cancel_requested_at) == ("completed", None)


def test_who_comes_back_with_the_same_key_asks_anew(gateway: Fleet, record: Record) -> None:
    """A client's connection broke, and its request was cancelled: with the same Idempotency-Key, it gets its answer."""
    body = completion(AGENT, max_tokens=25)
    broken = Call(gateway, "POST", "/v1/chat/completions", body, Idempotency_Key="try-again")
    first = record.next("running")
    time.sleep(0.2)
    record.cancelled_after(first, broken.leave())
    headers = {**gateway.headers, "Idempotency-Key": "try-again"}
    url = f"{gateway.url}/v1/chat/completions"
    answers = [requests.post(url, json=body, headers=headers, timeout=PATIENCE_S) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].headers["X-Request-Id"] != first
    assert answers[0].json() == answers[1].json()
    assert answers[1].headers["Idempotent-Replayed"] == "true"
