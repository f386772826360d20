"""Recorded requests decided again: the counts are those of an oracle, memory is bounded, and nothing is changed.

Requests are taken in through the gateway itself, under one policy, and decided again under all others. What must come out
is worked out here, from the contract's tables and what each request said.
"""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from flask.testing import FlaskClient

from gateway_app.governance import simulation
from gateway_app.governance.cli import policy as command
from gateway_app.governance.simulation import EARLIER_RELEASE, NOT_SCANNED, Trial, simulate
from tasks.audit.events import Subject, event, record
from tasks.db import Database, now
from tasks.governance.decision import Detection, Facts, Found, decide, details
from tasks.governance.secure_gateway import POLICIES, PROVIDERS
from tasks.ids import PREFIX, new_request_id
from tasks.schema import audit_events
from tasks.settings import DatabaseGroup, settings

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
EMAIL = Found({"email": 1}, private=True, sensitive=False)
NONE_FOUND = Found({}, private=False, sensitive=False)


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """Return an empty database."""
    database = Database(DatabaseGroup(url=migrated_url))
    yield database
    database.close()


def decided(facts: Facts, policy: str, detection: Detection, up: tuple[str, ...] = PROVIDERS, **more: Any) -> list[Any]:
    """Return the events of a request that was decided so."""
    ruling = decide(facts, policy, detection, up)
    subject = Subject(new_request_id(), more.pop("organization", "acme"), "key_1", facts.agent_name)
    held = details(facts, detection, 1) | more
    if ruling.veto is not None:
        held |= {"veto": ruling.veto.as_dict(), "vetoed_by": ruling.vetoed_by}
    columns: dict[str, Any] = {
        "task_type": facts.task_type,
        "sensitivity": ruling.sensitivity,
        "provider": ruling.provider,
    }
    kind, epoch = ("admitted", 1) if ruling.veto is None else ("vetoed", 0)
    events = [event(subject, "received"), event(subject, kind, epoch=epoch, policy=policy, details=held, **columns)]
    if kind == "admitted" and more.get("refused_later"):
        events.append(event(subject, "vetoed", epoch=1, code="policy_veto", details={"veto": {"reason": "x"}}))
    return events


def add(database: Database, *events: Any) -> None:
    """Record events."""
    database.write(lambda connection: record(connection, *events))


def trial(
    policy: str, detection: Detection | None = None, up: tuple[str, ...] = PROVIDERS, **period: datetime
) -> Trial:
    """Return what is tried on the organization `acme`."""
    span = {"since": now() - timedelta(hours=1), "until": now() + timedelta(hours=1), **period}
    return Trial("acme", policy=policy, available=up, detection=detection, **span)


# --- What would change ----------------------------------------------------------------------------


def test_every_change_there_is(database: Database) -> None:
    """One request of each kind, named by its id; those of others, and refusals of later, count for nothing."""
    plain, cloud = (
        Facts("coder", "chat", found=NONE_FOUND),
        Facts("coder", "chat", provider_hint="openrouter", found=EMAIL),
    )
    events = {
        "unchanged": decided(plain, "default_local_first", "record"),
        "allowed_to_vetoed": decided(cloud, "default_local_first", "record"),
        "vetoed_to_allowed": decided(cloud, "compliance_local_only", "record"),
        "provider_changed": decided(plain, "default_local_first", "record", ("ollama",)),
        "later": decided(plain, "default_local_first", "record", refused_later=True),
        "others": decided(cloud, "default_local_first", "record", organization="globex"),
    }
    ids = {name: recorded[0]["request_id"] for name, recorded in events.items()}
    for recorded in events.values():
        add(database, *recorded)
    before = count(database)
    stricter = simulate(database, trial("compliance_local_only"))
    assert stricter.changes == {"allowed_to_vetoed": 1, "provider_changed": 1, "unchanged": 3}
    assert stricter.examples["allowed_to_vetoed"] == [ids["allowed_to_vetoed"]]
    assert stricter.examples["provider_changed"] == [ids["provider_changed"]]
    looser = simulate(database, trial("default_local_first"))
    assert looser.changes == {"vetoed_to_allowed": 1, "provider_changed": 1, "unchanged": 3}
    assert looser.examples["vetoed_to_allowed"] == [ids["vetoed_to_allowed"]]
    raising = simulate(database, trial("default_local_first", "raise"))
    assert raising.changes == {"allowed_to_vetoed": 1, "provider_changed": 1, "unchanged": 3}
    assert count(database) == before


