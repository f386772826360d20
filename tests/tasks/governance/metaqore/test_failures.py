"""Every way in which MetaQore can fail: what is made of it, and that nobody waits longer than the timeout."""

from __future__ import annotations

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Event

import pytest

from tasks.governance.metaqore.client import Client
from tasks.governance.metaqore.snapshot import Snapshot
from tests.metaqore_failures import FAILURES
from tests.metaqore_stand_in import StandIn, project_id
from tests.tasks.governance.metaqore.conftest import Ask
from tests.tasks.governance.metaqore.test_projects import P1, standing

KEY = "mq-server-key-that-nobody-may-see"
#: For a machine that is busy with other things. What is measured against it would otherwise take many times as long.
SLACK_S = 1.0
#: Where no answer is to come in time; the others get seconds.
TIMEOUT_S = 0.2
#: Where some answers are to come in time, and some are not.
HALF_S = 0.8


@pytest.mark.parametrize(("how", "condition"), FAILURES.items())
def test_each_failure_is_told_apart(
    ask: Ask, stand_in: StandIn, how: str, condition: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Strictly nothing runs for want of an answer, and the veto says that asking again may help."""
    stand_in.fail(how)
    projects = ask(KEY, timeout_s=TIMEOUT_S if condition == "timeout" else 5.0, max_answer_bytes=2**20)
    began = time.monotonic()
    with caplog.at_level(logging.DEBUG):
        found = standing(projects)
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    assert found.context["conditions"] == [condition, "mode_unknown"]
    assert (found.context["mode"], found.context["mode_source"]) == ("strict", "assumed")
    assert found.context["project"] == {"id": P1, "status": None}
    assert found.veto is not None
    assert found.veto.policy_violated == f"psmp_{condition}"
    assert found.retryable
    assert KEY not in caplog.text + repr(found)
    assert not any("elsewhere" in call for call in stand_in.calls), "redirects are not followed"


@pytest.mark.parametrize("how", ["hang", "reset", "500", "401", "garbage", "html_404"])
def test_a_server_that_forgets_its_mode_does_not_spoil_the_rest(ask: Ask, stand_in: StandIn, how: str) -> None:
    """The project is known; the strictest mode is applied to it."""
    stand_in.fail(how, "health")
    projects = ask(timeout_s=HALF_S if FAILURES[how] == "timeout" else 5.0, cache_s=0, max_answer_bytes=2**20)
    found = standing(projects)
    assert found.context["conditions"] == ["mode_unknown"]
    assert found.context["outcome"] == "recorded"
    assert found.context["project"]["status"] == "in_progress"
    stand_in.add(1, "blocked")
    assert standing(projects).veto is not None


@pytest.mark.parametrize("mode", ["lenient", "STRICT", "", None, 5])
def test_a_mode_that_is_none_is_unknown(ask: Ask, stand_in: StandIn, mode: object) -> None:
    """A later version may know more of them; until the gateway does, it is strict."""
    stand_in.mode = mode  # type: ignore[assignment]
    found = standing(ask())
    assert found.context["conditions"] == ["mode_unknown"]
    assert found.context["mode"] == "strict"


def test_the_last_mode_is_remembered_for_a_while(ask: Ask, stand_in: StandIn) -> None:
    """A server of agents at play does not turn strict by being restarted; but not for ever."""
    stand_in.mode = "playground"
    projects = ask(cache_s=0, failure_cache_s=0, remember_mode_s=0.4)
    standing(projects)
    stand_in.fail("503")
    found = standing(projects)
    assert (found.context["mode"], found.context["mode_source"]) == ("playground", "remembered")
    assert found.context["conditions"] == ["server_error", "mode_unknown"]
    assert found.veto is None
    time.sleep(0.45)
    later = standing(projects)
    assert (later.context["mode"], later.context["mode_source"]) == ("strict", "assumed")
    assert later.veto is not None


@pytest.mark.parametrize("how", ["500", "hang", "garbage", "wrong_id"])
def test_half_an_answer_counts_as_far_as_it_goes(ask: Ask, stand_in: StandIn, how: str) -> None:
    """A project that is known to be blocked is refused for that, and no retry is promised."""
    stand_in.add(1, "blocked")
    stand_in.fail(how, "governance")
    found = standing(ask(timeout_s=HALF_S if how == "hang" else 3.0))
    assert found.context["conditions"] == ["project_blocked", FAILURES[how]]
    assert found.veto is not None
    assert found.veto.policy_violated == "psmp_project_blocked"
    assert not found.retryable


def test_nobody_listens(ask: Ask) -> None:
    """A server that is not there is told at once."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        found = standing(ask(url=f"http://127.0.0.1:{reserved.getsockname()[1]}"))
    assert found.context["conditions"][0] == "unreachable"


def test_a_name_that_does_not_exist(ask: Ask) -> None:
    """Looking it up is part of the timeout, too."""
    began = time.monotonic()
    found = standing(ask(url="http://metaqore.invalid", timeout_s=1.0))
    assert time.monotonic() - began < 1.0 + SLACK_S
    assert found.context["conditions"][0] in ("unreachable", "timeout")


def test_a_handshake_that_is_none(ask: Ask, stand_in: StandIn) -> None:
    """TLS asked of a server that speaks plainly."""
    found = standing(ask(url=stand_in.url.replace("http:", "https:")))
    assert found.context["conditions"][0] == "unreachable"


@pytest.mark.parametrize("how", ["hang", "drip", "drip_headers"])
def test_twenty_who_wait_wait_no_longer(ask: Ask, stand_in: StandIn, how: str) -> None:
    """Each for a project of its own, over fewer connections than they would need."""
    stand_in.fail(how)
    projects = ask(timeout_s=TIMEOUT_S, connections=4, breaker_failures=100)

    def wait(number: int) -> tuple[float, list[str]]:
        began = time.monotonic()
        found = standing(projects, project_id(number))
        return time.monotonic() - began, found.context["conditions"]

    with ThreadPoolExecutor(20) as pool:
        waited = list(pool.map(wait, range(1, 21)))
    assert max(seconds for seconds, _ in waited) < TIMEOUT_S + SLACK_S
    assert all(found == ["timeout", "mode_unknown"] for _, found in waited)


def test_a_backlog_that_nobody_accepts_is_a_timeout(ask: Ask) -> None:
    """Connecting is part of the timeout."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        began = time.monotonic()
        found = standing(ask(url=f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout_s=TIMEOUT_S))
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    assert found.context["conditions"][0] == "timeout"


def test_a_failure_is_kept_too_but_briefly(ask: Ask, stand_in: StandIn) -> None:
    """A server in trouble is not asked by every request, and is believed soon after it is well."""
    stand_in.fail("500")
    projects = ask(cache_s=60, failure_cache_s=0.3)
    for _ in range(5):
        assert standing(projects).context["conditions"][0] == "server_error"
    assert len(stand_in.calls) == 4
    stand_in.fail(None)
    time.sleep(0.35)
    assert standing(projects).context["outcome"] == "passed"


def test_a_project_that_is_made_after_it_was_asked_for_is_found_soon(ask: Ask, stand_in: StandIn) -> None:
    """That it is unknown is kept as briefly as a failure."""
    projects = ask(cache_s=60, failure_cache_s=0)
    assert standing(projects, project_id(7)).context["conditions"] == ["project_unknown"]
    stand_in.add(7)
    assert standing(projects, project_id(7)).context["outcome"] == "passed"


def test_the_breaker_leaves_a_failing_server_alone(ask: Ask, stand_in: StandIn) -> None:
    """After enough failures no call is made for any project, until a probe finds the server well."""
    stand_in.fail("500")
    projects = ask(failure_cache_s=0, breaker_failures=3, breaker_open_s=0.5)
    for number in (1, 2, 3):
        assert standing(projects, project_id(number)).context["conditions"][0] == "server_error"
    calls = len(stand_in.calls)
    began = time.monotonic()
    for number in range(4, 24):
        found = standing(projects, project_id(number))
        assert found.context["conditions"] == ["breaker_open", "mode_unknown"]
        assert found.retryable
    assert time.monotonic() - began < 0.5, "this test's time is over before it began"
    assert len(stand_in.calls) == calls
    stand_in.fail(None)
    time.sleep(0.55)
    assert standing(projects).context["outcome"] == "passed"


def test_unknown_projects_do_not_open_the_breaker(ask: Ask) -> None:
    """They are good answers: whoever names projects that are not there may not shut off those that are."""
    projects = ask(failure_cache_s=0, breaker_failures=2)
    for number in range(100, 110):
        assert standing(projects, project_id(number)).context["conditions"] == ["project_unknown"]
        assert standing(projects, f"no project {number}").context["conditions"] == ["project_unknown"]
    assert standing(projects).context["outcome"] == "passed"


def test_nobody_waits_for_a_loop_that_is_stuck(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should something hold up the event loop itself, its deadlines are late; callers have their own."""
    over = Event()

    async def stuck(_client: Client, _project: str | None) -> Snapshot:
        over.wait(10)
        return Snapshot(datetime.now(UTC))

    monkeypatch.setattr(Client, "snapshot", stuck)
    began = time.monotonic()
    found = standing(ask(timeout_s=TIMEOUT_S))
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    over.set()
    assert found.context["conditions"] == ["timeout", "mode_unknown"]
