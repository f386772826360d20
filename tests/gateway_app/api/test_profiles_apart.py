"""Profiles of several organizations, from several gateway processes, at once and at rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from gateway_app import build
from tasks.schema import audit_events, metadata
from tasks.schema_profiles import profile_versions
from tasks.settings import settings
from tests.conftest import new_key
from tests.profile_calls import SHIPPED, activate, add, connected, create, read, recorded, run, write

SECRET_TEXT = "xyzzy-what-was-written"


@pytest.fixture
def second(configured: None) -> Iterator[FlaskClient]:
    """Return a client of another gateway process on the same services."""
    app = build(settings())
    with app.extensions["closing"]:
        yield connected(app, new_key("default"))


def test_changes_at_once(client: FlaskClient, second: FlaskClient) -> None:
    """Of many that make an agent at once one wins; versions get a number each; with a base one wins; none crashes."""
    apps = (client.application, second.application)
    key = new_key("default")

    def at_once(send: Callable[[FlaskClient, int], TestResponse]) -> list[TestResponse]:
        barrier = Barrier(8)

        def one(index: int) -> TestResponse:
            own = connected(apps[index % 2], key)
            barrier.wait()
            return send(own, index)

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(8)))

    made = at_once(lambda own, index: create(own, "poet", f"{index}."))
    assert sorted(answer.status_code for answer in made) == [201] + [409] * 7
    assert {answer.json["code"] for answer in made if answer.status_code == 409} == {"profile_exists"}
    added = at_once(lambda own, index: add(own, "poet", f"{index}.", activate=index % 3 == 0))
    assert sorted(answer.json["version"] for answer in added) == list(range(2, 10))
    for answer in added:
        version = client.get(f"/v1/profiles/poet/versions/{answer.json['version']}").json
        assert version["segments"] == answer.json["segments"]
    based = at_once(lambda own, _index: add(own, "poet", "Based.", base_version=9))
    assert sorted(answer.status_code for answer in based) == [201] + [409] * 7
    shipped = at_once(lambda own, _index: add(own, SHIPPED, "Ours."))
    assert sorted(answer.json["version"] for answer in shipped) == list(range(2, 10))
    first = client.get("/v1/profiles/poet").json["active_version"]
    active = at_once(lambda own, index: activate(own, "poet", index + 1))
    assert {answer.status_code for answer in active} == {200}
    last = client.get("/v1/profiles/poet").json["active_version"]
    # One after the other, in some order: each replaced what the one before had made active.
    assert sorted([last, *(answer.json["previous_version"] for answer in active)]) == sorted([first, *range(1, 9)])


def test_other_processes_see_it_at_once(client: FlaskClient, second: FlaskClient) -> None:
    """The next request of any process runs with the version that was just made active, there and back."""
    assert run(second, "poet").status_code == 404
    create(client, "poet", activate=True)
    assert recorded(run(second, "poet").json["id"])[0] == 1
    add(second, "poet", "Two.", activate=True)
    for version in (1, 2, 1):
        static_profile_hash = activate(client, "poet", version).json["static_profile_hash"]
        for process in (client, second):
            assert recorded(run(process, "poet").json["id"]) == (version, static_profile_hash)
    assert second.get("/v1/profiles/poet").json == client.get("/v1/profiles/poet").json


def test_organizations_are_apart(client: FlaskClient) -> None:
    """What another organization made is not found, by any path; names are each organization's own."""
    create(client, "poet", SECRET_TEXT, activate=True)
    add(client, SHIPPED, SECRET_TEXT, activate=True)
    stranger = connected(client.application, new_key("other"))
    answers = [
        stranger.get("/v1/profiles/poet"),
        stranger.get("/v1/profiles/poet/versions/1"),
        stranger.get(f"/v1/profiles/{SHIPPED}/versions/2"),
        stranger.get("/v1/profiles/poet/diff?from=1&to=1"),
        stranger.get(f"/v1/profiles/{SHIPPED}/diff?from=1&to=2"),
        add(stranger, "poet", "Mine."),
        activate(stranger, "poet", 1),
        activate(stranger, SHIPPED, 2),
        run(stranger, "poet"),
    ]
    assert {answer.status_code for answer in answers} == {404}
    listed = stranger.get("/v1/profiles")
    everything = "".join(answer.text for answer in [*answers, listed, stranger.get(f"/v1/profiles/{SHIPPED}")])
    assert SECRET_TEXT not in everything
    assert "poet" not in listed.text
    assert recorded(run(stranger, SHIPPED).json["id"])[0] == 1
    same = create(stranger, "poet", SECRET_TEXT, activate=True).json
    ours = client.get("/v1/profiles/poet").json
    assert same["static_token_count"] == ours["static_token_count"]
    assert same["static_profile_hash"] != ours["static_profile_hash"]
    assert add(stranger, "poet", "Theirs.", activate=True).json["version"] == 2
    assert client.get("/v1/profiles/poet").json == ours


def test_text_is_sealed(client: FlaskClient) -> None:
    """The database holds neither text nor description, and a change is no request."""
    create(client, "poet", SECRET_TEXT, description=SECRET_TEXT, activate=True)
    add(client, "poet", SECRET_TEXT)
    assert SECRET_TEXT in client.get("/v1/profiles").text
    for table in metadata.tables.values():
        assert not any(SECRET_TEXT.encode() in as_bytes(value) for row in read(sa.select(table)) for value in row)
    assert [row.kind for row in read(sa.select(audit_events))] == ["profile_changed"]
    assert read(sa.text("SELECT * FROM audit_requests")) == []


def test_a_row_cannot_be_passed_off_as_another(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever can write to the database cannot make one version, agent or organization have another's text."""
    create(client, "poet", SECRET_TEXT, activate=True)
    stranger = connected(client.application, new_key("other"))
    create(stranger, "poet", "Mine.")
    stolen = {name: getattr(read(sa.select(profile_versions))[0], name) for name in ("data_key", "segments")}
    write(sa.update(profile_versions).values(stolen))
    answer = stranger.get("/v1/profiles/poet/versions/1")
    assert (answer.status_code, answer.json["code"]) == (500, "internal_error")
    assert SECRET_TEXT not in answer.text + caplog.text


def as_bytes(value: object) -> bytes:
    """Return a stored value as it could be searched."""
    return value if isinstance(value, bytes) else str(value).encode()


def test_a_change_is_made_whole_or_not_at_all(client: FlaskClient) -> None:
    """An agent is not left behind without its version."""
    write(sa.text("ALTER TABLE profile_versions RENAME TO gone"))
    assert create(client, "poet").status_code in (500, 503)
    write(sa.text("ALTER TABLE gone RENAME TO profile_versions"))
    assert client.get("/v1/profiles/poet").status_code == 404
    assert create(client, "poet").status_code == 201