def test_what_cannot_be_decided_again(database: Database) -> None:
    """A release that recorded no facts; texts that nobody looked into, where that is what is tried. Each is told."""
    subject = Subject(new_request_id(), "acme", "key_1", "coder")
    add(database, event(subject, "admitted", task_type="chat", provider="hmcp_gateway", details=None))
    add(database, *decided(Facts("coder", "chat"), "default_local_first", "off"))
    add(database, *decided(Facts("coder", "chat", found=EMAIL), "default_local_first", "record"))
    report = simulate(database, trial("default_local_first", "refuse"))
    assert report.skipped == {EARLIER_RELEASE: 1, NOT_SCANNED: 1}
    assert report.changes == {"allowed_to_vetoed": 1}
    report = simulate(database, trial("default_local_first"))
    assert (report.skipped, report.changes) == ({EARLIER_RELEASE: 1}, {"unchanged": 2})


def test_a_projects_veto_stays(database: Database) -> None:
    """No policy lets a request through that its project stops."""
    facts = Facts("coder", "chat", found=NONE_FOUND)
    recorded = decided(facts, "default_local_first", "record")
    recorded[1] |= {"kind": "vetoed", "epoch": 0}
    recorded[1]["details"] |= {"vetoed_by": "project", "veto": {"reason": "blocked"}}
    add(database, *recorded)
    for policy in POLICIES:
        assert simulate(database, trial(policy)).changes == {"unchanged": 1}


def test_a_period(database: Database) -> None:
    """Requests belong to it by when they arrived: from its first millisecond to before its last."""
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for offset in (-1, 0, 1, 999, 1000, 1001):
        milliseconds = int(noon.timestamp() * 1000) + offset
        recorded = decided(Facts("coder", f"at {offset}"), "default_local_first", "off")
        for row in recorded:
            row["request_id"] = f"{PREFIX}{milliseconds:012x}7{'0' * 3}8{'0' * 15}"
        add(database, *recorded)
    report = simulate(database, trial("default_local_first", since=noon, until=noon + timedelta(seconds=1)))
    assert {task_type for _, task_type in report.groups} == {"at 0", "at 1", "at 999"}


