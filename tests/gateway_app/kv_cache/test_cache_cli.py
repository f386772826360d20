"""`flask cache show`: all that workers hold, for whoever runs them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from flask.cli import cli
from flask.testing import FlaskClient

from gateway_app.kv_cache import view
from tasks.cache_hits import Hits
from tasks.settings import settings
from tests.conftest import new_key
from tests.gateway_app.kv_cache.reported import Reporters, make, named, shown
from tests.services import free_port

OTHER = "other\x1b[1m"
pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


def flask(*arguments: str) -> Result:
    """Run a command as `flask` does, without .flaskenv: no command here needs the application."""
    runner = CliRunner(env={"FLASK_RUN_FROM_CLI": "true", "FLASK_SKIP_DOTENV": "1"})
    return runner.invoke(cli, ("cache", "show", *arguments), prog_name="flask")


def text(*arguments: str) -> list[str]:
    """Run the command, which must succeed; return its lines."""
    result = flask(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def document(*arguments: str) -> dict[str, Any]:
    """Return what the command prints as JSON."""
    found: dict[str, Any] = json.loads("\n".join(text(*arguments, "--json")))
    return found


@pytest.fixture
def reporters(client: FlaskClient, redis_url: str) -> Iterator[Reporters]:
    """Return two workers: of `default`'s poet and painter and another organization's poet they hold some."""
    make(client, "poet", "Poet.")
    make(client, "painter", "Painter.")
    make(client, "unused", "Nobody asks.")
    make(client, "poet", "Poet.", headers={"Authorization": f"Bearer {new_key(OTHER, 'admin')}"})
    ours, (theirs,) = shown(client), shown(client, "", {"Authorization": f"Bearer {new_key(OTHER)}"})["data"]
    segment, poet, painter = ours["data"][0], named(ours, "poet"), named(ours, "painter")
    with (made := Reporters(redis_url)).client:
        on_gpu = {each["link"]: (each["tokens"],) * 3 for each in (segment, poet, theirs)}
        made.report("gpu@a", on_gpu)
        made.report("gpu@b", {segment["link"]: (0, 0, segment["tokens"]), painter["link"]: (0, 0, 16)})
        made.count({poet["link"]: Hits(3, 2, 300, 210, 1.0)})
        yield made


def test_a_tree_to_read(reporters: Reporters) -> None:
    """The workers with what they do, then each organization's profiles, and nothing that the terminal would obey."""
    del reporters
    head, first, second, _, default, segment, painter, poet, _, other, theirs = text()
    assert head.split()[:5] == ["worker", "state", "capacity", "known", "free"]
    assert first.split()[:9] == ["gpu@a", "ready", "8,192", "700", "1,000", "3", "4,321", "25,000", "75.0%"]
    assert second.split()[:2] == ["gpu@b", "ready"]
    assert default.split()[:2] == ["default", "tokens"]
    assert other.split()[:2] == ["other\\x1b[1m", "tokens"]
    assert segment.startswith("  agent_base_profile, shared by 2  ")
    assert segment.endswith("gpu@a (gpu), gpu@b (disk)")
    assert painter.startswith("    painter version 1  ")
    assert painter.endswith("gpu@b (0/0/16)")
    assert re.search(r"  gpu@a \(gpu\) +2 of 3  70\.0% +[0-9.]+ h ago$", poet)
    assert theirs.startswith("  poet version 1  ")


def test_parts_of_it(reporters: Reporters, monkeypatch: pytest.MonkeyPatch) -> None:
    """By worker, organization and agent; a fleet that holds too much to be shown says so."""
    del reporters
    everything = document()
    assert [worker["worker"] for worker in everything["workers"]] == ["gpu@a", "gpu@b"]
    assert everything["workers"][0]["load"] == 4321
    assert {entry["organization"] for entry in everything["data"]} == {"default", OTHER}
    assert everything["has_more"] is False
    on_b = document("--worker", "gpu@b")
    assert [entry.get("agent") for entry in on_b["data"]] == ["painter"]
    assert [worker["worker"] for worker in on_b["workers"]] == ["gpu@b"]
    assert [entry["agent"] for entry in document("--organization", "default", "--agent", "poet")["data"]] == ["poet"]
    assert document("--agent", "unused")["data"] == []
    monkeypatch.setattr(view, "MOST_PROFILES", 1)
    assert document()["has_more"] is True
    assert text()[-1].startswith("and more")


def test_no_worker(client: FlaskClient) -> None:
    """Is said, and is no failure."""
    del client
    assert text() == ["no worker has reported in the last seconds"]
    assert document() == {"data": [], "workers": [], "has_more": False}


def test_redis_is_away(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear message."""
    del client
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    settings.cache_clear()
    result = flask()
    assert (result.exit_code, "Traceback" in result.output) == (1, False)
    assert "queue" in result.output
