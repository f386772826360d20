"""`/v1/tasks` as a list: the newest first, page by page, each organization its own; and what a task tells of itself."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient

from tasks import lifecycle
from tasks.db import Database, now
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.services import wait_until

TASK: dict[str, Any] = {"agent": "incident-responder", "directive": "What now?"}
#: What a list does is the same on both databases; where it depends on how they compare, a test runs on both.
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
FIELDS = {
    "id", "status", "cancelling", "api", "agent", "project_id", "priority", "attempt", "created_at", "deadline",
    "finished_at", "links",
}  # fmt: skip


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch, secrets_directory: object) -> None:
    """Let every agent's profile fit."""
    monkeypatch.setenv(f"{PREFIX}ENGINE__MAX_MODEL_LEN", "8192")


def submit(client: FlaskClient, key: str | None = None, **fields: Any) -> str:
    """Submit a task; return its id."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = client.post("/v1/tasks", json={**TASK, **fields}, headers=headers)
    assert answer.status_code == 202, answer.text
    accepted: dict[str, Any] = answer.get_json()
    return str(accepted["id"])


def page(client: FlaskClient, key: str | None = None, **query: Any) -> dict[str, Any]:
    """Return a page of the list."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = client.get("/v1/tasks", query_string=query, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.get_json()
    assert set(found) == {"data", "has_more"}
    return found


def ids(client: FlaskClient, key: str | None = None, **query: Any) -> list[str]:
    """Return the ids on a page."""
    return [task["id"] for task in page(client, key, **query)["data"]]


@SQLITE
def test_a_list_shows_what_there_is(client: FlaskClient) -> None:
    """Nothing at first; then each task with where it stands, and without a word of what was asked or answered."""
    assert page(client) == {"data": [], "has_more": False}
    deadline = now() + timedelta(hours=1)
    task_id = submit(
        client, project_id="proj_1", priority="high", deadline=deadline.isoformat(), metadata={"ticket": "xyzzy"}
    )
    [shown] = page(client)["data"]
    assert set(shown) == FIELDS
    assert (shown["id"], shown["status"], shown["api"], shown["agent"]) == (task_id, "queued", "tasks", TASK["agent"])
    assert (shown["project_id"], shown["priority"], shown["attempt"]) == ("proj_1", "high", 0)
    assert (shown["deadline"], shown["finished_at"], shown["cancelling"]) == (deadline.isoformat(), None, False)
    assert shown["links"]["self"] == f"/v1/tasks/{task_id}"
    text = client.get("/v1/tasks").text
    assert "xyzzy" not in text
    assert TASK["directive"] not in text


@SQLITE
def test_a_list_agrees_with_what_each_task_says(client: FlaskClient) -> None:
    """Its entry is what `GET /v1/tasks/{id}` shows, which adds the caller's own notes."""
    submit(client, metadata={"ticket": "4711"})
    submit(client)
    for shown in page(client)["data"]:
        alone: dict[str, Any] = client.get(shown["links"]["self"]).get_json()
        assert {name: alone[name] for name in FIELDS} == shown
        assert alone["metadata"] in ({"ticket": "4711"}, {})