def test_many_requests(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any size, in any order of pages, the counts are the oracle's, and so are the groups'."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    monkeypatch.setattr(simulation, "PAGE", 7)
    expected: Counter[str] = Counter()
    groups: dict[tuple[str, str], Counter[str]] = {}
    events: list[Any] = []
    for _ in range(150):
        facts = Facts(
            choose.choice(["coder", "Validator"]),
            choose.choice(["chat", "plan"]),
            private=choose.random() < 0.3,
            sensitive=choose.random() < 0.3,
            security=choose.random() < 0.3,
            provider_hint=choose.choice([None, *PROVIDERS]),
            found=choose.choice([EMAIL, NONE_FOUND]),
        )
        old: Detection = choose.choice(["record", "raise", "refuse"])
        policy = choose.choice(list(POLICIES))
        more: dict[str, Any] = {"refused_later": True} if choose.random() < 0.2 else {}
        events += decided(facts, policy, old, **more)
        was, would = decide(facts, policy, old, PROVIDERS), decide(facts, "enterprise_residency", "raise", PROVIDERS)
        change = (
            f"{'vetoed' if was.veto else 'allowed'}_to_{'vetoed' if would.veto else 'allowed'}"
            if bool(was.veto) != bool(would.veto)
            else "unchanged"
        )
        expected[change] += 1
        groups.setdefault((facts.agent_name, facts.task_type), Counter())[change] += 1
    add(database, *events)
    report = simulate(database, trial("enterprise_residency", "raise"))
    assert report.changes == expected
    assert report.groups == groups
    assert all(len(ids) <= simulation.EXAMPLES for ids in report.examples.values())


@SQLITE
def test_memory_does_not_grow(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the requests, and not with the names that callers make up."""
    monkeypatch.setattr(simulation, "GROUPS", 50)
    monkeypatch.setattr(simulation, "PAGE", 100)

    def peak() -> int:
        tracemalloc.start()
        try:
            report = simulate(database, trial("default_local_first"))
            assert len(report.groups) <= 51
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peaks = []
    for part in range(3):
        events = [decided(Facts("coder", f"{part}-{number}"), "default_local_first", "off") for number in range(500)]
        add(database, *itertools.chain.from_iterable(events))
        peaks.append(peak())
    assert peaks[2] < peaks[0] * 1.5
    report = simulate(database, trial("default_local_first"))
    assert sum(counts.total() for counts in report.groups.values()) == report.replayed == 1500
    assert report.groups[simulation.OTHERS].total() == 1450


def count(database: Database) -> int:
    """Return how many events there are."""
    query = sa.select(sa.func.count()).select_from(audit_events)
    return int(database.read(lambda connection: connection.execute(query).scalar_one()))


# --- The commands ---------------------------------------------------------------------------------


def flask_policy(*arguments: str) -> Result:
    """Run a command that must not fail by a bug."""
    result = CliRunner().invoke(command, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@SQLITE
def test_the_commands(client: FlaskClient) -> None:
    """Shown, set, listed, and tried on what the gateway itself recorded."""
    assert flask_policy("show").output == "version 0  default_local_first  detection record  the settings'\n"
    task = {"agent": "incident-responder", "directive": "Write to jo@example.org."}
    assert client.post("/v1/tasks", json=task).status_code == 202
    client.post("/v1/tasks", json={**task, "provider_hint": "openrouter"})
    client.post("/v1/tasks", json={**task, "agent": "nobody"})
    tried = json.loads(flask_policy("simulate", "--policy", "default", "--detection", "refuse", "--json").output)
    assert tried["changes"] == {
        "allowed_to_vetoed": 1, "vetoed_to_allowed": 0, "provider_changed": 0, "unchanged": 1,
    }  # fmt: skip
    assert tried["examples"]["allowed_to_vetoed"] == [client.get("/v1/tasks").json["data"][0]["id"]]
    shown = flask_policy("simulate", "--policy", "default", "--detection", "refuse").output
    assert "2 requests decided again" in shown
    assert "incident-responder, task: 1 allowed to vetoed" in shown

    made = flask_policy("set", "--policy", "Local-Only", "--reason", "An order.", "--expected", "0")
    assert "version 1  compliance_local_only  detection record" in made.output
    assert made.output.endswith("  cli  An order.\n")
    assert client.get("/v1/policy").json["created_by"] == "cli"
    again = flask_policy("set", "--policy", "default", "--expected", "0")
    assert (again.exit_code, "policy in force is version 1" in again.output) == (1, True)
    flask_policy("set", "--policy", "default", "--detection", "off")
    listed = flask_policy("history").output.splitlines()
    assert [line.split()[1] for line in listed] == ["2", "1", "0"]
    assert flask_policy("history", "--limit", "1").output.count("\n") == 2
    assert flask_policy("show", "--organization", "globex").output.startswith("version 0")


@SQLITE
@pytest.mark.usefixtures("configured")
def test_bad_arguments() -> None:
    """A message that says what is wrong; nothing is changed."""
    for arguments, told in (
        (("set",), "--policy"),
        (("set", "--policy", "lenient"), "enterprise_residency"),
        (("set", "--policy", "default", "--detection", "maybe"), "refuse"),
        (("set", "--policy", "default", "--reason", "x" * 501), "500"),
        (("set", "--policy", "default", "--reason", "a\x1b[2Jb"), "printable"),
        (("set", "--policy", "default", "--organization", ""), "printable"),
        (("simulate",), "--policy"),
        (("simulate", "--policy", "lenient"), "compliance_local_only"),
        (("simulate", "--policy", "default", "--since", "yesterday"), "2026-01-31"),
        (("simulate", "--policy", "default", "--since", "2026-01-02", "--until", "2026-01-01"), "before --until"),
        (("history", "--limit", "0"), "--limit"),
    ):
        result = flask_policy(*arguments)
        assert result.exit_code != 0
        assert told in result.output
        assert "Traceback" not in result.output
    assert flask_policy("show").output.startswith("version 0")


@SQLITE
def test_a_name_that_speaks_to_the_terminal(client: FlaskClient) -> None:
    """It is shown as text."""
    facts = Facts("coder", "\u202e\u009b31mchat", provider_hint="openrouter")
    database = Database(settings().database)
    try:
        add(database, *decided(facts, "default_local_first", "off", organization="default"))
    finally:
        database.close()
    shown = flask_policy("simulate", "--policy", "compliance").output
    assert r"coder, \u202e\x9b31mchat: 1 allowed to vetoed" in shown
    assert shown.isascii()


def test_help_tells_all() -> None:
    """Every command and option explains itself."""
    for arguments in ((), ("show",), ("set",), ("history",), ("simulate",)):
        text = flask_policy(*arguments, "--help").output
        assert "Usage:" in text
        assert all(f"--{option.opts[0].lstrip('-')}" in text for option in _options(arguments))


def _options(arguments: tuple[str, ...]) -> list[Any]:
    return list(command.commands[arguments[0]].params) if arguments else []
