"""docs/audit-queries.md is whole, shows what is answered, and its proof would see what it is there to see."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tasks.audit.events import Subject, event, record
from tests.gateway_app.audit.answers import ANSWERS
from tests.gateway_app.audit.questions import PAGE, questions
from tests.gateway_app.audit.recorded import fill
from tests.gateway_app.audit.shown import parameters, with_answers

QUESTIONS = questions()


@pytest.fixture(scope="module")
def filled(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Return an engine on an SQLite database with the record."""
    url = f"sqlite:///{shutil.copy(sqlite_template, tmp_path_factory.mktemp('page'))}"
    fill(url)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


def test_every_question_is_answered() -> None:
    """Neither a question without a test, nor a test without a question; and each has its heading, its SQL and an answer."""
    assert list(QUESTIONS) == list(ANSWERS)
    sections = re.split(r"^## (\d+)\. .*\?$", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert [int(number) for number in sections[::2]] == list(range(1, 25))
    blocks_of = [re.findall(r"^```(sql|text) ([\w-]+)", section, re.MULTILINE) for section in sections[1::2]]
    asked, shown = ([{name for kind, name in found if kind == of} for found in blocks_of] for of in ("sql", "text"))
    assert asked == shown
    assert all(asked)
    assert set.union(*asked) == set(QUESTIONS)


def test_the_page_shows_these_answers(filled: Engine) -> None:
    """Run `shown` as a module to write them again."""
    page = PAGE.read_text("utf-8")
    with filled.connect() as connection:
        assert with_answers(page, connection) == page


def test_the_proof_sees_what_is_wrong(filled: Engine, tmp_path: Path) -> None:
    """In a database that lets them in, a second end, a life without a beginning and one without an end are counted."""
    with filled.connect() as connection:
        connection.exec_driver_sql(f"VACUUM INTO '{tmp_path / 'copy.db'}'")
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'copy.db'}")
    with engine.begin() as connection:
        given = parameters(connection)
        [before] = QUESTIONS["one-end-each"].ask(connection, given)
        connection.exec_driver_sql("DROP INDEX audit_events_one_terminal")
        connection.exec_driver_sql("DROP TRIGGER audit_events_no_replace")
        for number, kinds in enumerate((("received", "failed", "expired"), ("completed",), ("received",))):
            subject = Subject(f"{given['since_id']}{number:019}", "acme", "key")
            record(connection, *(event(subject, kind) for kind in kinds))
        [after] = QUESTIONS["one-end-each"].ask(connection, given)
    engine.dispose()
    added = {name: after[name] - before[name] for name in after}
    assert added == {"requests": 3, "unrecorded": 1, "not_ended": 1, "ended_twice": 1}
