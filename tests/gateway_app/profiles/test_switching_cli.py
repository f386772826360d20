"""`flask profiles activate` and its kin: what they change, and what they say of how warm a version is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner, Result
from flask.testing import FlaskClient

from gateway_app.profiles.cli import profiles
from tests.profile_calls import SHIPPED, add, create, events
from tests.warm_fleet import Fleet


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return one kind of database: the statements are those of the routes, which are tried on both."""
    kind: str = request.param
    return kind


def command(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(profiles, list(map(str, arguments)))


def said(*arguments: object) -> str:
    """Run a command that must succeed; return what it printed as its result."""
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@contextmanager
def computing(fleet: Fleet, worker: str) -> Iterator[None]:
    """Have a worker compute what is wished for, until the end."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.3):
            if profile := fleet.ask(worker):
                fleet.report(worker, **{profile: 100_000})

    fleet.report(worker)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_activate_and_roll_back(client: FlaskClient, fleet: Fleet) -> None:
    """One line tells what is active and where it is computed; how far it is goes to the other stream."""
    create(client, "poet", activate=True)
    add(client, "poet", "Two.")
    because = ("--author", "Ada", "--reason", "Shorter.")
    cold = said("activate", "poet", 2, *because)
    assert cold == (
        "poet: version 2 is active, in place of 1; no worker is alive, so the first requests wait until it is computed\n"
    )
    with computing(fleet, "w1"):
        warm = command("rollback", "poet", *because)
    assert warm.stdout.startswith("poet: version 1 is active, in place of 2; computed on w1 after ")
    lines = [line.split("s  ")[1] for line in warm.stderr.splitlines()]
    assert lines[0] == "computed on 0 of 1, being computed on 0"
    assert lines[-1] == "computed on 1 of 1, being computed on 0"
    add(client, "poet", "Three.")
    fleet.report("w1")
    late = said("activate", "poet", 3, "--warm-s", 0.2)
    assert late.endswith("; the time was over before it was computed everywhere\n")
    assert said("rollback", "poet", "--version", 2, "--warm-s", 0).endswith(
        "; nothing was computed beforehand, as was asked for\n"
    )
    last = events()[1]
    assert (last.details["author"], last.details["reason"], last.api_key_id) == ("Ada", "Shorter.", "cli")


def test_canary_and_promotion(client: FlaskClient, fleet: Fleet) -> None:
    """As over HTTP."""
    create(client, "poet", activate=True)
    add(client, "poet", "Two.")
    with computing(fleet, "w1"):
        assert said("canary", "poet", 2, "--share", 0.25).startswith(
            "poet: version 2 gets 25% of the requests; computed on w1"
        )
    fleet.report("w1")
    assert said("promote", "poet").startswith("poet: version 2 is active, in place of 1; computed on w1")


def test_pin_and_unpin(client: FlaskClient, fleet: Fleet) -> None:
    """What is pinned can be listed, with where it is computed."""
    create(client, "poet", activate=True)
    assert said("pins") == ""
    assert said("pin", "poet", "--copies", 2) == "poet: pinned, 2 copies; version 1; computed on no worker\n"
    fleet.report("w1")
    hashed = fleet.ask("w1")
    assert hashed is not None
    assert said("pins") == "poet: pinned, 2 copies; version 1; computed on no worker, being computed on w1\n"
    fleet.report("w1", **{hashed: 100_000})
    assert said("pin", SHIPPED).startswith(f"{SHIPPED}: pinned, 1 copy; version 1; ")
    assert said("pins").splitlines()[1] == "poet: pinned, 2 copies; version 1; computed on w1"
    assert said("pins", "--organization", "other") == ""
    assert said("unpin", "poet", "--reason", "Quiet.") == "poet: not pinned; version 1; computed on w1\n"
    assert [event.details["action"] for event in events()] == ["activated", "pinned", "pinned", "unpinned"]


def test_mistakes(client: FlaskClient) -> None:
    """Each is one message."""
    del client
    for arguments, message in (
        (("activate", "nobody", 1), "no active profile is named"),
        (("activate", SHIPPED, 7), "there is no version 7"),
        (("activate", SHIPPED, 0), "--version"),
        (("activate", SHIPPED, 1, "--warm-s", -1), "--warm-s"),
        (("canary", SHIPPED, 1, "--share", 2), "--share"),
        (("promote", SHIPPED), "has no canary"),
        (("pin", SHIPPED, "--copies", 65), "--copies"),
        (("pin", SHIPPED, "--reason", "two\nlines"), "--reason"),
        (("unpin", SHIPPED), "is not pinned"),
        (("pins", "--organization", ""), "--organization"),
    ):
        result = command(*arguments)
        assert result.exit_code != 0, arguments
        assert message in result.output, result.output
        assert "Traceback" not in result.output
    assert events() == []
