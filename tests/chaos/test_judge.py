"""The judges of the chaos scenarios find each thing that they are there to find."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from bench.chaoslab.asking import Question, Told
from bench.chaoslab.judge import judge
from bench.chaoslab.lab import Outcome
from bench.chaoslab.record import read

QUESTION = Question("What now?", 4)
CALM = {QUESTION: "the queue holds "}
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
WHOLE = ["received", "admitted", "started 1", "completed 1"]


class Book:
    """A record, written by hand."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = sa.create_engine(url)
        with self._engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE requests (request_id, state, attempt, finished_at)"))
            columns = "request_id, kind, attempt, epoch, occurred_at, worker, code"
            connection.execute(sa.text(f"CREATE TABLE audit_events ({columns})"))

    def close(self) -> None:
        self._engine.dispose()

    def row(self, state: str = "completed", attempt: int = 1) -> None:
        """Write the request's row."""
        finished = None if state in ("queued", "running") else "2026-01-01 00:01:00"
        with self._engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO requests VALUES ('gw_1', :state, :attempt, :finished)"),
                {"state": state, "attempt": attempt, "finished": finished},
            )

    def events(self, kinds: list[str]) -> None:
        """Write its events, a second apart; `started 2` is of the second attempt."""
        for index, kind in enumerate(kinds):
            name, _, attempt = kind.partition(" ")
            at = (BEGAN + timedelta(seconds=index)).strftime("%Y-%m-%d %H:%M:%S.%f")
            with self._engine.begin() as connection:
                connection.execute(
                    sa.text(
                        "INSERT INTO audit_events VALUES ('gw_1', :kind, :attempt, 1, :at, 'worker-1@chaos', NULL)"
                    ),
                    {"kind": name, "attempt": int(attempt or 0), "at": at},
                )


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    """Return an empty record."""
    book = Book(f"sqlite:///{tmp_path / 'record.db'}")
    yield book
    book.close()


def told(**changed: object) -> Told:
    """Return what a client was told when all went well, but for what is changed."""
    fields = {"request_id": "gw_1", "event": "completed", "text": CALM[QUESTION], **changed}
    return Told(QUESTION, **fields)  # type: ignore[arg-type]


def broken(book: Book, *clients: Told) -> set[str]:
    """Return which rules are broken."""
    verdict = judge(read(book.url), clients, CALM)
    return {rule for rule, count in verdict.broken.items() if count}


def test_what_went_well_breaks_no_rule(book: Book) -> None:
    """Two attempts, the second answered, and a client that saw all of it."""
    book.row(attempt=2)
    book.events(["received", "admitted", "started 1", "started 2", "completed 2"])
    assert broken(book, told()) == set()


@pytest.mark.parametrize(
    ("state", "events", "rule"),
    [
        ("queued", ["received", "admitted"], "lost"),
        ("running", ["received", "admitted", "started 1"], "lost"),
        ("completed", WHOLE[:3], "without_one_terminal_event"),
        ("completed", [*WHOLE, "failed 1"], "without_one_terminal_event"),
        ("completed", WHOLE[1:], "without_received_and_admitted"),
        ("completed", ["received", *WHOLE], "without_received_and_admitted"),
        ("completed", [*WHOLE[:3], "failed 1"], "row_disagrees"),
        ("completed", [*WHOLE[:3], "completed 2"], "row_disagrees"),
        ("completed", [*WHOLE[:2], "completed 1"], "attempts_out_of_order"),
        ("completed", ["received", "admitted", "completed 1", "started 1"], "ran_after_the_end"),
    ],
)
def test_the_record_is_read_closely(book: Book, state: str, events: list[str], rule: str) -> None:
    """Whatever is wrong with one request's rows is found, by the rule it breaks."""
    book.row(state)
    book.events(events)
    assert rule in broken(book)


def test_an_accepted_id_without_a_row_is_lost(book: Book) -> None:
    """A client was told 202, and the database knows nothing of it."""
    assert broken(book, told()) == {"lost"}


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"event": None}, "streams_unended"),
        ({"event": "failed"}, "streams_unended"),
        ({"text": "the queue "}, "texts_differ"),
        ({"text": "the queue the queue holds "}, "texts_differ"),
        ({"faults": ["frame 1-3 came after 1-3"]}, "clients_misled"),
    ],
)
def test_what_clients_were_told_is_compared(book: Book, changed: dict[str, object], rule: str) -> None:
    """A stream without an end, an end that is not the record's, and any other text are found."""
    book.row()
    book.events(WHOLE)
    assert broken(book, told(**changed)) == {rule}


def test_an_end_without_an_answer_counts(book: Book) -> None:
    """A request that died is told and recorded as it should be, and yet unanswered."""
    book.row("dead")
    book.events([*WHOLE[:3], "dead 1"])
    assert broken(book, told(event="dead")) == {"unanswered"}


def test_a_refusal_has_no_row_and_two_events(book: Book) -> None:
    """What was refused is recorded as received and as refused; without the second it hangs in the air."""
    book.events(["received"])
    assert broken(book) == {"without_one_terminal_event"}
    book.events(["vetoed"])
    assert broken(book) == set()


def test_targets_are_missed_in_words() -> None:
    """A figure at its bound holds; patience stretches upper bounds that are in time, and no others."""
    outcome = Outcome(
        {"lost": 1, "kills": 3, "wait_s": 6}, {"lost": ("<=", 0), "kills": (">=", 3), "wait_s": ("<=", 5)}
    )
    assert outcome.missed() == ["lost is 1, not <= 0", "wait_s is 6, not <= 5"]
    timed = Outcome(outcome.figures, outcome.targets, timed=["wait_s"])
    assert timed.missed(patience=2.0) == ["lost is 1, not <= 0"]
