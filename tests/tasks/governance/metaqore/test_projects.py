"""How projects stand, asked of a MetaQore that answers as it should."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tasks.governance.metaqore import make_projects
from tasks.governance.metaqore.answers import BlockingReport
from tasks.governance.metaqore.conflicts import PAGE_SIZE, Listing
from tasks.governance.metaqore.projects import LiveProjects
from tasks.governance.metaqore.snapshot import LISTED, Snapshot
from tasks.governance.psmp import Standing
from tasks.settings import MetaqoreGroup, Settings, load
from tests.metaqore_stand_in import DESCRIPTION, StandIn, artifact, conflict, project_id
from tests.tasks.governance.metaqore.conftest import Ask

P1 = project_id(1)


def standing(projects: LiveProjects, project: str = P1, **named: Any) -> Standing:
    """Return how a project stands for an agent's request."""
    whole = {"artifact_id": None, "task_id": None, "agent_name": "coder", **named}
    found = projects.standing(project_id=project, **whole)
    assert found is not None
    json.dumps(found.context)
    assert DESCRIPTION not in json.dumps(found.context), "free text does not go into audit events"
    return found


def test_a_request_without_a_project_asks_nobody(ask: Ask, stand_in: StandIn) -> None:
    """There is nothing to be said of it."""
    projects = ask()
    assert projects.standing(project_id=None, artifact_id="art_0", task_id="task_0", agent_name="coder") is None
    assert stand_in.calls == []


def test_without_a_url_there_is_nothing_to_ask() -> None:
    """MetaQore is optional."""
    assert make_projects(Settings()) is None


def test_a_project_in_good_order(ask: Ask) -> None:
    """The context says what was known, of the artifact and the task too, and since when."""
    before = datetime.now(UTC)
    found = standing(ask(), artifact_id="art_000000000001", task_id="task_000000000001")
    assert (found.veto, found.retryable) == (None, False)
    as_of = datetime.fromisoformat(found.context.pop("as_of"))
    assert before <= as_of <= datetime.now(UTC)
    assert 0 <= found.context.pop("age_s") < 5
    assert found.context == {
        "outcome": "passed",
        "conditions": [],
        "mode": "strict",
        "mode_source": "metaqore",
        "project": {"id": P1, "status": "in_progress"},
        "agent": "coder",
        "artifact": {"id": "art_000000000001", "known": False, "blocked": False},
        "task": {"id": "task_000000000001", "known": True, "status": "pending"},
        "unresolved_conflicts": {"count": 0, "critical": 0, "unread": 0, "listed": []},
        "blocked_artifacts": {"count": 0, "listed": []},
    }


def test_conflicts_and_blocked_artifacts_are_listed_worst_first(ask: Ask, stand_in: StandIn) -> None:
    """Without the resolved ones, and without their descriptions."""
    first = artifact(1, P1, conflicts=(conflict(1, "low"), conflict(2, "critical", kind="circular_dependency")))
    stand_in.add(1, "planning", first, artifact(2, P1, conflicts=(conflict(3, "critical", resolved=True),)))
    stand_in.mode = "adaptive"
    found = standing(ask(), artifact_id=first["id"])
    assert found.veto is None
    assert found.context["outcome"] == "recorded"
    assert found.context["conditions"] == ["critical_conflict", "artifact_blocked"]
    assert found.context["artifact"] == {"id": first["id"], "known": True, "blocked": True}
    assert found.context["blocked_artifacts"] == {"count": 1, "listed": [first["id"]]}
    assert found.context["unresolved_conflicts"] == {
        "count": 2,
        "critical": 1,
        "unread": 0,
        "listed": [
            {
                "id": "conf_000000000002",
                "artifact_id": "art_000000000002",
                "severity": "critical",
                "conflict_type": "circular_dependency",
            },
            {
                "id": "conf_000000000001",
                "artifact_id": "art_000000000001",
                "severity": "low",
                "conflict_type": "version_mismatch",
            },
        ],
    }


def test_what_a_report_lists_as_resolved_is_out_of_the_way() -> None:
    """MetaQore's own report leaves such conflicts out; one that does not is read alike."""
    listed = [conflict(1, "critical", resolved=True), conflict(2, "high")]
    report = BlockingReport.model_validate_json(
        json.dumps({"project_id": P1, "conflicts": listed, "blocked_artifacts": []})
    )
    found = Snapshot.of(datetime.now(UTC), None, "strict", None, report, Listing(unread=0))
    assert (found.conflicts["count"], found.conflicts["critical"]) == (1, 0)


def test_long_lists_are_cut_and_their_length_is_told(ask: Ask, stand_in: StandIn) -> None:
    """An event stays small, and what was cut still decides."""
    items = [artifact(number, P1, conflicts=(conflict(number, "low"),)) for number in range(1, 500)]
    stand_in.add(1, "in_progress", *items, artifact(500, P1, conflicts=(conflict(500, "critical"),)))
    found = standing(ask(), artifact_id="art_0000000001f4")
    assert found.context["conditions"] == ["critical_conflict", "artifact_blocked"]
    shown = found.context["unresolved_conflicts"]
    assert (shown["count"], shown["critical"], len(shown["listed"])) == (500, 1, LISTED)
    assert found.context["blocked_artifacts"]["count"] == 500
    assert len(json.dumps(found.context)) < 6_000