def test_pages_to_the_end_while_new_tasks_arrive(client: FlaskClient) -> None:
    """Whatever the size of the pages: each task that was there at the beginning is seen once, the newest first."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    made = [submit(client) for _ in range(23)]
    seen: list[str] = []
    while True:
        query = {"after": seen[-1]} if seen else {}
        found = page(client, limit=choose.randrange(1, 8), **query)
        assert found["data"]
        seen += [task["id"] for task in found["data"]]
        if not found["has_more"]:
            break
        made += [submit(client) for _ in range(choose.randrange(3))]
    assert seen == made[22::-1]
    assert ids(client, after=seen[-1]) == []
    assert ids(client, limit=100) == made[::-1]


@SQLITE
def test_the_last_page_says_so(client: FlaskClient) -> None:
    """Also where it is exactly full."""
    made = [submit(client) for _ in range(4)]
    assert [page(client, limit=limit)["has_more"] for limit in (1, 3, 4, 5)] == [True, True, False, False]
    found = page(client, limit=2, after=made[2])
    assert ([task["id"] for task in found["data"]], found["has_more"]) == ([made[1], made[0]], False)


@SQLITE
def test_a_page_without_a_limit_holds_twenty(client: FlaskClient) -> None:
    """And no page more than a hundred."""
    made = [submit(client) for _ in range(21)]
    found = page(client)
    assert [task["id"] for task in found["data"]] == made[:0:-1]
    assert found["has_more"]


def test_filters(client: FlaskClient) -> None:
    """Each alone, and all together; pages of a filtered list are pages of what fits."""
    plain = submit(client)
    planner = submit(client, agent="migration-planner")
    project = [submit(client, project_id="proj_1") for _ in range(3)]
    cancelled = submit(client, project_id="proj_1")
    assert client.delete(f"/v1/tasks/{cancelled}").status_code == 200
    running = submit(client)
    database = Database(settings().database)
    database.write(lambda on: lifecycle.start(on, running, lifecycle.FIRST_EPOCH, "gpu@test", 3))
    database.close()
    newest = [running, cancelled, *reversed(project), planner, plain]
    assert ids(client) == ids(client, api="tasks") == newest
    assert ids(client, status="queued") == [*reversed(project), planner, plain]
    assert ids(client, status="running") == [running]
    assert ids(client, status="cancelled") == [cancelled]
    assert ids(client, status="completed") == ids(client, status="failed") == ids(client, status="expired") == []
    assert ids(client, agent="migration-planner") == [planner]
    assert ids(client, agent="MIGRATION-PLANNER") == []
    assert ids(client, project_id="proj_1") == [cancelled, *reversed(project)]
    assert ids(client, project_id="proj_1", status="queued", agent=TASK["agent"]) == project[::-1]
    assert ids(client, project_id="proj_1", status="queued", after=project[2], limit=1) == [project[1]]
    assert page(client, project_id="proj_1", status="queued", after=project[2], limit=1)["has_more"]
    assert ids(client, api="chat") == ids(client, project_id="proj_2") == []


@SQLITE
def test_a_task_that_is_too_late_is_listed_as_it_is_shown(client: FlaskClient) -> None:
    """Once somebody has looked at it, the list knows, too."""
    task_id = submit(client, deadline=(now() + timedelta(seconds=0.3)).isoformat())
    path = f"/v1/tasks/{task_id}"
    wait_until(lambda: client.get(path).json["status"] != "queued", 10, "its deadline")
    shown: dict[str, Any] = client.get(path).get_json()
    assert (shown["status"], shown["error"]["code"]) == ("expired", "expired")
    assert ids(client, status="expired") == [task_id]
    assert ids(client, status="queued") == []
    assert page(client)["data"][0]["finished_at"] == shown["finished_at"] > shown["deadline"]


def test_organizations_see_their_own(client: FlaskClient) -> None:
    """Nobody sees another's tasks, in whatever way a list is asked for; a foreign id is only a place in time."""
    key = new_key("other")
    mine, theirs = [], []
    for _ in range(3):
        mine.append(submit(client, project_id="proj_1"))
        theirs.append(submit(client, key, project_id="proj_1"))
    assert ids(client) == mine[::-1]
    assert ids(client, key) == theirs[::-1]
    for query in ({"project_id": "proj_1"}, {"status": "queued"}, {"limit": 100}, {"agent": TASK["agent"]}):
        assert ids(client, key, **query) == theirs[::-1]
    assert ids(client, key, after=mine[2]) == [theirs[1], theirs[0]]
    assert ids(client, new_key("nobody")) == []


BAD = {
    "unknown status": {"status": "done"},
    "empty status": {"status": ""},
    "another case": {"status": "Queued"},
    "unknown API": {"api": "soap"},
    "no limit": {"limit": "0"},
    "negative limit": {"limit": "-1"},
    "limit too large": {"limit": "101"},
    "limit that is no number": {"limit": "ten"},
    "fractional limit": {"limit": "1.5"},
    "empty limit": {"limit": ""},
    "empty agent": {"agent": ""},
    "agent too long": {"agent": "x" * 201},
    "control character": {"agent": "a\x00b"},
    "line break": {"project_id": "a\nb"},
    "no id": {"after": "yesterday"},
    "empty id": {"after": ""},
    "an id with more": {"after": "gw_" + "0" * 12 + "7" + "0" * 3 + "8" + "0" * 15 + "'"},
    "unknown parameter": {"organization": "other"},
    "a column's name": {"state": "queued"},
}


@SQLITE
def test_bad_queries(client: FlaskClient) -> None:
    """Each is refused, with the parameter that is wrong, and why."""
    for name, query in BAD.items():
        answer = client.get("/v1/tasks", query_string=query)
        assert (answer.status_code, answer.json["code"]) == (422, "invalid_request"), name
        assert [problem["field"] for problem in answer.json["errors"]] == list(query), name
        assert answer.json["errors"][0]["message"]
    answer = client.get("/v1/tasks?limit=5&status=queued&status=running")
    assert (answer.status_code, answer.json["errors"][0]["field"]) == (422, "status")


@SQLITE
def test_a_list_needs_a_key(client: FlaskClient) -> None:
    """As everything does."""
    del client.environ_base["HTTP_AUTHORIZATION"]
    assert client.get("/v1/tasks").json["code"] == "unauthenticated"