@pytest.mark.parametrize(
    "odd",
    [
        "proj_1",
        "proj_00000000000G",
        "PROJ_000000000001",
        "proj_00000000000A",
        "proj_000000000001\n",
        "proj_0000000000011",
        "proj_00000000000١",
        "../health",
        "proj_000000000001/../../x",
        "%70roj_000000000001",
        "proj_000000000001?x=1",
        "art_000000000001",
        "p" * 200,
        " ",
    ],
)
def test_an_id_of_another_form_is_unknown_and_gets_into_no_url(ask: Ask, stand_in: StandIn, odd: str) -> None:
    """Only the mode is asked for."""
    found = standing(ask(), odd)
    assert found.context["conditions"] == ["project_unknown"]
    assert found.context["project"] == {"id": odd, "status": None}
    assert found.veto is not None
    assert found.veto.as_dict() == {
        "reason": "MetaQore knows no such project",
        "policy_violated": "psmp_project_unknown",
        "severity": "high",
        "details": {"mode": "strict", "conditions": ["project_unknown"], "project_id": odd},
    }
    assert stand_in.calls == ["/api/v1/health"]


def test_the_four_questions_as_they_are_asked(ask: Ask, stand_in: StandIn) -> None:
    """The paths of the contract, the key as a bearer, no cookies and no compression."""
    stand_in.api_key = "mq-server-key"
    assert standing(ask("mq-server-key")).context["outcome"] == "passed"
    assert sorted(stand_in.calls) == [
        f"/api/v1/governance/blocking-report?project_id={P1}",
        f"/api/v1/governance/conflicts?project_id={P1}&resolved=false&page=1&page_size={PAGE_SIZE}",
        "/api/v1/health",
        f"/api/v1/projects/{P1}",
    ]
    for headers in stand_in.headers:
        assert headers["Authorization"] == "Bearer mq-server-key"
        assert headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("suffix", ["", "/", "/api/v1", "/api/v1/"])
def test_the_url_may_name_the_api_too(ask: Ask, stand_in: StandIn, suffix: str) -> None:
    """People copy either."""
    assert standing(ask(url=stand_in.url + suffix)).context["outcome"] == "passed"


@pytest.mark.parametrize("given_as", ["variable", "file"])
def test_the_key_comes_from_the_secrets(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, secrets_directory: Any, given_as: str
) -> None:
    """And METAQORE_URL is all else that is needed."""
    stand_in.api_key = "mq-server-key"
    monkeypatch.setenv("METAQORE_URL", stand_in.url)
    if given_as == "variable":
        monkeypatch.setenv("METAQORE_SECRETS__METAQORE_API_KEY", "mq-server-key")
    else:
        (secrets_directory / "metaqore_api_key").write_text("mq-server-key\n", encoding="ascii")
    projects = make_projects(load())
    assert isinstance(projects, LiveProjects)
    try:
        assert standing(projects).context["outcome"] == "passed"
    finally:
        projects.close()


def test_connections_are_kept(ask: Ask, stand_in: StandIn) -> None:
    """Four questions at once need four, and no more however often they are asked."""
    projects = ask(cache_s=0)
    for _ in range(10):
        standing(projects)
    assert len(stand_in.calls) == 40
    assert stand_in.connections == 4


def test_an_answer_is_used_for_seconds_and_tells_its_age(ask: Ask, stand_in: StandIn) -> None:
    """A second request costs no call; when the time is over, what changed is seen."""
    projects = ask(cache_s=0.4)
    first = standing(projects).context
    stand_in.add(1, "blocked")
    time.sleep(0.1)
    second = standing(projects).context
    assert len(stand_in.calls) == 4
    assert second["as_of"] == first["as_of"]
    assert second["age_s"] >= first["age_s"] + 0.09
    assert second["outcome"] == "passed"
    time.sleep(0.4)
    third = standing(projects)
    assert third.veto is not None
    assert third.context["conditions"] == ["project_blocked"]
    assert datetime.fromisoformat(third.context["as_of"]) > datetime.fromisoformat(first["as_of"]) + timedelta(
        seconds=0.4
    )


def test_many_requests_for_one_project_make_one_call(ask: Ask, stand_in: StandIn) -> None:
    """Four questions, and forty threads have the answer."""
    stand_in.slow_s = 0.1
    projects = ask()
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda _: standing(projects), range(40)))
    assert {one.context["outcome"] for one in found} == {"passed"}
    assert len(stand_in.calls) == 4


def test_a_change_of_the_mode_is_seen_with_the_next_answer(ask: Ask, stand_in: StandIn) -> None:
    """Nobody has to restart the gateway."""
    stand_in.add(1, "failed")
    projects = ask(cache_s=0)
    for mode, outcome in (("strict", "veto"), ("adaptive", "recorded"), ("playground", "recorded"), ("strict", "veto")):
        stand_in.mode = mode
        found = standing(projects).context
        assert (found["mode"], found["mode_source"], found["outcome"]) == (mode, "metaqore", outcome)


def test_the_settings_may_give_the_mode(ask: Ask, stand_in: StandIn) -> None:
    """Then the server is not asked for it."""
    stand_in.add(1, "blocked")
    found = standing(ask(mode="playground"))
    assert (found.context["mode"], found.context["mode_source"]) == ("playground", "setting")
    assert found.veto is None
    assert "/api/v1/health" not in stand_in.calls


def test_after_closing_nothing_is_reached_and_nothing_raised(ask: Ask) -> None:
    """A request that comes late is judged all the same."""
    projects = ask()
    standing(projects)
    projects.close()
    projects.close()
    found = standing(projects, project_id(2))
    assert found.context["conditions"] == ["unreachable", "mode_unknown"]
    assert found.context["mode_source"] == "remembered"


def test_closing_lets_go_of_who_waits(stand_in: StandIn) -> None:
    """Nobody waits for a server that will not be asked any more."""
    stand_in.fail("hang")
    projects = LiveProjects(MetaqoreGroup(url=stand_in.url, timeout_s=30), None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(standing, projects)
        while len(stand_in.calls) < 4:
            time.sleep(0.01)
        projects.close()
        assert "unreachable" in waiting.result(5).context["conditions"]
